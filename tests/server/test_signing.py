"""`fastigpt serve` signs what it draws, and says at the start whether it does."""

from __future__ import annotations

import base64
import importlib.util
import io
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import live
from PIL import Image

from fastigpt.provenance import certificates
from fastigpt.provenance.reading import State, read
from fastigpt.server import signing
from fastigpt.server.service import Drawn, Settings
from fastigpt.server.signing import open_signing


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data directory."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / "data"


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((12, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_pictures_are_signed_with_ones_own_certificate(data):
    sign, told = open_signing(None, None, wanted=True)
    (line,) = told
    root = data / "fastigpt" / "c2pa" / "root.pem"
    assert line.startswith("pictures are signed (C2PA) by CN=fastigpt image signer") and line.endswith(str(root))
    assert sign is not None
    report = read(sign(png(), "png", Drawn("tiny", 5, 6, (png(),))), trust=root.read_text())
    assert report.state is State.TRUSTED and report.facts["made"] == "edited"
    assert (report.facts["model"], report.facts["seed"], report.facts["index"]) == ("tiny", "5", "6")


def test_an_operators_certificate_is_used_and_warned_about(data, monkeypatch):
    open_signing(None, None, wanted=True)
    leaf = data / "fastigpt" / "c2pa" / "leaf.pem"
    monkeypatch.setattr(certificates, "WARN", timedelta(days=4000))
    sign, told = open_signing(leaf, leaf, wanted=True)
    assert sign is not None and "root.pem" not in told[0]
    assert told[1].startswith(f"warning: the certificate {leaf} expires on 20")


def test_without_the_package_the_operator_is_told_and_pictures_are_drawn(data, monkeypatch):
    monkeypatch.setattr(signing, "find_spec", lambda name: None if name == "c2pa" else importlib.util.find_spec(name))
    sign, told = open_signing(None, None, wanted=True)
    assert sign is None and "pip install c2pa-python" in told[0] and "--no-c2pa" in told[0]
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ImportError, match="c2pa-python"):  # asked for by name
        open_signing(data / "c.pem", data / "k.pem", wanted=True)


def test_signing_can_be_switched_off(data):
    assert open_signing(None, None, wanted=False) == (None, ["pictures are not signed"])
    assert not data.exists()
    with pytest.raises(ValueError, match="--no-c2pa"):
        open_signing(data / "c.pem", None, wanted=False)


def test_a_data_directory_that_cannot_be_written_says_what_to_do(data):
    data.write_text("a file")
    with pytest.raises(OSError, match=r"pictures cannot be signed: .*--no-c2pa"):
        open_signing(None, None, wanted=True)


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_answers_of_the_api_are_signed(data, format):
    sign, _ = open_signing(None, None, wanted=True)
    photo = png()
    with live(settings=Settings(sign=sign)) as server:
        client = server.client()
        how: Any = {"output_format": format, "extra_body": {"seed": 3, "first_index": 7}}
        drawn = client.images.generate(prompt="a red house", n=2, **how)
        how["extra_body"]["rows"] = 2
        edited = client.images.edit(image=("p.png", photo), prompt="", **how)
    reports = [read(base64.b64decode(picture.b64_json)) for picture in (*drawn.data, *edited.data)]
    assert {report.state for report in reports} == {State.VALID}
    assert [report.facts["index"] for report in reports] == ["7", "8", "7"]
    assert [report.facts["made"] for report in reports] == ["created", "created", "edited"]
    assert reports[2].facts["parent"] == "image/png without a record of its own"
