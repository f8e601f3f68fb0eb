"""What a signed record of its origin costs a picture: milliseconds and bytes, by format and size.

    pytest benchmarks/bench_provenance.py --benchmark-only

Each row's extra_info holds milliseconds per picture (median), bytes of the picture and bytes added. Pictures are noise,
the largest files of their size; encoding them is not counted.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("c2pa")

from fastigpt.provenance.facts import Facts
from fastigpt.provenance.reading import State, read
from fastigpt.provenance.signer import Signer

FACTS = Facts("fastigpt's bundled scenes", 2**64 - 1, 2**63 - 1)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.own(tmp_path_factory.mktemp("data") / "c2pa")


def picture(format: str, size: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def measured(benchmark, signer: Signer, plain: bytes, format: str, facts: Facts) -> None:
    signed = benchmark(signer.sign, plain, format, facts)
    assert read(signed).state is State.VALID
    benchmark.extra_info.update(
        {
            "ms per picture": round(benchmark.stats.stats.median * 1e3, 3),
            "bytes of the picture": len(plain),
            "bytes added": len(signed) - len(plain),
        }
    )


@pytest.mark.parametrize("size", [32, 1024])
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def bench_sign_a_drawn_picture(benchmark, signer, format, size):
    measured(benchmark, signer, picture(format, size), format, FACTS)


@pytest.mark.parametrize("parent", ["plain", "signed"])
def bench_sign_a_completion(benchmark, signer, parent):
    photograph = picture("jpeg", 1024)
    if parent == "signed":
        photograph = signer.sign(photograph, "jpeg", FACTS)
    facts = Facts(FACTS.model, FACTS.seed, FACTS.index, parents=(photograph,))
    measured(benchmark, signer, picture("png", 32), "png", facts)


@pytest.mark.parametrize("size", [32, 1024])
def bench_read_and_check(benchmark, signer, size):
    signed = signer.sign(picture("png", size), "png", FACTS)
    assert benchmark(read, signed).state is State.VALID
    benchmark.extra_info["ms per picture"] = round(benchmark.stats.stats.median * 1e3, 3)


def bench_open_a_signer(benchmark, tmp_path: Path):
    """From certificates that are there, one signature made and read back."""
    Signer.own(tmp_path / "c2pa")
    benchmark(Signer.own, tmp_path / "c2pa")
