"""What --out names: a picture, an array, a folder or standard output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastigpt.cli.archive import Archive
from fastigpt.cli.options import given
from fastigpt.cli.output import PICTURES, Folder, Grid, Output


def output(out: str, *, scale: int, columns: int | None = None) -> Output:
    """What --out names. Raises ValueError or OSError now, not after the work, if it cannot be written."""
    path = Path(given("--out", out))
    suffix = path.suffix.lower()
    to_stdout = path.stem == "-" and (suffix in (".npz", ".png") or out == "-")
    if to_stdout:
        if sys.stdout.isatty():
            raise ValueError(f"--out {out} writes bytes to standard output, which is a terminal: redirect it")
        return Archive(out, None) if suffix == ".npz" else Grid(out, None, scale, columns)
    if out.endswith(("/", os.sep)) or path.is_dir():
        return Folder(out, path)
    if suffix == ".npz":
        return Archive(out, path)
    if suffix in PICTURES:
        return Grid(out, path, scale, columns)
    if suffix:
        raise ValueError(f"--out {out}: write a picture (.png, .jpg, …), an array (.npz) or a folder (no suffix)")
    return Folder(out, path)
