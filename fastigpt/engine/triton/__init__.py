"""The GPU engine: Triton kernels driven by CUDA graphs. Positions, tokens and noise counters live on the device.

A pass scores a window of W tokens of each canvas in five launches per layer and one for the head, however many canvases
there are. Each kernel reads how far its canvas has come from the device, so one graph of a few passes serves every row
of every canvas, and nothing has to be bucketed by length. In Triton's interpreter the same code runs on the CPU, with
direct launches where a GPU replays graphs.

weights.py → block.py → cache.py → sequence.py (scoring, prefill) → passes.py (decoding, graphs.py) → batch.py (the
device's side of a session) → draft.py → session.py → engine.py: each imports only those before it.
"""

from fastigpt.engine.triton.engine import TritonEngine

__all__ = ["TritonEngine"]
