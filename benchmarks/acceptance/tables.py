"""Launch configurations that one run chose and another uses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path


def digest(table: dict) -> str:
    """A short name of what a table says."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]


def why_no_table(family: str, chosen: Path) -> str | None:
    """Why there is no table of the first run in its folder, None if there is one."""
    path = chosen / f"{family}.json"
    if path.exists():
        return None
    return f"{path} is missing: --chosen is the folder that the first run wrote, and it chose no launch configurations"


def carry_over(family: str, chosen: Path, out: Path, folder: Path) -> None:
    """The table that the first run chose becomes this run's; its other results stay beside what is found now."""
    shutil.copy(chosen / f"{family}.json", folder)
    if chosen != out:
        shutil.copy(chosen / f"{family}.json", out)
        if not (out / "results.json").exists() and (chosen / "results.json").exists():
            shutil.copy(chosen / "results.json", out)
