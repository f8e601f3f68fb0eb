"""Run by test_fork.py in a process of its own: uses the library, forks in many situations, and uses it in the children.

Prints a line for every situation and exits with the number of those that went wrong. A child that hangs is ended by an
alarm.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import numpy as np
import torch

import fastigpt
import fastigpt.ops as ops
from fastigpt import _C, ImageGPT, ImageGPTConfig, Palette
from fastigpt.codecs.vq_cpu import CpuVQ
from fastigpt.codecs.vq_networks import VQConfig
from fastigpt.engine.cpu import CpuEngine
from fastigpt.families import image_gpt

PATIENCE = 120  # seconds: nothing here takes one
CONFIG = ImageGPTConfig(n_layer=2, n_head=2, n_embd=32, height=4, width=4, n_colors=33)
rng = np.random.default_rng(0)
POINTS, CENTROIDS = rng.standard_normal((20_000, 3)).astype("f4"), rng.standard_normal((64, 3)).astype("f4")
PIXELS = rng.integers(0, 256, (100, 400, 3), dtype=np.uint8)
CLUSTERS = rng.uniform(-1, 1, (9, 3))
generator = torch.Generator().manual_seed(0)
Q, K, V = torch.randn(3, 8, 1, 8, 64, generator=generator)
CACHES = torch.randn(2, 8, 8, 1100, 64, generator=generator)  # of a size that several threads share
SLOTS = torch.full((8,), 1000, dtype=torch.int32)
HIDDEN, GAIN, WEIGHT = (
    torch.randn(40, 16, generator=generator),
    torch.ones(16),
    torch.randn(33, 16, generator=generator),
)
INDEX = torch.arange(40)
VQ = VQConfig(base=32, multipliers=(1, 2), res_blocks=1, latent=32, n_codes=20, code_dim=4)
ENTRIES = torch.randn(60, 4, generator=generator)
networks = CpuVQ(
    VQ, {name: torch.randn(shape, generator=generator) / 9 for name, shape in VQ.tensor_shapes().items()}, torch.float32
)

model = ImageGPT.from_config(CONFIG, seed=1, backend="cpu")
model.engine = CpuEngine(image_gpt.spec(CONFIG), image_gpt.canonical(CONFIG, model.weights), threads=3)
palette = Palette(CLUSTERS, value_range=(-1, 1))


def draw(of: ImageGPT = model) -> object:
    return of.sample(4, seed=3, output_type="tokens", progress=False).tolist()


def made_anew() -> object:
    found = ImageGPT.from_config(CONFIG, seed=1, backend="cpu")
    found.engine = CpuEngine(image_gpt.spec(CONFIG), image_gpt.canonical(CONFIG, found.weights), threads=3)
    return draw(found)


USES: dict[str, Callable[[], object]] = {
    "sample": draw,
    "logits": lambda: model.logits(torch.zeros(2, 16, dtype=torch.int64)).tolist(),
    "made anew": made_anew,
    "nearest_centroid": lambda: fastigpt.nearest_centroid(POINTS, CENTROIDS, threads=3).tolist(),
    "Palette.encode": lambda: palette.encode(PIXELS, threads=3).tolist(),
    "decode_attention": lambda: ops.decode_attention(Q, K, V, *CACHES, SLOTS).sum().item(),
    "sample_head": lambda: ops.sample_head(HIDDEN, GAIN, WEIGHT, INDEX, INDEX, 7).tolist(),
    "CpuVQ": lambda: networks.decode(ENTRIES, 10, 6, threads=3).tolist(),
    "read_bandwidth": lambda: len(_C.read_bandwidth(1 << 20, 3, 2)),
}
failures = 0


def child(what: Callable[[], object], expected: object = None, end: Callable[[int], None] = os._exit) -> bool:
    """Whether `what` gave the expected in a forked child, which then ended. end: sys.exit runs all destructors, and
    takes half a second."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        try:
            found = what()
            code = 0 if expected is None or found == expected else 3
        except SystemExit:  # a grandchild that comes by here
            raise
        except BaseException:
            traceback.print_exc()
            code = 4
        end(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        print("a child ended with", status)
    return status == 0


def situation(name: str, right: bool) -> None:
    global failures
    failures += not right
    print("ok   " if right else "WRONG", name, flush=True)


def everything() -> object:
    return [use() for use in USES.values()]


def in_threads() -> object:
    """All at once: the first threads of a child must agree on who starts its pools."""
    found: dict[str, object] = {}
    threads = [threading.Thread(target=lambda n=n, u=u: found.__setitem__(n, u())) for n, u in USES.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in USES]


def grandchild() -> object:
    assert child(everything, expected) and everything() == expected and child(everything, expected, end=sys.exit)
    return expected


def dropped() -> object:
    """Destructors in the child."""
    global model, palette
    del model, palette
    gc.collect()
    return None


def while_busy(uses: list[Callable[[], object]], what: Callable[[], object], result: object, children: int) -> bool:
    """Children of a process whose other threads are in the middle of something: at whatever place, mutexes held."""
    stop = threading.Event()

    def work(first: int) -> None:
        for use in itertools.cycle(uses[first:] + uses[:first]):
            use()
            if stop.is_set():
                return

    threads = [threading.Thread(target=work, args=(i * len(uses) // 2,)) for i in range(2)]
    for thread in threads:
        thread.start()
    right = all(child(what, result) for _ in range(children))
    stop.set()
    for thread in threads:
        thread.join()
    return right


def streams() -> bool:
    """A stream of the parent: refused in the child, dropped there, and unharmed here."""
    stream = model.stream(2, seed=1)
    next(stream)

    def reads() -> object:
        try:
            next(stream)
        except RuntimeError as error:
            stream.close()
            return "forked child" in str(error)
        return False

    return child(reads, True) and len(list(stream)) > 0


situation("nothing used before", child(everything))
expected = everything()
EXPECTED = dict(zip(USES, expected))
situation("just ends", child(lambda: None, end=sys.exit))
situation("all", child(everything, expected, end=sys.exit))
situation("all at once", child(in_threads, expected, end=sys.exit))
situation("grandchildren", child(grandchild, expected))
situation("many children", all(child(draw, EXPECTED["sample"]) for _ in range(20)))
situation("objects dropped", child(dropped, end=sys.exit))
situation("while other threads use everything", while_busy(list(USES.values()), everything, expected, 10))
building = [lambda: Palette(CLUSTERS, value_range=(-1, 1)).encode(PIXELS[:1]), lambda: palette.encode(PIXELS[:1])]
palette = Palette(CLUSTERS, value_range=(-1, 1))  # its table is not there yet
situation("a table half built", while_busy(building, USES["Palette.encode"], EXPECTED["Palette.encode"], 3))
situation("streams", streams())
situation("the parent afterwards", everything() == expected)
sys.exit(failures)
