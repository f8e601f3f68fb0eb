"""How `fastigpt serve` signs what it draws."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastigpt.extras import require
from fastigpt.server.service import Drawn, Sign


def open_signing(certificate: Path | None, key: Path | None, *, wanted: bool) -> tuple[Sign | None, list[str]]:
    """What signs pictures, and what the operator is told of it at the start. None: nothing does, for it is not wanted,
    or for c2pa-python is missing and no certificate was given. Raises ValueError and OSError where it cannot sign."""
    given = certificate is not None or key is not None
    if not wanted:
        if given:
            raise ValueError("--no-c2pa was given with a certificate or a key to sign with")
        return None, ["pictures are not signed"]
    if not given and find_spec("c2pa") is None:
        return None, ["pictures are not signed: that needs c2pa-python (pip install c2pa-python), or say --no-c2pa"]
    require("c2pa", for_="signing pictures")
    from fastigpt.provenance.facts import Facts, public_name
    from fastigpt.provenance.signer import open_signer

    try:
        signer = open_signer(certificate, key)
    except OSError as error:
        raise OSError(f"pictures cannot be signed: {error}; --no-c2pa serves them without") from None

    def sign(picture: bytes, format: str, drawn: Drawn) -> bytes:
        facts = Facts(public_name(drawn.model), drawn.seed, drawn.index, parents=drawn.parents)
        return signer.sign(picture, format, facts)

    told = [f"pictures are signed (C2PA) by {signer.subject}"]
    if signer.root is not None:
        told[0] += f"; who should recognise them takes {signer.root}"
    if signer.warning is not None:
        told.append(f"warning: {signer.warning}")
    return sign, told
