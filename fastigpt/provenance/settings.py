"""How c2pa-rs is told to work: nothing is fetched, whatever a file names, and no thumbnail is made, which would take a
hundred times as long as the signature and more room than the picture."""

from __future__ import annotations

from typing import Any

import c2pa

_LEAN = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}

MIME_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
"""Formats of pictures that are signed."""


def context(*, trust: str | None = None, signer: Any = None) -> Any:
    """A c2pa.Context. trust: certificates of roots in PEM. signer: a c2pa.Signer, which belongs to the context then."""
    settings = _LEAN if trust is None else {**_LEAN, "trust": {"user_anchors": trust}}
    return c2pa.Context.from_dict(settings, signer=signer)
