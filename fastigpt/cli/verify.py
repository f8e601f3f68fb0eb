"""`fastigpt verify`: what pictures say of their origin, and whether that holds."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastigpt.cli.options import AsJson
from fastigpt.extras import require

_PEM_LIMIT = 1 << 20  # bytes


def verify(
    pictures: Annotated[list[Path], typer.Argument(help="Files of pictures.")],
    trust: Annotated[
        Path | None, typer.Option(help="Root certificates (.pem) of issuers to trust; others are failures then.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the signed origin (C2PA) of pictures: `fastigpt verify picture.png`.

    Exit status 0 only if every picture is valid: unchanged since it was signed, and by a trusted issuer if --trust says
    who that is. A valid picture of an unknown issuer is the work of anyone. Nothing is fetched from a network.
    """
    require("c2pa", for_="verify")
    from fastigpt.provenance.reading import State

    roots = None if trust is None else _roots(trust)
    good = {State.TRUSTED} if roots else {State.VALID}
    fine, told = True, []
    for picture in pictures:
        facts = _read(picture, roots)
        fine = fine and facts["state"] in good
        if as_json:
            told.append(facts)
        else:
            print(f"{_path(picture)}: {sentence(facts, trust)}")
    if as_json:
        import json

        print(json.dumps(told, indent=2))
    sys.stdout.flush()
    if not fine:
        raise typer.Exit(1)


def sentence(facts: dict[str, Any], trust: Path | None) -> str:
    """What `verify` prints of a picture after its name."""
    from fastigpt.provenance.reading import State

    state, reason = facts["state"], facts["reason"]
    if state not in (State.TRUSTED, State.VALID):
        words = {
            State.CHANGED: "changed since it was signed",
            State.INVALID: f"not valid: {reason}",
            State.NONE: "no record of its origin" + (f": {reason}" if reason else ""),
            State.UNREADABLE: f"cannot be read: {reason}",
        }
        return words[state]
    issuer = f"issuer unknown (calls itself {facts['issuer']!r})"
    if state is State.TRUSTED:
        issuer = f"issuer {facts['issuer']!r} trusted by {trust}"
    made = f"{facts.get('made', 'signed')} by {facts.get('by') or 'a program without a name'}"
    details = [f"{name} {facts[name]}" for name in ("model", "seed", "index", "count", "parent") if name in facts]
    return f"valid, {issuer}: {', '.join([made, *details])}"


def _read(path: Path, roots: str | None) -> dict[str, Any]:
    """The report on a file: state, reason, issuer, and the facts."""
    from fastigpt.provenance.reading import Report, State, read
    from fastigpt.untrusted import file_size

    try:
        file_size(path)  # refuses what is no file
        with path.open("rb") as file:
            report = read(file, trust=roots)
    except (ValueError, OSError) as error:
        report = Report(State.UNREADABLE, getattr(error, "strerror", None) or str(error))
    told = {"file": str(path), "state": report.state, "reason": report.reason, "issuer": report.issuer}
    return {**told, **report.facts}


def _roots(path: Path) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from fastigpt.untrusted import read_bytes

    try:
        certificates = x509.load_pem_x509_certificates(read_bytes(path, _PEM_LIMIT))
    except ValueError as error:
        raise ValueError(f"--trust {path}: it must hold certificates in PEM ({error})") from None
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def _path(path: Path) -> str:
    from fastigpt.provenance.reading import printable

    return printable(str(path))
