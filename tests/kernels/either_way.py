"""Kernel tests run twice: on a GPU where there is one (marked gpu), and in Triton's interpreter on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, so it gets processes of its own:
test_interpreter.py starts the files of this folder again that way. Without either, their tests are skipped.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED

if not (GPU or INTERPRETED):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 (test_interpreter.py runs it so)", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh inputs on every run; the seed is printed if a test fails."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator
