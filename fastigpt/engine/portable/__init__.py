"""The engine for any torch device: a static key-value cache and scaled_dot_product_attention, driven from Python.

Where nothing better runs it does the work, and it is the honest baseline of the engines that are better.

    blocks.py    the model's formula, once: prefill, scoring and decoding are its `step` with windows of other widths
    reader.py    what one model has read of a session's canvases: the rows of a static cache
    canvases.py  how far canvases are, as tensors with a row for each
    session.py   slots, passes, guesses
    engine.py    the engine
"""

from fastigpt.engine.portable.engine import PortableEngine

__all__ = ["PortableEngine"]
