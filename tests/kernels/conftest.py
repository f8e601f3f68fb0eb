"""Kernel tests run twice: on a GPU where there is one (marked gpu), and in Triton's interpreter on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, so it gets a process of its own:
test_interpreter.py starts this folder again that way. Without either, the tests here are skipped.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
EITHER_WAY = {"test_compile.py", "test_interpreter.py"}  # need neither


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name != "kernels" or item.path.name in EITHER_WAY:
            continue
        if GPU:
            item.add_marker(pytest.mark.gpu)
        elif not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1 (test_interpreter.py runs it so)"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh inputs on every run; the seed is printed if a test fails."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator
