"""Who a process is, so that another can tell whether it is still there."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """host: for people. machine: the same for processes that see each other's process ids, so of one boot and one
    container. started: tells a process from a later one of the same id."""

    host: str
    machine: str
    pid: int
    started: str

    @property
    def tag(self) -> str:
        """For names of files."""
        return f"{self.machine}-{self.pid}-{self.started}"

    @classmethod
    def of_tag(cls, tag: str) -> Owner | None:
        machine, _, rest = tag.partition("-")
        pid, _, started = rest.partition("-")
        return cls("", machine, int(pid), started) if pid.isdigit() else None

    def gone(self) -> bool:
        """Whether this process has certainly ended. Of other machines nothing is certain."""
        if self.machine != _machine() or os.name == "nt":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return _started(self.pid) != self.started


def this_process() -> Owner:
    pid = os.getpid()
    return Owner(platform.node(), _machine(), pid, _started(pid))


@lru_cache(maxsize=1)
def _machine() -> str:
    told = [platform.node()]
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and os.path.lexists(processes):
        told += [boot.read_text(), os.readlink(processes)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """In ticks since the boot, where the system tells; a process that has ended and waits for its parent is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "0" if fields[0] in "ZX" else fields[19]
