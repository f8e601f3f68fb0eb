"""Options and machine figures that the benchmarks share."""

from __future__ import annotations

import pytest
import torch

from fastigpt.bench.machine import Machine, measure_machine


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
