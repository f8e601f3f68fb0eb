"""Certificates and keys as files of operators have them, checked before anything is signed with them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from fastigpt.untrusted import short

WARN = timedelta(days=30)
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_LEAST_RSA = 2048


@dataclass(frozen=True)
class Certificate:
    """pem: the signer's certificate, then those between it and its root, nothing else. algorithm: C2PA's name of how
    its key signs. public_key: DER. name: of the file, in messages."""

    pem: bytes
    name: str
    algorithm: str
    public_key: bytes
    subject: str
    expires: datetime

    @classmethod
    def read(cls, pem: bytes, name: str) -> Certificate:
        """Raises ValueError naming `name` for what is no certificate, is one of an authority, has expired or is not
        valid yet, or has a key that C2PA knows no algorithm for."""
        try:
            chain = x509.load_pem_x509_certificates(pem)
            leaf, key = chain[0], chain[0].public_key()
        except Exception as error:  # a parser of files of strangers
            raise ValueError(f"{name} holds no certificate in PEM: {short(str(error), 200)}") from None
        now = datetime.now(UTC)
        if leaf.not_valid_after_utc <= now:
            raise ValueError(f"the certificate {name} expired on {leaf.not_valid_after_utc:%Y-%m-%d}")
        if leaf.not_valid_before_utc > now:
            raise ValueError(
                f"the certificate {name} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            )
        clean = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)
        subject = leaf.subject.rfc4514_string()
        return cls(clean, name, _algorithm(key, name), _der(key), subject, leaf.not_valid_after_utc)

    @property
    def warning(self) -> str | None:
        """What the operator should be told, if anything."""
        if self.expires - datetime.now(UTC) > WARN:
            return None
        return (
            f"the certificate {self.name} expires on {self.expires:%Y-%m-%d}; "
            "from then on pictures signed with it no longer count as valid"
        )

    def private_key(self, pem: bytes, name: str) -> bytes:
        """The private key of this certificate in PEM as c2pa takes it (PKCS#8, nothing around it), from a file of any
        kind. Raises ValueError naming both files for another key, and for an encrypted one."""
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except TypeError:
            raise ValueError(f"the private key {name} is encrypted: it must be readable without a password") from None
        except Exception as error:
            raise ValueError(f"{name} holds no private key in PEM: {short(str(error), 200)}") from None
        if _der(key.public_key()) != self.public_key:
            raise ValueError(f"the private key {name} does not belong to the certificate {self.name}")
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def _der(key: Any) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _algorithm(key: object, name: str) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA:
        return "PS256"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ED25519"
    found = type(key).__name__.removeprefix("_").removesuffix("PublicKey")
    size = getattr(key, "key_size", None)
    raise ValueError(
        f"the certificate {name} is of a key of kind {found}{f' ({size} bits)' if size else ''}; C2PA signs with "
        f"P-256, P-384, P-521, RSA of at least {_LEAST_RSA} bits, or Ed25519"
    )
