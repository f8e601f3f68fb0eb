"""One signer for all tests here, its certificates in a folder of their own, and pictures to sign."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastigpt.provenance.signer import Signer


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.own(tmp_path_factory.mktemp("data") / "c2pa")


@pytest.fixture(scope="session")
def root(own: Signer) -> str:
    assert isinstance(own.root, Path)
    return own.root.read_text()


def encoded(format: str = "png", size: int = 32, seed: int = 0, **how: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **how)
    return file.getvalue()


def pixels(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"))
