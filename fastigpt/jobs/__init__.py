"""Jobs that outgrow a process: any number of images in a directory that any number of workers fill.

Because image k is a pure function of the seed and k, a job can be cut anywhere. A job is a directory, on a disk or at a
URL that fsspec opens: job.json says what is drawn, shards/ holds tokens with a record for each shard, and executors
only fill it. `status`, and `verify` without redrawing, need no torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any

if _TYPE_CHECKING:
    from fastigpt.jobs.exporting import export
    from fastigpt.jobs.running import run
    from fastigpt.jobs.state import Status, status
    from fastigpt.jobs.verification import Findings, verify

__all__ = ["Findings", "Status", "export", "run", "status", "verify"]

_HOME = {
    "Findings": "verification",
    "Status": "state",
    "export": "exporting",
    "run": "running",
    "status": "state",
    "verify": "verification",
}


def _find(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastigpt.jobs' has no attribute {name!r}")
    found = getattr(_import_module(f"fastigpt.jobs.{_HOME[name]}"), name)
    globals()[name] = found
    return found


if not _TYPE_CHECKING:  # a type checker should find the names above and no others
    __getattr__ = _find
