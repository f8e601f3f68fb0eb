"""Of the words that a model knows, those are in memory that prompts had; what is drawn is the same."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from llama_blocks import LLAMA, llama_weights

from fastigpt.engine.cpu import CpuEngine
from fastigpt.engine.rows_in_use import RowsInUse
from fastigpt.errors import CheckpointError
from fastigpt.job import Request
from fastigpt.sampling import Drawing
from fastigpt.tensors import Tensors

N_WORDS = 50_000
UNCONDITIONAL = (3, 4, 5)
SPEC = replace(LLAMA, n_prefix_tokens=N_WORDS, prefix_length=6, unconditional=UNCONDITIONAL)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in llama_weights(SPEC).items()}


class Stored(Tensors):
    """The same, with rows of the words that can be read one by one; `read` counts them."""

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        self.read: list[int] = []

        def row(i: int) -> torch.Tensor:
            self.read.append(i)
            return held["prefix.embedding"][i].clone()

        makers = {name: tensor.clone for name, tensor in held.items()}
        super().__init__(makers, {"prefix.embedding": row})


def drawn(engine: CpuEngine, draft: CpuEngine | None = None) -> torch.Tensor:
    canvas = torch.full((SPEC.n_positions,), -1)
    guided = Drawing(seed=1, guidance_scale=2.0)
    requests = [
        Request(canvas, 0, guided, (7, 49_999, 7), negative=(8, 9, 10)),
        Request(canvas, 1, Drawing(seed=1), (0, 11)),
    ]
    session = engine.open(2, window=2, draft=draft)
    slots = session.add(requests)
    while any(advance.decided < SPEC.n_positions for advance in session.step(1.0)):
        pass
    return session.read(slots).tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_images_are_the_same_and_only_their_words_are_read(dtype):
    held = weights(dtype)
    stored = Stored(held)
    engine = CpuEngine(SPEC, stored, dtype="float32")
    assert stored.read == []
    assert torch.equal(drawn(engine), drawn(CpuEngine(SPEC, held, dtype="float32")))
    once = [0, 7, 8, 9, 10, 11, 49_999, *UNCONDITIONAL]
    assert sorted(stored.read) == sorted(once)
    drawn(engine)
    assert len(stored.read) == len(once)


def test_scores_passes_and_drafts_read_theirs():
    held = weights()
    tokens, prefix = torch.randint(SPEC.n_tokens, (2, 12)), torch.tensor([[20, 21], [20, 22]])
    stored = Stored(held)
    engine, whole = CpuEngine(SPEC, stored), CpuEngine(SPEC, held)
    assert torch.equal(engine.logits(tokens, prefix), whole.logits(tokens, prefix))
    assert sorted(stored.read) == [20, 21, 22]
    assert torch.equal(engine.logits(tokens), whole.logits(tokens))
    assert sorted(stored.read) == [3, 4, 5, 20, 21, 22]
    engine.prepared_pass(n=1, position=0)()
    draft = Stored(held)
    assert torch.equal(drawn(engine, CpuEngine(SPEC, draft)), drawn(whole, CpuEngine(SPEC, held)))
    assert {0, 7, 49_999, *UNCONDITIONAL} <= set(draft.read) and len(draft.read) == len(set(draft.read))


def test_words_that_the_model_does_not_have_are_refused_as_ever():
    engine = CpuEngine(SPEC, Stored(weights()))
    canvas = torch.full((SPEC.n_positions,), -1)
    for word in (-1, N_WORDS, 2**40):
        with pytest.raises(ValueError, match="prefix"):
            engine.open(1).add([Request(canvas, 0, Drawing(), (word,))])
        with pytest.raises(ValueError, match="prefix"):
            engine.logits(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[word]]))


def test_words_that_are_not_finite_are_refused_before_any_is_used():
    held = weights()
    held["prefix.embedding"][17, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"prefix\.embedding"):
        CpuEngine(SPEC, Stored(held))


def test_threads_read_each_row_once():
    table = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    read: list[int] = []

    def row(i: int) -> np.ndarray:
        read.append(i)
        return table[i]

    rows = RowsInUse(table.shape, table.dtype, row)
    assert not rows.numbers.any()
    wanted = [[*range(k, 1000, 3), 5, -1, 1000] for k in range(2)]
    threads = [threading.Thread(target=rows.need, args=(ids,)) for ids in wanted * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = sorted({i for ids in wanted for i in ids if 0 <= i < 1000})
    assert sorted(read) == there
    expected = np.zeros_like(table)
    expected[there] = table[there]
    np.testing.assert_array_equal(rows.numbers, expected)


def test_a_row_that_cannot_be_read_is_asked_for_again():
    fails = [True]

    def row(i: int) -> np.ndarray:
        if fails.pop() if fails else False:
            raise CheckpointError("changed")
        return np.full(4, i, np.float32)

    rows = RowsInUse((10, 4), np.dtype(np.float32), row)
    with pytest.raises(CheckpointError):
        rows.need([6])
    rows.need([6])
    assert (rows.numbers[6] == 6).all()
