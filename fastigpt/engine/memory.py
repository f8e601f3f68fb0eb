"""What engines ask of a device besides arithmetic: how much memory it has free now, and to have finished its work."""

from __future__ import annotations

from pathlib import Path

import torch

_UNKNOWN = 4 << 30  # assumed where the system cannot be asked


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in its cache but does not use is free to us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _meminfo("MemAvailable")
    return min(_UNKNOWN if available is None else available, *_cgroup_room())


def synchronize(device: torch.device) -> None:
    """Waits for the work a GPU was given; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _meminfo(field: str) -> int | None:
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room() -> list[int]:
    """What the control group of this process may still take, where there is one with a limit."""
    top = Path("/sys/fs/cgroup")
    limit, used = top / "memory.max", top / "memory.current"
    if not (limit.exists() and used.exists()):
        return [2**63]
    text = limit.read_text().strip()
    return [2**63] if text == "max" else [max(0, int(text) - int(used.read_text()))]
