"""Pictures tell where they come from, and nothing else about them changes."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import c2pa
import numpy as np
import pytest
from certificates_for_tests import certificate, p256, private
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from signing import encoded, own, pixels, root  # noqa: F401

from fastigpt.provenance.facts import Facts
from fastigpt.provenance.reading import State, read
from fastigpt.provenance.signer import Signer, open_signer

FACTS = Facts("scenes", 2**64 - 1, 2**63 - 1)


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_a_picture_tells_what_was_drawn_and_keeps_its_pixels(own, root, format):
    picture = encoded(format)
    signed = own.sign(picture, format, FACTS)
    assert np.array_equal(pixels(signed), pixels(picture))
    assert len(signed) - len(picture) <= 4096
    report = read(signed)
    assert (report.state, report.issuer) == (State.VALID, "fastigpt (self-made certificate)")
    assert report.facts == {
        "made": "created",
        "by": "fastigpt 0.1.0",
        "model": "scenes",
        "seed": str(2**64 - 1),
        "index": str(2**63 - 1),
    }
    assert read(signed, trust=root).state is State.TRUSTED
    assert read(signed, trust=certificate(p256()).decode()).state is State.VALID


def test_a_changed_byte_is_noticed(own):
    signed = own.sign(encoded(), "png", FACTS)
    changed = bytearray(signed)
    changed[-200] ^= 1
    report = read(bytes(changed))
    assert (report.state, report.facts, report.issuer) == (State.CHANGED, {}, "")


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_a_picture_that_was_saved_again_tells_nothing(own, format):
    again = io.BytesIO()
    with Image.open(io.BytesIO(own.sign(encoded(format), format, FACTS))) as image:
        image.save(again, format)
    assert read(again.getvalue()).state is State.NONE
    assert read(encoded(format)).state is State.NONE


def test_any_changed_byte_of_a_signed_picture_is_noticed(own):
    """Or the file cannot be read at all, or says less: it never still counts as valid and says something else."""
    signed, rng = own.sign(encoded(size=4), "png", FACTS), np.random.default_rng(0)
    told = read(signed)
    for place in rng.choice(len(signed), 200, replace=False):
        changed = bytearray(signed)
        changed[place] ^= int(rng.integers(1, 256))
        report = read(bytes(changed))
        assert report.state is not State.VALID or report == told, place


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_completion_names_the_photograph_as_its_parent(own, format):
    parent = encoded(format)
    report = read(own.sign(encoded(), "png", Facts("scenes", 1, 2, parents=(parent,))))
    assert report.state is State.VALID and report.facts["made"] == "edited"
    assert report.facts["parent"] == f"image/{format.lower()} without a record of its own"


def test_the_record_of_a_signed_parent_is_kept(own):
    parent = own.sign(encoded(seed=1), "png", FACTS)
    signed = own.sign(encoded(), "png", Facts("scenes", 1, 2, parents=(parent,)))
    assert read(signed).facts["parent"] == "image/png with a record of its own"
    with c2pa.Reader("image/png", io.BytesIO(signed)) as reader:
        assert str(2**64 - 1) in reader.json()


def test_a_grid_tells_how_many_images_and_all_photographs(own):
    parents = tuple(encoded("JPEG", seed=seed) for seed in range(3))
    report = read(own.sign(encoded(), "png", Facts("scenes", 1, 2, 12, parents)))
    assert report.state is State.VALID
    assert (report.facts["count"], report.facts["parent"], report.facts["made"]) == ("12", "3 pictures", "created")


def damaged(signed: bytes, place: int, junk: bytes) -> bytes:
    """A signed PNG whose record has other bytes at this place, and a checksum that fits."""
    start = signed.index(b"caBX") + 4
    (length,) = struct.unpack(">I", signed[start - 8 : start - 4])
    record = bytearray(signed[start : start + length])
    record[place : place + len(junk)] = junk
    checksum = struct.pack(">I", zlib.crc32(b"caBX" + record))
    return signed[:start] + record + checksum + signed[start + length + 4 :]


def test_the_damaged_record_of_a_parent_is_left_out(own):
    signed, rng = own.sign(encoded(seed=1), "png", FACTS), np.random.default_rng(1)
    for _ in range(20):
        parent = damaged(signed, int(rng.integers(100, 2000)), rng.bytes(100))
        made = own.sign(encoded(), "png", Facts("scenes", 1, 2, parents=(parent,)))
        assert read(made).state is State.VALID and read(made).facts["made"] == "edited"


def test_a_parent_cannot_make_pictures_large(own):
    """Its record would travel in every one of them."""
    manifest = {**FACTS.manifest("1"), "thumbnail": {"format": "image/jpeg", "identifier": "ballast"}}
    builder = c2pa.Builder(manifest, context=own._context)
    builder.add_resource("ballast", io.BytesIO(bytes(2 << 20)))
    parent = io.BytesIO()
    builder.sign("image/png", io.BytesIO(encoded(seed=1)), parent)
    assert len(parent.getvalue()) > 2 << 20
    signed = own.sign(encoded(), "png", Facts("scenes", 1, 2, parents=(parent.getvalue(),)))
    assert len(signed) < 20_000
    assert read(signed).facts["parent"].endswith("without a record of its own")


def test_nothing_is_fetched_whatever_a_file_names(own):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        builder = c2pa.Builder(FACTS.manifest("1"), context=own._context)
        builder.set_no_embed()
        builder.set_remote_url(f"http://127.0.0.1:{server.server_port}/record")
        elsewhere = io.BytesIO()
        builder.sign("image/png", io.BytesIO(encoded()), elsewhere)
        report = read(elsewhere.getvalue())
        assert report.state is State.NONE and "elsewhere" in report.reason
        assert read(own.sign(encoded(), "png", Facts("m", 1, 2, parents=(elsewhere.getvalue(),)))).state is State.VALID
        assert asked == []
        with pytest.raises(c2pa.C2paError):  # as c2pa is set otherwise, so that this would be seen
            c2pa.Reader("image/png", io.BytesIO(elsewhere.getvalue()))
        assert asked == ["/record"]
        server.shutdown()


def test_threads_share_a_signer(own):
    with ThreadPoolExecutor(4) as pool:
        signed = list(pool.map(lambda i: own.sign(encoded(size=4), "png", Facts("m", 1, i)), range(40)))
    assert [read(picture).facts["index"] for picture in signed] == [str(i) for i in range(40)]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(lambda: ec.generate_private_key(ec.SECP256R1()), id="P-256"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP384R1()), id="P-384"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP521R1()), id="P-521"),
        pytest.param(lambda: rsa.generate_private_key(65537, 2048), id="RSA"),
        pytest.param(ed25519.Ed25519PrivateKey.generate, id="Ed25519"),
    ],
)
def test_an_operators_certificate_signs(tmp_path, key):
    made = key()
    (tmp_path / "c.pem").write_bytes(certificate(made))
    (tmp_path / "k.pem").write_bytes(private(made))
    signer = open_signer(tmp_path / "c.pem", tmp_path / "k.pem")
    report = read(signer.sign(encoded(), "png", FACTS), trust=certificate(made).decode())
    assert report.issuer == "An operator" and signer.root is None and signer.subject == "O=An operator"


@pytest.mark.parametrize("format", ["PKCS8", "TraditionalOpenSSL"])
def test_keys_are_taken_as_openssl_writes_them(format):
    key = p256()
    assert Signer(certificate(key), private(key, format=format)).warning is not None  # of 30 days


def test_a_function_may_sign(own):
    """So a key need not leave its hardware."""
    key = p256()
    signer = Signer(certificate(key, days=365), lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())))
    assert signer.warning is None
    assert read(signer.sign(encoded(), "png", FACTS)).state is State.VALID


def test_hardware_that_is_away_is_an_oserror():
    key, away = p256(), False

    def sign(data: bytes) -> bytes:
        if away:
            raise ConnectionError("no answer")
        return key.sign(data, ec.ECDSA(hashes.SHA256()))

    signer = Signer(certificate(key), sign)
    away = True
    with pytest.raises(OSError, match="cannot be signed"):
        signer.sign(encoded(), "png", FACTS)


def refused(message: str, certificate: bytes, key: object) -> None:
    with pytest.raises(ValueError, match=message):
        Signer(certificate, key, certificate_name="c.pem", key_name="k.pem")  # type: ignore[arg-type]


def test_what_cannot_sign_is_refused_when_the_signer_is_made():
    key, other = p256(), p256()
    refused("k.pem does not belong to the certificate c.pem", certificate(key), private(other))
    wrong = lambda data: other.sign(data, ec.ECDSA(hashes.SHA256()))  # noqa: E731
    refused("with c.pem and k.pem does not count as valid: .*claimSignature.mismatch", certificate(key), wrong)
    refused("c.pem expired on 20", certificate(key, days=-1), private(key))
    refused("k.pem is encrypted", certificate(key), private(key, b"password"))
    refused("k.pem holds no private key", certificate(key), b"nothing")
    refused("k.pem holds no private key", certificate(key), certificate(key))
    refused("c.pem holds no certificate", b"nothing", private(key))
    refused("c.pem holds no certificate", b"", private(key))
    small = rsa.generate_private_key(65537, 1024)
    refused(r"kind RSA \(1024 bits\)", certificate(small), private(small))
    curve = ec.generate_private_key(ec.SECP256K1())
    refused("kind EC", certificate(curve), private(curve))
    refused("c.pem", certificate(key, usage=ExtendedKeyUsageOID.SERVER_AUTH), private(key))


def test_a_certificate_goes_with_its_key(tmp_path):
    with pytest.raises(ValueError, match="certificate was given without its key"):
        open_signer(tmp_path / "c.pem", None)
    with pytest.raises(ValueError, match="key was given without its certificate"):
        open_signer(None, tmp_path / "k.pem")
    with pytest.raises(ValueError, match=r"nowhere\.pem"):
        open_signer(tmp_path / "nowhere.pem", tmp_path / "k.pem")


def test_other_formats_and_parents_are_refused(own):
    with pytest.raises(ValueError, match="png, webp, jpeg, not 'gif'"):
        own.sign(encoded("gif"), "gif", FACTS)
    with pytest.raises(ValueError, match="parent is no image"):
        own.sign(encoded(), "png", Facts("m", 1, 2, parents=(b"nothing",)))
    with pytest.raises(OSError, match="cannot be signed"):
        own.sign(b"nothing", "png", FACTS)


def test_a_large_parent_is_neither_decoded_nor_warned_about(own, recwarn):
    """Of a picture of many pixels nothing but the header is looked at, whatever its record is like."""
    large = bytearray(damaged(own.sign(encoded(seed=1), "png", FACTS), 0, b"junk" * 20))
    large[16:24] = struct.pack(">II", 30_000, 30_000)  # in IHDR
    large[29:33] = struct.pack(">I", zlib.crc32(large[12:29]))
    signed = own.sign(encoded(), "png", Facts("m", 1, 2, parents=(bytes(large),)))
    assert read(signed).facts["parent"] == "image/png without a record of its own"
    assert not recwarn.list
