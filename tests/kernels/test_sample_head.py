"""The sampling head equals its plain twin: the noise contract bit for bit, filters with ties, windows, known tokens."""

import copy
import dataclasses

import pytest
import torch
from either_way import device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastigpt.kernels.canvases import Canvases, Head, Steps
from fastigpt.kernels.launch import table
from fastigpt.kernels.noise import gumbel
from fastigpt.kernels.sample_head import make_scratch, sample_head
from fastigpt.ops.pass_end import decisions_reference, pass_end_reference
from fastigpt.sampling import Drawing, Drawings, draw, gumbel_noise


def configs(block_c=16, block_v=512, chunk=4):
    row = {"block_c": block_c, "block_v": block_v, "chunk": chunk, "block_k": 16, "stages": 1, "warps": 4,
           "early": block_c == 16}  # fmt: skip
    return {**table("default"), "sample_head": [row], "sample_head_float32": [row]}


CONFIGS = configs()


def make(generator, device, n, window, drawings, **options):
    """What `attempt` makes, drawn anew until rounding decides nothing: kernel and twin add in another order, and in
    float16 the kernel rounds its operands, so of two tokens that are as good as equal each may take another. Hidden
    states that are moved by some twenty times as much must lead to the same draws."""
    moved = 2e-2 if options.get("dtype") == torch.float16 else 3e-5
    while True:
        head, state, x, inputs = attempt(generator, device, n, window, drawings, **options)
        wanted, _ = decisions_reference(x, head, state, window)
        noise = [1 + moved * torch.randn(x.shape, generator=generator).to(device) for _ in range(4)]
        if all(torch.equal(decisions_reference(x * factor, head, state, window)[0], wanted) for factor in noise):
            return head, state, x, inputs


def attempt(generator, device, n, window, drawings, n_tokens=37, width=24, n_positions=20, start=None, end=None,
            scored=False, dtype=torch.float32, inner=None):  # fmt: skip
    """A head (with a hidden layer, biases and no positions if `inner` is its width), canvases that are being drawn,
    and inputs of which some are right guesses.
    drawings: one for all, or one for each."""
    drawings = [drawings] * n if isinstance(drawings, Drawing) else drawings

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(device)

    head = Head(normal(width).to(dtype), normal(n_tokens, width).to(dtype) / 2, normal(n_tokens, width).to(dtype),
                normal(n_positions, width).to(dtype), 1e-5)  # fmt: skip
    if inner is not None:
        head = Head(
            normal(width), normal(n_tokens, inner).to(dtype), normal(n_tokens, width).to(dtype), None, 1e-5,
            normal(n_tokens), normal(inner, width).to(dtype) / width**0.5, normal(inner),
        )  # fmt: skip
    guided = torch.tensor([drawing.guidance_scale is not None for drawing in drawings], device=device)
    position = integers(0, n_positions, n) if start is None else torch.tensor(start, device=device)
    ends = torch.full((n,), n_positions, device=device) if end is None else torch.tensor(end, device=device)
    canvas = torch.where(integers(0, 3, n, n_positions) == 0, integers(0, n_tokens, n, n_positions), -1)
    offset = integers(0, 3, 2 * n).int()
    slots = torch.where(position < ends, position, -1).repeat(2).int()
    slots[n:][~guided] = -1
    state = dataclasses.replace(
        Canvases.idle(n, n_positions, device), canvas=canvas.int(), position=position.int(), end=ends.int(),
        slots=slots - offset * (slots >= 0), offset=offset, index=integers(0, 2**40, n), guided=guided.int(),
        scored=torch.full((n,), int(scored), dtype=torch.int32, device=device), drawings=Drawings(drawings, device),
    )  # fmt: skip
    lanes = 2 * n if bool(guided.any()) else n
    return head, state, normal(lanes * window, width), integers(0, n_tokens, n, window).int()


def run_both(head, state, x, inputs, steps, table=CONFIGS, guesses=True):
    n, window = inputs.shape
    # Half of the guesses are made right, so that windows of every length are kept.
    peek = copy.deepcopy((x, inputs, state))
    pass_end_reference(*peek[:2], head, peek[2])
    drawn = peek[2].canvas
    for b in range(0, n, 2) if guesses else ():
        for j in range(1, window):
            position = int(state.position[b]) + j - 1
            if position < drawn.shape[1] and drawn[b, position] >= 0:
                inputs[b, j] = drawn[b, position]
    twin = copy.deepcopy((x, inputs, state))
    scratch = make_scratch(n, window, head, steps, table)
    for memory in vars(scratch).values():
        if memory is not None and memory.is_floating_point():
            memory.fill_(float("nan"))
    scratch.chosen.fill_(-7)
    sample_head(x, inputs, head, state, scratch, steps, configs=table)
    pass_end_reference(*twin[:2], head, twin[2])
    assert not scratch.arrivals.any() and not scratch.broken.any()
    return twin


def same(x, inputs, state, twin):
    for name in ("canvas", "pass_starts", "position", "slots", "failed"):
        assert torch.equal(getattr(state, name), getattr(twin[2], name)), name
    torch.testing.assert_close(state.log_likelihood, twin[2].log_likelihood, atol=1e-4, rtol=1e-5)
    n, n_positions = state.canvas.shape
    live = state.position < state.end
    by_canvas = [values.view(-1, n, *inputs.shape[1:], values.shape[-1])[:, live] for values in (x, twin[0])]
    if len(by_canvas[0]) == 2:  # nobody reads the second lane of a canvas that is not guided
        for values in by_canvas:
            values[1][state.guided[live] == 0] = 0
    torch.testing.assert_close(*by_canvas)
    ends = (state.position[:, None] + torch.arange(inputs.shape[1], device=x.device)) <= n_positions
    wanted = live[:, None] & ends  # inputs past the last position mean nothing
    assert torch.equal(inputs[wanted], twin[1][wanted])


DRAWINGS = [
    Drawing(seed=0),
    Drawing(seed=2**64 - 1, temperature=0.0),
    Drawing(seed=2**63 + 12345, temperature=0.7, top_k=5),
    Drawing(seed=7, temperature=1.3, top_p=0.8),
    Drawing(seed=8, top_k=20, top_p=0.5),
    Drawing(seed=9, guidance_scale=2.5),
    Drawing(seed=10, guidance_scale=0.0, top_p=0.9),
]


@pytest.mark.parametrize(
    "drawing, n, window",
    [(drawing, *size) for drawing in DRAWINGS for size in ((7, 1), (3, 4))]
    + [(DRAWINGS[0], 1, 1), (DRAWINGS[4], 2, 5)],
    ids=str,
)
def test_pass_equals_the_twin(generator, device, drawing, n, window):
    head, state, x, inputs = make(generator, device, n, window, drawing)
    same(x, inputs, state, run_both(head, state, x, inputs, Steps.of([drawing], 37)))


@pytest.mark.parametrize("window", [1, 3])
def test_canvases_drawn_in_different_ways_share_a_launch(generator, device, window):
    """Each as if the others were not there: seeds, temperatures, filters, guidance, none of them."""
    head, state, x, inputs = make(generator, device, len(DRAWINGS), window, DRAWINGS)
    steps = Steps.of(DRAWINGS, 37)
    assert steps == Steps(guided=True, top_k=True, top_p=True)
    same(x, inputs, state, run_both(head, state, x, inputs, steps))


@pytest.mark.parametrize("drawing", [DRAWINGS[0], DRAWINGS[5], DRAWINGS[4]], ids=str)
@pytest.mark.parametrize("n, window, from_rows", [(3, 1, 10**9), (2, 4, 10**9), (2, 4, 1)])
def test_heads_with_a_hidden_layer_equal_the_twin(generator, device, drawing, n, window, from_rows):
    """Also where that layer's product is cuBLAS's; and without positions among the inputs."""
    head, state, x, inputs = make(generator, device, n, window, drawing, inner=29, scored=True)
    steps = dataclasses.replace(Steps.of([drawing], 37), score=True)
    table = {**CONFIGS, "cublas": [{"from_rows": from_rows}]}
    same(x, inputs, state, run_both(head, state, x, inputs, steps, table))


@pytest.mark.parametrize("n_tokens, block_v", [(9, 512), (512, 512), (513, 512), (4096, 1024), (16384, 4096)])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("window", [1, 2])
def test_vocabularies_of_any_size(generator, device, n_tokens, block_v, filtered, window):
    drawing = Drawing(seed=1, top_k=n_tokens // 2, top_p=0.9) if filtered else Drawing(seed=1)
    steps = dataclasses.replace(Steps.of([drawing], n_tokens), score=True)
    head, state, x, inputs = make(generator, device, 2, window, drawing, n_tokens=n_tokens, width=8, scored=True)
    # In the interpreter few and large programs are fastest; a real one has no room for so many columns.
    block_c = 16 if device.type == "cuda" else block_v
    same(x, inputs, state, run_both(head, state, x, inputs, steps, configs(block_c, block_v, chunk=2 * window)))


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("guided", [False, True])
def test_known_tokens_are_scored_as_the_model_itself_finds_them(generator, device, window, guided):
    """At temperature 1 and unfiltered, whatever the drawing says, and only where that was asked for."""
    drawing = Drawing(seed=6, temperature=0.5, top_k=3, guidance_scale=1.5 if guided else None)
    head, state, x, inputs = make(generator, device, 6, window, drawing, start=[0, 4, 8, 3, 19, 20], scored=True)
    state.canvas[:, ::2], state.canvas[4, 19] = 5, -1
    state.scored[3] = 0
    steps = dataclasses.replace(Steps.of([drawing], 37), score=True)
    same(x, inputs, state, run_both(head, state, x, inputs, steps))
    assert (state.log_likelihood[:3] < 0).all() and not state.log_likelihood[3:].any()


@pytest.mark.parametrize("window", [1, 4])
def test_canvases_stop_where_they_are_told(generator, device, window):
    """What is at or behind `end` stays as it is, known or not; a canvas that is there already is idle."""
    head, state, x, inputs = make(generator, device, 3, window, Drawing(seed=4), start=[4, 5, 7], end=[5, 9, 7])
    before = state.canvas.clone()
    twin = run_both(head, state, x, inputs, Steps())
    same(x, inputs, state, twin)
    assert state.position[0] == 5 and state.slots[0] == -1 and state.position[2] == 7
    assert torch.equal(state.canvas[0, 5:], before[0, 5:]) and torch.equal(state.canvas[2], before[2])


def test_logits_that_are_not_finite_are_reported(generator, device):
    head, state, x, inputs = make(generator, device, 4, 1, Drawing(seed=4), start=[3, 4, 20, 5])
    x[1] = x[2] = float("nan")
    x[3] = float("inf")
    sample_head(x, inputs, head, state, make_scratch(4, 1, head, Steps(), CONFIGS), Steps(), configs=CONFIGS)
    assert state.failed.tolist() == [0, 1, 0, 1]  # the third has nothing to draw
    assert state.position.tolist() == [4, 4, 20, 5]
    assert ((state.canvas >= -1) & (state.canvas < 37)).all()


def test_logits_that_only_a_wrong_guess_led_to_do_no_harm(generator, device):
    """Rows behind it may be anything; where all guesses before are right, the canvas stops there."""
    head, state, x, inputs = make(generator, device, 2, 4, Drawing(seed=4), start=[3, 3])
    state.canvas.fill_(-1)
    peek = copy.deepcopy((x, inputs, state))
    pass_end_reference(*peek[:2], head, peek[2])
    x.view(2, 4, -1)[:, 1] = float("inf")  # the row behind the first guess
    inputs[0, 1] = (peek[2].canvas[0, 3] + 1) % 37
    inputs[1, 1] = peek[2].canvas[1, 3]
    twin = run_both(head, state, x, inputs, Steps(), guesses=False)
    assert state.failed.tolist() == twin[2].failed.tolist() == [0, 1] and state.position.tolist() == [4, 4]
    assert torch.equal(state.canvas, twin[2].canvas) and (state.canvas[:, 4:] == -1).all()


def test_windows_wider_than_a_chunk_of_rows(generator, device):
    drawing = Drawing(seed=3, top_k=9)
    head, state, x, inputs = make(generator, device, 2, 20, drawing, n_positions=50)
    same(x, inputs, state, run_both(head, state, x, inputs, Steps(top_k=True)))


@pytest.mark.parametrize("window", [1, 4])
def test_canvases_end_at_the_last_position_and_stay_there(generator, device, window):
    drawing = Drawing(seed=4)
    head, state, x, inputs = make(generator, device, 4, window, drawing, start=[19, 18, 20, 5])
    before = state.canvas[2].clone()
    twin = run_both(head, state, x, inputs, Steps())
    same(x, inputs, state, twin)
    assert state.position[0] == 20 and state.slots[0] == -1
    assert state.position[2] == 20 and torch.equal(state.canvas[2], before) and not state.pass_starts[2].any()


def draw_from(scores, drawing, index, position):
    """The kernel's draws from given scores [n, tokens]: hidden states and a head made so that logits = scores."""
    n, n_tokens = scores.shape
    width = max(n, 16)
    x = torch.eye(n, width, device=scores.device)
    weight = torch.zeros(n_tokens, width, device=scores.device)
    weight[:, :n] = scores.T / width**0.5  # the norm of a unit vector multiplies by √width
    ones = torch.ones(width, device=scores.device)
    head = Head(ones, weight, weight, weight, 0.0)
    idle = Canvases.idle(n, int(position.max()) + 1, scores.device)
    state = dataclasses.replace(
        idle, position=position.int(), end=position.int() + 1, index=index,
        drawings=Drawings([drawing] * n, scores.device),
    )  # fmt: skip
    steps = Steps.of([drawing], n_tokens)
    scratch = make_scratch(n, 1, head, steps, table("default"))
    inputs = torch.zeros((n, 1), dtype=torch.int32, device=scores.device)
    sample_head(x, inputs, head, state, scratch, steps, configs=table("default"), advance=False)
    return scratch.chosen[:, 0]


@triton.jit
def noise_kernel(low, high, index, position, out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    noise = gumbel(
        tl.load(low + r), tl.load(high + r), tl.load(index + r), tl.load(position + r), tl.program_id(0) * C, C
    )
    tl.store(out + r[:, None] * (C * tl.num_programs(0)) + tl.program_id(0) * C + c[None, :], noise)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_noise_equals_the_contract_bit_for_bit(device, seed):
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**62 + 3, 5, 6, 7], device=device)
    position = torch.tensor([0, 1, 1023, 4095, 7, 2**31 - 1, 0, 8], device=device)
    noise = torch.empty(8, 512, device=device)
    seeds = Drawings([Drawing(seed=seed)] * 8, device)
    noise_kernel[(16,)](seeds.seed_low, seeds.seed_high, index, position.int(), noise, 8, 32)
    assert torch.equal(noise, gumbel_noise(seed, index, position, 512))


def test_ties_are_broken_as_the_filters_say(device):
    """Scores with few different values: k-th ties stay, of equal scores top-p removes the lowest token first, and the
    argmax takes the lowest."""
    scores = torch.tensor([[0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0, 2.0]], device=device).repeat(6, 1)
    index, position = torch.arange(6, device=device), torch.arange(6, device=device)
    for drawing in (
        Drawing(temperature=0.0),
        Drawing(seed=1, top_k=3),
        Drawing(seed=2, top_k=1),
        Drawing(seed=3, top_p=0.3),
        Drawing(seed=4, top_p=0.75),
        Drawing(seed=5, top_p=1e-6),
    ):
        tokens = draw_from(scores, drawing, index, position)
        assert torch.equal(tokens.long(), draw(scores, index, position, drawing)), drawing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_may_be_half_precision(generator, device, dtype):
    drawing = Drawing(temperature=0.0)
    head, state, x, inputs = make(generator, device, 3, 1, drawing, dtype=dtype)
    same(x, inputs, state, run_both(head, state, x, inputs, Steps()))
