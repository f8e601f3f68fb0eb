"""The door that every checkpoint comes through: its directory is found, and config.json says which family reads it.

A checkpoint is untrusted input. Every file is checked against what config.json promises before a model is built from
it, pickles are only read with weights_only=True, and whatever is wrong ends in a CheckpointError that names the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastigpt import families
from fastigpt.bundled import NAMED
from fastigpt.errors import CheckpointError
from fastigpt.families.pretrained import CONFIG, Pretrained
from fastigpt.save import CheckpointFiles, Stamp
from fastigpt.untrusted import exists, read_json, short, shown

_ATTEMPTS = 3  # at reading a directory that somebody is writing to


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The directory of a checkpoint: a local one, one that comes with the package ("scenes-128"), or a hub id
    downloaded into huggingface_hub's cache. Or a file of a family that publishes files.

    Raises CheckpointError if there is neither such a directory nor such a model, or if the hub can't be reached;
    TypeError for anything but a str or a path.
    """
    text = _text(name_or_path)
    try:
        path = _place(text)
        if path.is_dir() or (path.suffix in families.FILES and path.is_file()):
            return path
        found = exists(path)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, the home of nobody
        raise CheckpointError(f"no directory {short(text, 400)}: {error}") from None
    if found:
        raise CheckpointError(_advice(path))
    if path.suffix in families.FILES:
        raise CheckpointError(f"no file {short(text, 400)}")
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text
    if looks_local:
        raise CheckpointError(f"no directory {short(text, 400)}")
    # Imported here: only who downloads should wait for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            text, revision=revision, local_files_only=local_files_only, allow_patterns=families.wanted()
        )
    except HFValidationError as error:
        raise CheckpointError(f"{short(text, 400)} is neither a directory nor a model id: {error}") from None
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        where = "in the local cache" if local_files_only else "as a directory, in the local cache or on the hub"
        raise CheckpointError(f"{text!r} was not found {where}: {error}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{text!r} is no directory, and the hub did not give it: {error}") from None
    return Path(folder)


def _text(name_or_path: str | os.PathLike[str]) -> str:
    text = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"name_or_path must be a directory or a hub id, a str or a path, not {short(name_or_path)}")
    return text


def _place(text: str) -> Path:
    """Where a local checkpoint of this name is or would be, or one that comes with the package, if nothing local is."""
    path = Path(text).expanduser()
    return NAMED[text] if text in NAMED and not exists(path) else path


def _advice(path: Path) -> str:
    """What to load instead of a file."""
    start = f"{shown(path)} is a file; a checkpoint is a directory with {CONFIG}"
    if not path.is_file():
        return f"{shown(path)} is no directory; a checkpoint is one with {CONFIG}"
    if path.suffix == ".npy":
        return f"{start}. Palettes are read with fastigpt.Palette.from_file"
    if ".ckpt" in path.name:
        return f"{start}. TensorFlow's checkpoints are converted with `fastigpt convert`"
    if exists(path.parent / CONFIG):
        return f"{start}: load {str(path.parent)!r}"
    return start


def stamp(name_or_path: str | os.PathLike[str]) -> Stamp | None:
    """Differs when the files of a local checkpoint have changed; None where there is no such directory."""
    try:
        folder = _place(_text(name_or_path))
        if folder.is_file() and folder.suffix in families.FILES:
            return CheckpointFiles(folder.parent, frozenset()).stamp([f"*{suffix}" for suffix in families.FILES])
        return CheckpointFiles(folder, frozenset()).stamp(families.wanted()) if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def read(folder: Path) -> Pretrained:
    """Reads and checks what `locate` found. Raises CheckpointError naming the file that is missing or wrong."""
    for _ in range(_ATTEMPTS):
        before = stamp(folder)
        failed = None
        try:
            found = _read(folder)
        except CheckpointError as error:
            failed = error
        if stamp(folder) == before:
            if failed is not None:
                raise failed
            return found
    raise CheckpointError(f"{folder} is being written to; it changed while it was read")


def _read(folder: Path) -> Pretrained:
    if not folder.is_dir():
        return families.FILES[folder.suffix]().read_file(folder)
    config_file = CheckpointFiles(folder, frozenset({CONFIG})).path(CONFIG)
    if not exists(config_file):
        raise CheckpointError(f"{config_file} is missing (found in {folder}: {_listing(folder)})")
    data = read_json(config_file)
    family = families.of(data, str(config_file))
    return family.read(folder, CheckpointFiles(folder, family.BELONGS), data)


def _listing(folder: Path) -> str:
    try:
        return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    except OSError as error:
        return str(error.strerror)
