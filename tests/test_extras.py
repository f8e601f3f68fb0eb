"""What is missing is named, with a command that works however fastigpt was installed."""

import sys
from pathlib import Path

import pytest

import fastigpt
from fastigpt.extras import require


def test_what_is_there_is_not_asked_for():
    require("numpy", "PIL", for_="drawing")


def test_what_is_missing_is_named_as_pip_knows_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as Python marks a module that must not be found
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^probing needs scikit-learn: pip install scikit-learn$"):
        require("numpy", "sklearn", for_="probing")
    with pytest.raises(ImportError, match=r"needs matplotlib and scikit-learn: pip install matplotlib scikit-learn$"):
        require("matplotlib", "sklearn", for_="probing")


def test_nothing_advises_a_package_index_that_does_not_have_fastigpt():
    """fastigpt is installed from its clone: `pip install 'fastigpt[train]'` finds nothing, or what is not ours."""
    package = Path(fastigpt.__file__).parent
    assert not [str(file) for file in package.rglob("*.py") if "fastigpt[" in file.read_text(encoding="utf-8")]
