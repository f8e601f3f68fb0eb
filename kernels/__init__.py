"""Triton kernels, installed as `fastigpt.kernels`: one file per kernel, launcher beside it."""

if __name__ != "fastigpt.kernels":
    # A top-level module called `kernels` would shadow the package of that name on PyPI.
    raise ImportError("import this package as fastigpt.kernels (install fastigpt first), not as a top-level 'kernels'")
