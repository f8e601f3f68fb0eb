"""A dry run: every stage and every file of the acceptance run on a machine without a GPU, on the stand-in, with sizes
that Triton's interpreter can bear. Its figures mean nothing; that there are figures does."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

FAMILY = "sm90"  # of the stand-in
_VARIABLE = "ACCEPTANCE_DRY_RUN"
_CONFIGS = "configs"
_FOREVER = 1e6  # seconds


def dry() -> bool:
    return os.environ.get(_VARIABLE) == "1"


def begin() -> None:
    """From here on, and in all processes that are started."""
    os.environ.update({_VARIABLE: "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def prepared_folder(site: Path) -> Path:
    """Of the launch configurations: the package's own, or for a dry run a copy that it may change."""
    from fastigpt.kernels import launch

    if not dry():
        return launch.FOLDER
    return Path(shutil.copytree(launch.FOLDER, site / _CONFIGS))


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """In a dry run the stand-in, and small sizes of everything that is measured; else nothing."""
    if not dry():
        yield
        return
    import bench_causal_attention
    import bench_decode_attention
    import bench_norm_linear
    import bench_sample_head
    import torch
    import tune

    import fastigpt
    from benchmarks.acceptance import engines, kernels, parity, peers, stand_in
    from fastigpt import ImageGPT, ImageGPTConfig
    from fastigpt.bench import machine, timing
    from fastigpt.engine import window
    from fastigpt.engine.triton import passes
    from fastigpt.kernels import launch

    tiny = ImageGPTConfig(n_layer=1, n_head=1, n_embd=16, height=2, width=4, n_colors=16)

    def bundled(device: str = "cuda", **options: object) -> ImageGPT:
        return ImageGPT.from_config(tiny, device=device, **options)  # type: ignore[arg-type]

    heads = {"small": (2, 16), "large": (1, 24), "medium": (1, 32)}
    small = {
        engines: {"PRESETS": {"small": {1: 1, 64: 1, 512: 2}, "large": {1: 1, 64: 1}}, "RESULTS": 2, "BUNDLED": (1,),
                  "CHECKED": 1},
        kernels: {"PIXELS": 1 << 12, "TUNING": _FOREVER},
        parity: {"CHECKING": _FOREVER},
        peers: {"SECONDS": _FOREVER},
        timing: {"repeat": _once},
        bench_decode_attention: {"KEYS": 32, "SHAPES": heads, "IMAGES": {1: 1, 64: 2}, "WINDOWS": (4,)},
        bench_causal_attention: {"BATCH": 2, "LENGTH": 32, "SHAPES": heads},
        bench_norm_linear: {"WIDTHS": {"small": 32, "large": 48}, "ROWS": (1, 8, 64, 128), "FEW_ROWS": (1,)},
        bench_sample_head: {"SIZES": ((1, 1, 16), (2, 4, 16), (1, 1, 1024)), "N_POSITIONS": 16},
        tune: {"WIDTHS": (32,), "CROSSING": (2, 4), "IMAGES": (1, 2, 3), "HEADS": ((2, 16), (1, 24)),
               "SEQUENCES": (1, 32, 2), "STEP": 4, "MOST": 2, "MANY": 2, "repeat": _once},
        machine: {"_CUDA_SIDE": 128, "_CUDA_BYTES": 1 << 20, "repeat": _once},
        window: {"WIDTHS": (1, 2)},
        passes: {"AT_ONCE": 2},
        launch: {"FOLDER": Path(os.environ["ACCEPTANCE_SITE"]) / _CONFIGS},
        fastigpt: {"load": bundled},
        ImageGPTConfig: {"preset": lambda name: tiny},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, values in small.items():
            for name, value in values.items():
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(stand_in.gpu())
        yield


def _once(work: Callable[[], object], device: object, repeats: int, inner: int = 1) -> list[float]:
    """In place of `repeat`."""
    from fastigpt.bench.timing import timed

    return [timed(work, "cuda")[1]]
