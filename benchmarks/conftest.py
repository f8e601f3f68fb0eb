"""Options and machine figures that the benchmarks share."""

from __future__ import annotations

import shutil

import pytest
import torch
from baselines.static_cache import StaticCachePeer

from fastigpt import ImageGPT, ImageGPTConfig
from fastigpt.bench.machine import Machine, measure_machine
from fastigpt.families import image_gpt


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="draw whole images with every peer, however slow it is")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def machine(device: torch.device) -> Machine:
    """The limits of this machine, measured anew for every file of benchmarks."""
    return measure_machine(device)


@pytest.fixture(scope="session")
def static_cache(device: torch.device) -> StaticCachePeer:
    """Of the small preset, in bfloat16. Shared, because compiling it takes most of a minute."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    config = ImageGPTConfig.preset("small")
    weights = ImageGPT.from_config(config, backend="reference", device="cpu").weights
    return StaticCachePeer(image_gpt.spec(config), image_gpt.canonical(config, weights), device, torch.bfloat16)
