"""A root and a leaf certificate of one's own, made on first use and kept in the user's data directory.

A picture is valid only as long as the leaf that signed it (there is no time stamp in it), so leaves live long and are
renewed half way: whatever is signed stays valid for at least LEAF / 2. Who is given root.pem can tell pictures of this
machine from others; root-key.pem is needed to renew the leaf only, and may be kept elsewhere until then.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fastigpt.owner import Owner, this_process

ROOT = timedelta(days=20 * 365)
LEAF = timedelta(days=10 * 365)
ROOT_CERTIFICATE, ROOT_KEY, LEAF_FILE = "root.pem", "root-key.pem", "leaf.pem"
_ORGANIZATION = "fastigpt (self-made certificate)"


def data_directory() -> Path:
    """Where certificates of this user's fastigpt are."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "fastigpt" / "c2pa"


def own_leaf(folder: Path) -> tuple[Path, bytes]:
    """The file of the leaf and what is in it, its certificate and its private key in PEM. Made if there is none yet,
    by one of several processes that begin at once; renewed by the root when half its life is over.

    Raises ValueError for a folder in which something is missing, OSError for one that cannot be written.
    """
    _clean(folder.parent, folder.name)
    if not folder.is_dir() or not any(folder.iterdir()):
        _make(folder)
    _clean(folder, ROOT_CERTIFICATE, ROOT_KEY, LEAF_FILE)
    leaf = folder / LEAF_FILE
    pem = _read(leaf)
    expires = _certificate(leaf, pem).not_valid_after_utc
    now = datetime.now(UTC)
    if expires - now >= LEAF / 2:
        return leaf, pem
    renewed = _renew(folder, after=expires)
    if renewed is None and expires <= now:
        raise ValueError(
            f"{leaf} expired on {expires:%Y-%m-%d} and cannot be renewed: {ROOT_KEY} is not there, or the root has "
            f"expired as well. Move the folder {folder} away, and new certificates are made"
        )
    return leaf, renewed or pem


def _renew(folder: Path, *, after: datetime) -> bytes | None:
    """A leaf that lives longer than `after`; None where the root cannot make one."""
    if not (folder / ROOT_KEY).exists():
        return None
    path = folder / ROOT_CERTIFICATE
    root = _certificate(path, _read(path))
    if root.not_valid_after_utc <= max(after, datetime.now(UTC)):
        return None
    pem = _new_leaf(root, _private_key(folder / ROOT_KEY))
    _replace(folder / LEAF_FILE, pem)
    return pem


def _make(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    short = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest[:4].hex()
    name = _name(f"fastigpt root {short}")
    root = _certificate_for(key, name, name, key, now + ROOT, authority=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_unfinished(folder.name)))  # mode 0700
    try:
        _replace(temporary / ROOT_CERTIFICATE, root.public_bytes(serialization.Encoding.PEM))
        _replace(temporary / ROOT_KEY, _private_pem(key))
        _replace(temporary / LEAF_FILE, _new_leaf(root, key))
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first, and its folder is as good
            if not (folder / LEAF_FILE).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unfinished(name: str) -> str:
    """How the names of what this process has not finished writing begin."""
    return f".{name}.{this_process().tag}."


def _clean(folder: Path, *names: str) -> None:
    """Removes what processes left that were killed while they wrote one of these: private keys are among it."""
    for name in names:
        for path in folder.glob(f".{name}.*"):
            owner = Owner.of_tag(path.name.removeprefix(f".{name}.").partition(".")[0])
            if owner is None or not owner.gone():
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _new_leaf(root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(datetime.now(UTC) + LEAF, root.not_valid_after_utc)
    leaf = _certificate_for(key, _name("fastigpt image signer"), root.subject, root_key, until, authority=False)
    return leaf.public_bytes(serialization.Encoding.PEM) + _private_pem(key)


def _certificate_for(
    key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    until: datetime,
    *,
    authority: bool,
) -> x509.Certificate:
    """What C2PA asks of certificates (its specification, "X.509 certificates"); of the uses of a leaf that it lists,
    emailProtection is the one that every reader takes."""
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))  # clocks differ
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(common: str) -> x509.Name:
    pairs = ((NameOID.ORGANIZATION_NAME, _ORGANIZATION), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in pairs])


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _replace(path: Path, data: bytes) -> None:
    """Readable by its owner alone at every moment, and whole at every moment."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_unfinished(path.name))  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} holds no {path.name}: move the folder away, and new certificates are made"
        ) from None


def _certificate(path: Path, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ValueError(
            f"{path} is damaged, it holds no certificate: move the folder {path.parent} away, and new ones are made"
        ) from None


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is damaged, it holds no private key of fastigpt's root")
