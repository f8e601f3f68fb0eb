"""Every launch of the engine compiles for a real GPU on a machine that has none, from the arguments it really has.

test_compile.py names argument types by hand. Here Triton's driver is replaced by one that compiles what is launched for
a GPU we name and then runs nothing, so that everything the launchers decide and Triton specialises on (an argument of
1, an address or a stride that is no multiple of 16, a head dim that must be padded) is what a GPU would get, and what
needs too much shared memory is refused as there.
"""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import random_weights
from llama_blocks import llama_weights

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastigpt.engine.triton import TritonEngine
from fastigpt.engine.triton.batch import Batch
from fastigpt.engine.triton.graphs import launching
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.job import Request
from fastigpt.kernels import launch
from fastigpt.kernels.causal_attention import causal_attention
from fastigpt.sampling import Drawing
from fastigpt.spec import BlockSpec, ModelSpec

if launch.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

SHARED = {90: 232448, 86: 101376, 89: 1024}  # bytes of shared memory a block may have; of 89 a made-up one


class Compiling:
    """As much of a Triton driver as a launch needs."""

    runs: ClassVar[
        list[str]
    ] = []  # launches since the last was made: compiled kernels are kept, with the driver they began with

    def __init__(self, arch: int) -> None:
        self.target, self.launched = GPUTarget("cuda", arch, 32), []
        self.runs.clear()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED[arch]},
            load_binary=lambda *about: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        self.launched.append(source.fn.__name__)

        def run(x, y, z, *arguments):
            self.runs.append(source.fn.__name__)
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"CUDA has no grid {x, y, z}"

        return run


@pytest.fixture
def compiling(monkeypatch):
    """A function that makes the driver compile for an architecture and nothing run."""
    monkeypatch.setattr(launch, "why_unavailable", lambda device: None)

    def start(arch: int) -> Compiling:
        fake = Compiling(arch)
        monkeypatch.setattr(driver, "_active", fake)  # reset_active() would ask for a driver that is not there
        return fake

    return start


def one_pass(config, n, window, known=0, drawing=None, score=False, **options):
    """The launches of a session's start and of one pass of it: n canvases of which half share what they know. config:
    of an Image GPT, or a spec of Llama's blocks."""
    drawing = drawing or Drawing()
    if isinstance(config, ModelSpec):
        spec, weights = config, llama_weights(config, biases=False)
    else:
        spec, weights = image_gpt.spec(config), image_gpt.canonical(config, random_weights(config))
    model = TritonEngine(spec, weights, device="cpu", **options).model
    tokens = torch.full((n, spec.n_positions), -1)
    tokens[:, :known] = 1
    tokens[n // 2 :, :known] = torch.arange(n - n // 2)[:, None]
    prefix = spec.unconditional
    negative = None if drawing.guidance_scale is None else prefix
    asked = [Request(row, i, drawing, prefix, negative, score=score) for i, row in enumerate(tokens)]
    with launching(model.device):
        batch = Batch(model, n)
        batch.place(range(n), asked, [spec.n_positions] * n)
        batch.passes_of(window).enter(None, torch.ones(n, dtype=torch.bool))
        batch.passes_of(window).one_pass(batch.kind)
    return batch


def shape(n_embd, n_head):
    return ImageGPTConfig(n_layer=1, n_head=n_head, n_embd=n_embd, height=8, width=8)


def test_small_models_compile(compiling):
    """Head dim 8, less than a matrix product takes, an odd width, one image: what is 1 becomes a constant."""
    fake = compiling(90)
    one_pass(shape(24, 3), 1, 1, known=3, dtype=torch.bfloat16, configs="sm90")
    assert {"_norm_linear", "_decode_attention", "_append_kv", "_sample_head"} <= set(fake.launched)


@pytest.mark.slow
def test_shared_prefixes_and_large_vocabularies_compile(compiling):
    """Filters take a launch of their own."""
    fake = compiling(90)
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=32, height=8, width=16, n_colors=16384)
    drawing = Drawing(top_k=2000, top_p=0.9, guidance_scale=2.0)
    batch = one_pass(config, 4, 2, 100, drawing, score=True, dtype=torch.bfloat16, configs="sm90")
    assert batch.shared and {"_prefix_attention", "choose_rows"} <= set(fake.launched)


def llama(head_dim, n_head, n_kv_head, head_inner=None, n_tokens=64):
    return ModelSpec(
        n_layer=1, width=512, block=BlockSpec(n_head, n_kv_head, head_dim, 1408, 1e-6, "gated_silu"), height=8,
        columns=8, n_tokens=n_tokens, n_prefix_tokens=9, prefix_length=5, unconditional=(1, 2, 3), positions="rotary",
        head_inner=head_inner,
    )  # fmt: skip


@pytest.mark.slow
def test_llamas_blocks_compile(compiling):
    """With heads that are padded and share their keys, and one canvas: what is 1 becomes a constant."""
    fake = compiling(90)
    one_pass(llama(100, 4, 2, head_inner=96), 1, 1, dtype=torch.bfloat16, configs="sm90")
    # Of a block four kernels, of the head's hidden layer one, and one that makes a prefill's keys.
    assert fake.launched.count("_norm_linear") == 4 + 1 + 1


@pytest.mark.slow
@pytest.mark.parametrize("n, window, known", [(1, 8, 16), (64, 1, 0), (16, 32, 63)])
@pytest.mark.parametrize("spec", [llama(128, 4, 4, 512, 16384), llama(64, 14, 2), llama(100, 4, 4)])
def test_llamas_of_every_kind_compile(compiling, spec, n, window, known):
    check_llama(compiling, 90, "sm90", torch.bfloat16, spec, n, window, known)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [llama(128, 4, 4, 512, 16384), llama(64, 14, 2), llama(100, 4, 4)])
def test_llamas_compile_in_float32_without_a_table_of_their_own(compiling, spec):
    check_llama(compiling, 86, "default", torch.float32, spec, 1, 8, 16)


def check_llama(compiling, arch, configs, dtype, spec, n, window, known):
    compiling(arch)
    drawing = Drawing(guidance_scale=5.0, top_k=2000 if spec.n_tokens == 16384 else None)
    one_pass(spec, n, window, known, drawing, dtype=dtype, configs=configs)


@pytest.mark.slow
@pytest.mark.parametrize("n, window, kv_dtype, per_layer", [(1, 1, None, 5), (64, 8, None, 7), (1, 1, torch.int8, 6)])
def test_a_pass_is_so_many_launches(compiling, n, window, kv_dtype, per_layer):
    """Nothing that tokens are drawn from is left to cuBLAS, however many rows there are; the norm of many rows is a
    launch of its own. benchmarks/results/gpu.md."""
    fake = compiling(90)
    config = ImageGPTConfig(n_layer=2, n_head=1, n_embd=16, height=8, width=8)
    one_pass(config, n, window, dtype=torch.bfloat16, kv_dtype=kv_dtype, configs="sm90")
    assert len(fake.runs) == 2 * per_layer + 1


def test_many_short_sequences_are_a_grid(compiling):
    compiling(90)
    q, k, v = torch.empty(9000, 2, 3, 8, 16, dtype=torch.bfloat16).unbind(2)
    causal_attention(q, k, v, configs=launch.table("sm90"))


@pytest.mark.slow
@pytest.mark.parametrize("n, window, known", [(1, 1, 0), (1, 8, 16), (64, 1, 0), (16, 32, 63)])
@pytest.mark.parametrize("n_embd, n_head", [(512, 8), (1536, 16)])
@pytest.mark.parametrize("arch, configs, dtype", [(90, "sm90", torch.bfloat16), (86, "default", torch.float32)])
def test_presets_compile(compiling, arch, configs, dtype, n_embd, n_head, n, window, known):
    compiling(arch)
    one_pass(shape(n_embd, n_head), n, window, known, dtype=dtype, configs=configs)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_caches_and_filters_compile(compiling, kv_dtype):
    compiling(90)
    drawing = Drawing(top_k=5, top_p=0.5, guidance_scale=2.0)
    one_pass(shape(512, 8), 4, 8, 63, drawing, dtype=torch.bfloat16, kv_dtype=kv_dtype, configs="sm90")


def test_what_does_not_fit_is_refused(compiling):
    from triton.runtime.errors import OutOfResources

    compiling(89)
    with pytest.raises(OutOfResources, match="shared memory"):
        one_pass(shape(24, 3), 1, 1, dtype=torch.bfloat16)
