"""Triton kernels: one file per kernel, launcher beside it."""
