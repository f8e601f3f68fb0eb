"""Launches that overlap: a kernel's blocks are scheduled while those before it still run, and wait there for them.

That hides the time between one small kernel and the next, and what a kernel reads before the wait: weights, which no
kernel of a pass writes (programmatic dependent launch, NVIDIA from compute capability 9.0 on). Whether it pays is
measured: the row "overlap" of a family's table says so, and only such a table turns it on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastigpt.kernels.launch import Table


@triton.jit
def begin(OVERLAP: tl.constexpr):
    # The wait of a kernel that may overlap. What stands before it may read what was there before the pass (weights,
    # gains, biases) and write nothing. When it is over, the kernel before has ended and all it wrote can be seen; that
    # kernel waited for the one before it, so nothing older can be running either. The next kernel may be scheduled
    # from here on: its blocks wait as well, and take no room from blocks of this one, which all have theirs by then.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlap(configs: Table) -> dict[str, bool]:
    """Launch options of a kernel that calls `begin`. A table that does not name it keeps launches apart."""
    rows = configs.get("overlap")
    return {"OVERLAP": True, "launch_pdl": True} if rows and rows[0]["launches"] else {"OVERLAP": False}
