"""Packages that a part of fastigpt needs and a plain install does not bring."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Where pip knows a module by another name.
_PACKAGES = {
    "c2pa": "c2pa-python",
    "multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
    "sklearn": "scikit-learn",
}


def require(*modules: str, for_: str) -> None:
    """Raises ImportError if one of the modules is missing, saying what `for_` (the subject of the sentence: "probing")
    needs and a command that installs it, however fastigpt itself was installed. Imports nothing."""
    missing = [_PACKAGES.get(module, module) for module in modules if not _there(module)]
    if missing:
        raise ImportError(f"{for_} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _there(module: str) -> bool:
    if module in sys.modules:  # None: it must not be found
        return sys.modules[module] is not None
    return find_spec(module) is not None
