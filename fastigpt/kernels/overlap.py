"""Launches that overlap: a kernel's blocks are scheduled while the kernel before it still runs, and wait there for it.

That hides the time between one small kernel and the next (programmatic dependent launch, NVIDIA from compute capability
9.0 on). Whether it pays is measured: the row "overlap" of a family's table says so, and only such a table turns it on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastigpt.kernels.launch import Table


@triton.jit
def begin(OVERLAP: tl.constexpr):
    # First statement of a kernel that may overlap. The kernel before has ended, and all it wrote can be seen, when the
    # wait is over. That kernel waited for the one before it, so nothing older can be running either.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap(configs: Table) -> dict[str, bool]:
    """Launch options of a kernel that calls `begin`. A table that does not name it keeps launches apart."""
    rows = configs.get("overlap")
    return {"OVERLAP": True, "launch_pdl": True} if rows and rows[0]["launches"] else {"OVERLAP": False}
