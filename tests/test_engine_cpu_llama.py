"""Llama's blocks in the CPU engine: every instruction set and dtype against the reference, bitwise independence, large
vocabularies, and weights that are in memory once."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from canvases import alone
from conftest import fill
from cpu_engines import ISAS, KINDS
from llama_blocks import LLAMA, llama, llama_weights

from fastigpt import CheckpointError
from fastigpt.engine.cpu import CpuEngine
from fastigpt.job import Request
from fastigpt.sampling import Drawing, draw
from fastigpt.spec import BlockSpec, ModelSpec

WIDE = replace(LLAMA, width=72, height=3, columns=7, n_tokens=130, head_inner=50)
SHAPES = {
    "few key heads, nothing a multiple of anything": replace(
        WIDE, block=BlockSpec(6, 2, 10, 45, 1e-5, "gated_silu"), prefix_length=19
    ),
    "one key head for nine": replace(WIDE, block=BlockSpec(9, 1, 8, 64, 1e-6, "gated_silu"), head_inner=None),
    "as Janus": replace(WIDE, width=128, block=BlockSpec(2, 2, 64, 176, 1e-6, "gated_silu"), head_inner=128),
    "learned positions": replace(WIDE, block=BlockSpec(4, 2, 5, 33, 1e-5, "gated_silu"), positions="learned"),
    "rotary, one activation": replace(WIDE, block=BlockSpec(4, 4, 6, 33, 1e-5, "quick_gelu")),
    **{
        f"head_dim {dim}": replace(WIDE, n_layer=1, width=96, block=BlockSpec(3, 3, dim, 40, 1e-5, "gated_silu"))
        for dim in (96, 100, 128)
    },
}


# Every instruction set on shapes that have everything, the best one on all.
CASES = [
    pytest.param(spec, isa, *kinds, id=f"{name}-{isa}-{'-'.join(kinds)}")
    for i, (name, spec) in enumerate(SHAPES.items())
    for isa in (ISAS if i < 2 else ISAS[-1:])
    for kinds in KINDS
]


@functools.cache
def scored_by_reference(spec: ModelSpec) -> tuple[torch.Tensor, ...]:
    """tokens, prefix, logits, hidden states after the first block."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, spec.n_tokens, (3, spec.n_positions), generator=generator)
    prefix = torch.randint(0, spec.n_prefix_tokens, (3, spec.prefix_length - 1), generator=generator)
    truth = llama("reference", spec)
    return tokens, prefix, truth.logits(tokens, prefix), truth.hidden(tokens, 1, prefix)


@functools.cache
def weights_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    return llama_weights(spec, 31)


def cpu(spec: ModelSpec, **options: object) -> CpuEngine:
    return CpuEngine(spec, weights_of(spec), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "isa", "dtype", "kv_dtype"), CASES)
def test_scores_agree_with_the_reference(spec, isa, dtype, kv_dtype):
    tokens, prefix, want, hidden = scored_by_reference(spec)
    engine = cpu(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa, threads=2)
    got = engine.logits(tokens, prefix)
    divergence = (want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()
    relative = (got - want).norm() / want.norm()
    if dtype == kv_dtype == "float32":
        assert (got - want).abs().max() <= 1e-4
    elif "int8" not in (dtype, kv_dtype):
        assert relative <= 2e-2 and divergence <= 4e-3
    else:  # logits with a spread of 3, of layers too narrow to average their errors out
        assert relative <= 6e-2 and divergence <= 2e-2
    near = 1e-5 if dtype == kv_dtype == "float32" else 5e-2
    assert (engine.hidden(tokens, 1, prefix) - hidden).norm() <= near * hidden.norm()


@pytest.mark.parametrize(("spec", "isa", "dtype", "kv_dtype"), CASES)
def test_logits_do_not_depend_on_batch_length_or_threads(spec, isa, dtype, kv_dtype):
    tokens, prefix, *_ = scored_by_reference(spec)
    tokens, prefix = tokens.repeat(6, 1), prefix.repeat(6, 1)
    one, three = (cpu(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa, threads=threads) for threads in (1, 3))
    want = one.logits(tokens, prefix)
    assert torch.equal(three.logits(tokens, prefix), want)
    for n, length in ((1, spec.n_positions), (2, 3), (5, spec.n_positions - 1)):
        assert torch.equal(three.logits(tokens[-n:, :length], prefix[-n:]), want[-n:, :length])


@pytest.mark.parametrize(
    ("name", "isa"), [*((name, ISAS[-1]) for name in SHAPES), *((next(iter(SHAPES)), i) for i in ISAS)]
)
def test_greedy_tokens_under_guidance_are_the_references(name, isa):
    spec = SHAPES[name]
    canvases = torch.full((2, spec.n_positions), -1)
    canvases[1, 2:5] = 1
    prompt = torch.randint(0, spec.n_prefix_tokens - 1, (2, spec.prefix_length - 1))
    drawing = Drawing(temperature=0.0, guidance_scale=3.0)
    want = fill(llama("reference", spec), canvases, drawing, prompt=prompt).tokens
    engine = cpu(spec, dtype="float32", isa=isa, threads=2)
    for window in (1, 4):
        assert torch.equal(fill(engine, canvases, drawing, prompt=prompt, window=window).tokens, want)


@pytest.mark.parametrize(("dtype", "kv_dtype"), KINDS)
def test_tokens_depend_neither_on_batch_nor_window_nor_threads(dtype, kv_dtype):
    for spec in list(SHAPES.values())[:3]:
        canvases, prompt = torch.full((9, spec.n_positions), -1), torch.zeros(9, 3, dtype=torch.int64)
        drawing = Drawing(seed=5, top_k=20, guidance_scale=2.0)
        want = None
        for threads in (1, 2):
            engine = cpu(spec, dtype=dtype, kv_dtype=kv_dtype, threads=threads)
            for n, window in ((9, 1), (9, 5), (1, 33), (4, "auto")):
                found = fill(engine, canvases[:n], drawing, prompt=prompt[:n], window=window).tokens
                want = found if want is None else want
                assert torch.equal(found, want[:n]), (threads, n, window)


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(seed=9, guidance_scale=5.0),
        Drawing(seed=9, top_k=2000),
        Drawing(seed=9, top_k=16383, temperature=0.7),
        Drawing(seed=9, top_k=1, guidance_scale=1.5),
        Drawing(seed=9, top_p=0.9, top_k=3000),
    ],
)
def test_vocabularies_of_16384_are_filtered_and_drawn_as_sampling_says(drawing):
    spec = replace(LLAMA, height=2, columns=3, n_tokens=16384)
    engine = cpu(spec, dtype="float32")
    filled = fill(engine, torch.full((4, 6), -1), drawing, prompt=torch.zeros(4, 3, dtype=torch.int64)).tokens
    logits = engine.logits(filled, torch.tensor([[0, 0, 0, 5]] * 4))
    if drawing.guidance_scale is not None:
        without = engine.logits(filled)
        logits = without + drawing.guidance_scale * (logits - without)
    assert torch.equal(filled, draw(logits, torch.arange(4)[:, None], torch.arange(6), drawing))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_longer_prompts_may_come_while_others_are_drawn(kv_dtype):
    """What was read before them moves into a larger cache, that of the negative prompts apart from the other."""
    spec = next(iter(SHAPES.values()))
    engine = cpu(spec, dtype="bfloat16", kv_dtype=kv_dtype, threads=2)
    empty = torch.full((spec.n_positions,), -1)
    prompts = [((5,), None), ((0, 1, 5), (5,)), (tuple(i % 6 for i in range(19)), None), ((2, 5), (3,) * 19)]
    wanted = [
        Request(empty, i, Drawing(seed=i, guidance_scale=None if negative is None else 2.0), prefix, negative)
        for i, (prefix, negative) in enumerate(prompts)
    ]
    expected = [alone(engine, request).tokens[0] for request in wanted]
    forked = alone(engine, replace(wanted[1], index=1)).tokens[0]
    with closing(engine.open(6, window=2)) as session:
        slots = []
        for request in wanted:
            slots += session.add([request])
            session.step(0.0)
        slots += session.fork(slots[1], [1, 1])[1:]
        while any(advance.decided < spec.n_positions for advance in session.step(0.0)):
            pass
        found = session.read(slots).tokens
    assert torch.equal(found, torch.stack([*expected, forked]))


# --- weights in memory --------------------------------------------------------------------------------------------


class MadeWhenAsked(Mapping[str, torch.Tensor]):
    """Weights that are made when asked for, and count how many of the packed ones are alive at a time."""

    def __init__(self, weights: dict[str, torch.Tensor], kept: tuple[str, ...]) -> None:
        self.weights, self.kept, self.alive, self.most = weights, kept, 0, 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, name: str) -> torch.Tensor:
        made = self.weights[name].clone()
        if name not in self.kept:
            self.alive += 1
            weakref.finalize(made, self._gone)
            self.most = max(self.most, self.alive)
        return made

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_packed_weights_are_let_go_one_after_another(dtype, given):
    made = MadeWhenAsked({name: x.to(given) for name, x in weights_of(LLAMA).items()}, ("prefix.embedding",))
    engine = CpuEngine(LLAMA, made, dtype=dtype)
    gc.collect()
    assert made.most <= 2 and made.alive <= 1  # the next is asked for before the last is gone; token.embedding stays
    assert torch.equal(engine.logits(torch.zeros(1, 4, dtype=torch.int64)), from_whole(dtype, given))


def from_whole(dtype: str, given: torch.dtype) -> torch.Tensor:
    """Logits of an engine that was given everything at once, bfloat16 widened."""
    weights = {name: x.to(given).float() for name, x in weights_of(LLAMA).items()}
    return CpuEngine(LLAMA, weights, dtype=dtype).logits(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_embeddings_are_read_where_they_lie_and_outlive_their_owner(given):
    weights = {name: x.to(given) for name, x in weights_of(LLAMA).items()}
    engine = CpuEngine(LLAMA, weights, dtype="bfloat16")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    before = engine.logits(tokens)
    held = weakref.ref(weights["prefix.embedding"].untyped_storage())
    weights["prefix.embedding"].mul_(2)
    assert not torch.equal(engine.logits(tokens), before)
    weights["prefix.embedding"].div_(2)
    assert torch.equal(engine.logits(tokens), before)
    address = weights["prefix.embedding"].data_ptr()
    del weights, held
    gc.collect()
    others = [torch.full((6, 16), 7.0, dtype=given) for _ in range(50)]  # would land on memory that was let go
    assert all(other.data_ptr() != address for other in others)
    assert torch.equal(engine.logits(tokens), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.fc.weight", "prefix.embedding", "head.fc.bias", "rotary"])
def test_bfloat16_weights_that_are_not_finite_are_refused_by_name(bad, name):
    weights = {key: x.to(torch.bfloat16) for key, x in weights_of(LLAMA).items()}
    weights[name].view(-1)[3] = bad
    with pytest.raises(CheckpointError, match=f"{name} holds .* which is not finite"):
        CpuEngine(LLAMA, weights)


def test_int8_takes_rows_of_nearly_nothing_for_zeros():
    weights = {name: x.clone() for name, x in weights_of(LLAMA).items()}
    for factor in (1e-38, 0.0):
        weights["blocks.0.fc.weight"][3] = weights_of(LLAMA)["blocks.0.fc.weight"][3] * factor
        logits = CpuEngine(LLAMA, weights, dtype="int8").logits(torch.zeros(1, 4, dtype=torch.int64))
        assert torch.isfinite(logits).all()
