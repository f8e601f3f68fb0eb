"""Triton kernels: one file per kernel, launcher beside it. Their plain twins are in fastigpt/ops."""
