"""The kernels as PyTorch operators, under one name on every device: torch.ops.fastigpt.*

On a GPU they are the Triton kernels, on a CPU PyTorch's own attention and products with the extension's draw;
`nearest_centroid` is the extension's on both. They have fake implementations and declare what they change, so
torch.compile(fullgraph=True) and torch.export take them as they are. Arguments are checked before anything is launched.
Inference only: nothing here has a gradient.

A file for each operator, its plain twin beside it, and for each kernel that is part of one its plain twin:

    causal_attention.py, decode_attention.py, sample_head.py, nearest_centroid.py    the operators
    kv_cache.py      twin of the kernel that appends to a cache, int8 and float8 included
    norm_linear.py   twin of the kernel between attentions: norm, product, bias, activation, residual
    pass_end.py      twin of what the kernel of the sampling head does for windows of canvases

Twins are PyTorch and need no Triton. What they compute stands once: in fastigpt/formulas.py and fastigpt/sampling.py.
"""

from fastigpt.ops.causal_attention import causal_attention
from fastigpt.ops.decode_attention import decode_attention
from fastigpt.ops.nearest_centroid import nearest_centroid
from fastigpt.ops.sample_head import sample_head

__all__ = ["causal_attention", "decode_attention", "nearest_centroid", "sample_head"]
