"""How `fastigpt sample --c2pa` and `complete --c2pa` sign what they write."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastigpt.cli.output import Output, Sign
from fastigpt.extras import require

if TYPE_CHECKING:
    from fastigpt.provenance.signer import Signer


def signer(options: Mapping[str, Any], out: Output) -> Signer | None:
    """The signer that --c2pa, --c2pa-cert and --c2pa-key ask for; None: none. Tells the user what they should know of
    its certificate. Raises ValueError if it cannot sign, or what `out` writes cannot be signed."""
    certificate, key = options["c2pa_cert"], options["c2pa_key"]
    if not options["c2pa"] and certificate is None and key is None:
        return None
    out.check_signable()
    require("c2pa", for_="--c2pa")
    from fastigpt.provenance.signer import open_signer

    found = open_signer(certificate, key)
    if found.warning is not None:
        print(f"warning: {found.warning}", file=sys.stderr)
    return found


def sign_images(
    signer: Signer,
    model: str,
    seed: int,
    first_index: int,
    *,
    photographs: Sequence[Path] = (),
    n: int = 1,
    beside: int = 0,
) -> Sign:
    """photographs: those that were completed, n results each. beside: pictures in front of the results of each."""
    from fastigpt.provenance.facts import Facts, public_name

    name = public_name(model)
    files = [path.read_bytes() for path in photographs]

    def sign(picture: bytes, format: str, images: range) -> bytes:
        each = n + beside
        count = len(images)
        parents = tuple(files[images.start // each : -(-images.stop // each)])
        if beside:
            count -= beside * len(parents)
        return signer.sign(picture, format, Facts(name, seed, first_index + images.start, count, parents))

    return sign
