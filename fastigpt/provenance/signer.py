"""Signs pictures: `Signer.own().sign(png, "png", Facts(model, seed, index))`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2pa
from PIL import Image

import fastigpt
from fastigpt.image_files import mime_type
from fastigpt.provenance.certificates import Certificate
from fastigpt.provenance.facts import Facts, component
from fastigpt.provenance.identity import ROOT_CERTIFICATE, data_directory, own_leaf
from fastigpt.provenance.reading import State, read
from fastigpt.provenance.settings import MIME_TYPES, context
from fastigpt.untrusted import read_bytes

_CERTIFICATE_LIMIT = 1 << 20  # bytes of a file of certificates or keys
_RECORD_LIMIT = 1 << 20  # bytes that parents may add to a picture


class Signer:
    """Safe to share between threads.

    subject: of the certificate. expires: when it does; pictures count as valid until then. warning: what the operator
    should be told, or None. root: the file of one's own root certificate, which others may be given; None if the
    certificate came from elsewhere.
    """

    def __init__(
        self,
        certificate: bytes,
        key: bytes | Callable[[bytes], bytes],
        *,
        certificate_name: str = "certificate",
        key_name: str = "key",
        root: Path | None = None,
    ) -> None:
        """certificate: PEM, of the signer first, then of those up to its root. key: PEM, or a function that signs bytes
        with the algorithm that the certificate's key asks for (SHA-256 … 512 by curve; RSA: PSS; ECDSA in DER or
        r ‖ s), for keys that never leave their hardware. The names are of the files, in messages.

        One picture is signed and read back. Raises ValueError naming the files for a certificate that C2PA does not
        take, has expired, or does not belong to the key.
        """
        found = Certificate.read(certificate, certificate_name)
        self.subject, self.expires, self.warning, self.root = found.subject, found.expires, found.warning, root
        algorithm = c2pa.C2paSigningAlg[found.algorithm]
        try:
            if callable(key):
                signer = c2pa.Signer.from_callback(key, algorithm, found.pem.decode())
            else:
                secret = found.private_key(key, key_name)
                signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, found.pem, secret, None))
            self._context = context(signer=signer)
            picture = io.BytesIO()
            Image.new("RGB", (1, 1)).save(picture, "PNG")
            report = read(self.sign(picture.getvalue(), "png", Facts("", 0, 0)))
        except (c2pa.C2paError, OSError) as error:
            raise ValueError(f"C2PA cannot sign with {certificate_name} and {key_name}: {error}") from None
        if report.state is not State.VALID:
            raise ValueError(
                f"what is signed with {certificate_name} and {key_name} does not count as valid: {report.reason}"
            )

    @classmethod
    def own(cls, folder: Path | None = None) -> Signer:
        """With a certificate of one's own, made on first use. folder: where it is; None: in the user's data
        directory."""
        folder = data_directory() if folder is None else folder
        leaf, pem = own_leaf(folder)
        return cls(pem, pem, certificate_name=str(leaf), key_name=str(leaf), root=folder / ROOT_CERTIFICATE)

    @classmethod
    def from_files(cls, certificate: Path, key: Path) -> Signer:
        """With an operator's certificate, or chain of them, and private key, in PEM."""
        pem, secret = (read_bytes(path, _CERTIFICATE_LIMIT) for path in (certificate, key))
        return cls(pem, secret, certificate_name=str(certificate), key_name=str(key))

    def sign(self, picture: bytes, format: str, facts: Facts) -> bytes:
        """The picture's file with a signed record of the facts in it, the same pixels. format: "png", "webp" or "jpeg".

        Records that the parents carry are kept in it, unless they are damaged or larger than a megabyte in all: then
        they are parents without a record. Raises ValueError for another format, and for parents that are no images;
        OSError if the picture cannot be signed, for it is damaged or the key's hardware is away.
        """
        mime = MIME_TYPES.get(format)
        if mime is None:
            raise ValueError(f"format must be one of {', '.join(MIME_TYPES)}, not {format!r}")
        if not facts.parents:
            return self._sign(picture, mime, facts, [])
        parents = [(parent, _mime_type(parent)) for parent in facts.parents]
        try:
            signed = self._sign(picture, mime, facts, parents)
            if len(signed) - len(picture) <= _RECORD_LIMIT:
                return signed
        except OSError:  # one of the parents' records cannot be read, else the next line raises as well
            pass
        return self._sign(picture, mime, facts, [(_blank(kind), kind) for _, kind in parents])

    def _sign(self, picture: bytes, mime: str, facts: Facts, parents: list[tuple[bytes, str]]) -> bytes:
        try:
            return self._signed(picture, mime, facts, parents)
        except c2pa.C2paError as error:
            raise OSError(f"the picture cannot be signed: {error}") from None

    def _signed(self, picture: bytes, mime: str, facts: Facts, parents: list[tuple[bytes, str]]) -> bytes:
        builder = c2pa.Builder(facts.manifest(fastigpt.__version__), context=self._context)
        if len(parents) == 1:
            builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
        for i, (parent, kind) in enumerate(parents):
            relation: dict[str, Any] = {"relationship": "parentOf"}
            if len(parents) > 1:
                relation = {"relationship": "componentOf", "label": component(i)}
            builder.add_ingredient(relation, kind, io.BytesIO(parent))
        signed = io.BytesIO()
        builder.sign(mime, io.BytesIO(picture), signed)
        return signed.getvalue()


def open_signer(certificate: Path | None = None, key: Path | None = None) -> Signer:
    """The operator's certificate and key, or one's own if neither is given. Raises ValueError for one without the
    other."""
    if certificate is None and key is None:
        return Signer.own()
    if certificate is None or key is None:
        given, missing = ("key", "certificate") if certificate is None else ("certificate", "key")
        raise ValueError(f"a C2PA {given} was given without its {missing}")
    return Signer.from_files(certificate, key)


def _mime_type(parent: bytes) -> str:
    try:
        return mime_type(parent)
    except ValueError as error:
        raise ValueError(f"a parent is no image: {error}") from None


def _blank(kind: str) -> bytes:
    """A file of this MIME type without a record. Of a parent without one C2PA keeps the type and nothing else, so that
    it need not be the image itself, which may be large."""
    formats = {mime: format for format, mime in Image.MIME.items() if format in Image.SAVE}
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, formats.get(kind, "PNG"))
    return file.getvalue()
