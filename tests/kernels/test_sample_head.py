"""The sampling head equals its plain twin: the noise contract bit for bit, filters with ties, windows, known tokens."""

import copy

import pytest
import torch
from either_way import device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.engine import Drawing
from fastigpt.kernels.launch import table
from fastigpt.kernels.sample_head import (
    Head,
    State,
    head_logits_reference,
    make_scratch,
    sample_head,
    sample_head_reference,
    set_drawing,
)
from fastigpt.sampling import draw, filter_logits, guide, gumbel_noise

CONFIGS = {**table("default"), "sample_head": [{"block_c": 16, "block_k": 16, "warps": 4}]}


def decisions(head, state, x, window, drawing):
    """int64 [n, 2 W − 1]: every draw that a pass could keep or guess from these hidden states."""
    n = len(state.index)
    logits = head_logits_reference(x, head).view(-1, n, window, len(head.weight))
    mixed = logits[0] if drawing.guidance_scale is None else guide(logits[0], logits[1], drawing.guidance_scale)
    pixels = state.position[:, None] + torch.arange(2 * window - 1, device=x.device)
    index = state.index[:, None]
    drawn = draw(mixed, index, pixels[:, :window], drawing)
    behind = filter_logits(mixed[:, -1:], drawing)
    if drawing.temperature > 0:
        behind = behind + gumbel_noise(drawing.seed, index, pixels[:, window:], len(head.weight))
    return torch.cat([drawn, behind.argmax(-1).expand(n, window - 1)], 1)


def make(generator, device, n, window, drawing, **options):
    """What `attempt` makes, drawn anew until rounding decides nothing: kernel and twin add in another order, and in
    float16 the kernel rounds its operands, so of two colours that are as good as equal each may take another. Hidden
    states that are moved by some twenty times as much must lead to the same draws."""
    moved = 2e-2 if options.get("dtype") == torch.float16 else 3e-5
    while True:
        head, state, x, inputs = attempt(generator, device, n, window, drawing, **options)
        wanted = decisions(head, state, x, window, drawing)
        noise = [1 + moved * torch.randn(x.shape, generator=generator).to(device) for _ in range(4)]
        if all(torch.equal(decisions(head, state, x * factor, window, drawing), wanted) for factor in noise):
            return head, state, x, inputs


def attempt(generator, device, n, window, drawing, n_colors=37, width=24, n_pixels=20, start=None, dtype=torch.float32):
    """A head, a state in the middle of a job, and inputs of which some are right guesses."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(device)

    head = Head(normal(width).to(dtype), normal(n_colors, width).to(dtype) / 2, normal(n_colors + 1, width).to(dtype),
                normal(n_pixels, width).to(dtype), 1e-5)  # fmt: skip
    lanes = n if drawing.guidance_scale is None else 2 * n
    position = integers(0, n_pixels, n) if start is None else torch.tensor(start, device=device)
    canvas = torch.where(integers(0, 3, n, n_pixels) == 0, integers(0, n_colors, n, n_pixels), -1)
    offset = integers(0, 3, lanes).int()
    slots = torch.where(position < n_pixels, position, -1).repeat(lanes // n).int()
    state = State(
        canvas.int(), torch.zeros(n, n_pixels, dtype=torch.int8, device=device), position.int(),
        slots - offset * (slots >= 0), offset, integers(0, 2**40, n),
        torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(3, device=device),
    )  # fmt: skip
    set_drawing(state.integers, state.numbers, drawing, n_colors)
    return head, state, normal(lanes * window, width), integers(0, n_colors, n, window).int()


def run_both(head, state, x, inputs, drawing):
    twin = copy.deepcopy((x, inputs, state))
    n, window = inputs.shape
    # Half of the guesses are made right, so that windows of every length are kept.
    peek = copy.deepcopy((x, inputs, state))
    sample_head_reference(*peek[:2], head, peek[2], drawing)
    drawn = peek[2].canvas
    for b in range(0, n, 2):
        for j in range(1, window):
            pixel = int(state.position[b]) + j - 1
            if pixel < drawn.shape[1] and drawn[b, pixel] >= 0:
                inputs[b, j] = twin[1][b, j] = drawn[b, pixel]
    scratch = make_scratch(n, window, head.weight.shape[0], x.device)
    for memory in (scratch.scores, scratch.noise):
        memory.fill_(float("nan"))
    scratch.chosen.fill_(-7)
    sample_head(x, inputs, head, state, scratch, drawing, configs=CONFIGS)
    sample_head_reference(*twin[:2], head, twin[2], drawing)
    assert not scratch.arrivals.any()
    return twin


def same(x, inputs, state, twin):
    for name in ("canvas", "pass_starts", "position", "slots"):
        assert torch.equal(getattr(state, name), getattr(twin[2], name)), name
    torch.testing.assert_close(x, twin[0])
    live = state.position < state.canvas.shape[1]
    ends = (state.position[:, None] + torch.arange(inputs.shape[1], device=x.device)) <= state.canvas.shape[1]
    wanted = live[:, None] & ends  # inputs past the last pixel mean nothing
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
    same(x, inputs, state, run_both(head, state, x, inputs, drawing))


def test_windows_wider_than_a_chunk_of_rows(generator, device):
    drawing = Drawing(seed=3, top_k=9)
    head, state, x, inputs = make(generator, device, 2, 20, drawing, n_pixels=50)
    same(x, inputs, state, run_both(head, state, x, inputs, drawing))


@pytest.mark.parametrize("window", [1, 4])
def test_images_end_at_the_last_pixel_and_stay_there(generator, device, window):
    drawing = Drawing(seed=4)
    head, state, x, inputs = make(generator, device, 4, window, drawing, start=[19, 18, 20, 5])
    before = state.canvas[2].clone()
    twin = run_both(head, state, x, inputs, drawing)
    same(x, inputs, state, twin)
    assert state.position[0] == 20 and state.slots[0] == -1
    assert state.position[2] == 20 and torch.equal(state.canvas[2], before) and not state.pass_starts[2].any()


def draw_from(scores, drawing, index, position):
    """The kernel's draws from given scores [n, colours]: hidden states and a head made so that logits = scores."""
    n, n_colors = scores.shape
    width = max(n, 16)
    x = torch.eye(n, width, device=scores.device)
    weight = torch.zeros(n_colors, width, device=scores.device)
    weight[:, :n] = scores.T / width**0.5  # the norm of a unit vector multiplies by √width
    ones = torch.ones(width, device=scores.device)
    head = Head(ones, weight, weight, weight, 0.0)
    canvas = torch.full((n, int(position.max()) + 1), -1, dtype=torch.int32, device=scores.device)
    zeros = torch.zeros(n, dtype=torch.int32, device=scores.device)
    integers, numbers = torch.zeros(2, dtype=torch.int64), torch.zeros(3)
    state = State(
        canvas, canvas.to(torch.int8), position.int(), zeros, zeros, index, integers.to(x.device), numbers.to(x.device)
    )
    set_drawing(state.integers, state.numbers, drawing, n_colors)
    scratch = make_scratch(n, 1, n_colors, scores.device)
    inputs = torch.zeros((n, 1), dtype=torch.int32, device=scores.device)
    sample_head(x, inputs, head, state, scratch, drawing, configs=table("default"), advance=False)
    return scratch.chosen[:, 0], scratch.noise[0][:n, :n_colors]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_noise_equals_the_contract_bit_for_bit(device, seed):
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**62 + 3], device=device)
    position = torch.tensor([0, 1, 1023, 4095, 7], device=device)
    _, noise = draw_from(torch.zeros(5, 512, device=device), Drawing(seed=seed), index, position)
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
        tokens, _ = draw_from(scores, drawing, index, position)
        assert torch.equal(tokens.long(), draw(scores, index, position, drawing)), drawing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_may_be_half_precision(generator, device, dtype):
    drawing = Drawing(temperature=0.0)
    head, state, x, inputs = make(generator, device, 3, 1, drawing, dtype=dtype)
    same(x, inputs, state, run_both(head, state, x, inputs, drawing))
