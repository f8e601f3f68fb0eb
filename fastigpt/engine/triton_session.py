"""One shape of job on the GPU: its caches and buffers, the launches of a pass, the graphs made of them, and the loop
that replays those until every image is full."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Drawing, Filled, Job, OnRow
from fastigpt.engine.window import WIDTHS, WindowTuner
from fastigpt.kernels.decode_attention import Prefix, decode_attention, make_prefix, part_scratch
from fastigpt.kernels.kv_cache import append_kv
from fastigpt.kernels.launch import SCALED_TYPES, settings
from fastigpt.kernels.norm_linear import norm_linear, uses_cublas
from fastigpt.kernels.sample_head import State, make_scratch, sample_head, set_drawing

if TYPE_CHECKING:
    from fastigpt.engine.triton import TritonEngine

_GRAIN = 64  # capacities are rounded up to this, so that similar jobs share buffers and graphs


@dataclass(frozen=True)
class Plan:
    """All that buffers and graphs depend on. Jobs with equal plans can take turns in one Session.

    sources: how many neighbouring images share each prefix. prompted: whether prefixes begin with the words of a
    prompt. capacity, prefix_capacity: slots of an image's own cache, and of a source's. steps: the drawing with only
    what changes the kernels, its values 0 or 1.
    """

    sources: tuple[int, ...]
    prompted: bool
    capacity: int
    prefix_capacity: int
    steps: Drawing

    @classmethod
    def of(cls, config: ImageGPTConfig, job: Job) -> Plan:
        counts = torch.unique_consecutive(job.source, return_counts=True)[1]
        known = leading_known(job.tokens)
        own = config.n_pixels - int(known.min())
        shared = int(known[known < config.n_pixels].max()) if bool((known < config.n_pixels).any()) else 0
        words = 0 if job.prompt is None else config.prompt_length
        drawing = job.drawing
        top_k = drawing.top_k if drawing.top_k is not None and drawing.top_k < config.n_colors else None
        top_p = drawing.top_p if drawing.top_p is not None and drawing.top_p < 1.0 else None
        return cls(
            tuple(counts.tolist()),
            job.prompt is not None,
            _rounded(max(1, own)),
            _rounded(shared + words),
            Drawing(0, 1.0, top_k and 1, top_p and 0.5, None if drawing.guidance_scale is None else 1.0),
        )

    @property
    def n(self) -> int:
        return sum(self.sources)

    @property
    def guided(self) -> bool:
        return self.steps.guidance_scale is not None

    @property
    def lane_sources(self) -> list[int]:
        """The prefix of every lane: images with their prompts, then, if guided, the same images without."""
        of_image = [source for source, count in enumerate(self.sources) for _ in range(count)]
        without = [len(self.sources) + source for source in of_image]
        return of_image + without if self.guided else of_image

    def bytes_shared_and_each(self, engine: TritonEngine, window: int) -> tuple[float, float]:
        """Memory in bytes that does not grow with the images, and that each image takes (at its share of a prefix)."""
        config = engine.config
        token = 2 * config.n_layer * config.n_embd * engine.kv_dtype.itemsize
        if engine.kv_dtype in SCALED_TYPES:
            token += 2 * config.n_layer * config.n_head * 4
        lanes = 2 if self.guided else 1
        row = 4 * config.n_embd + (9 * config.n_embd + 3 * config.inner) * engine.dtype.itemsize + 12 * config.n_colors
        each = lanes * (token * (self.capacity + self.prefix_capacity * len(self.sources) / self.n) + 2 * window * row)
        # Scoring and prefill, and what cuBLAS and the captured graphs keep.
        return 256e6, each

    def bytes(self, engine: TritonEngine) -> float:
        shared, each = self.bytes_shared_and_each(engine, max(WIDTHS))
        return shared + self.n * each


@dataclass(frozen=True)
class Shape:
    """What decides which Session can take a job: its plan, and the engine and plan of the draft, if there is one."""

    plan: Plan
    draft: tuple[TritonEngine, Plan] | None

    @classmethod
    def of(cls, config: ImageGPTConfig, job: Job) -> Shape:
        drafting = drafting_job(job)
        draft = None if drafting is None else (drafting[0], Plan.of(drafting[0].config, drafting[1]))
        return cls(Plan.of(config, job), draft)

    def bytes(self, engine: TritonEngine) -> float:
        return self.plan.bytes(engine) + (0 if self.draft is None else self.draft[1].bytes(self.draft[0]))


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Where graphs are captured: torch's default would be one stream for all GPUs, on the first that captured."""
    return torch.cuda.Stream(device)


def _rounded(slots: int) -> int:
    return -(-slots // _GRAIN) * _GRAIN


def leading_known(tokens: torch.Tensor) -> torch.Tensor:
    """int64 [n]: how many tokens at the start of each image are known."""
    return (tokens >= 0).long().cumprod(1).sum(1)


@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [n_layer, n, n_head, capacity, head_dim], and their scales if they are 8-bit."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None

    @classmethod
    def empty(cls, engine: TritonEngine, n: int, capacity: int) -> Cache:
        config = engine.config
        shape = (config.n_layer, n, config.n_head, capacity, config.head_dim)
        k, v = (torch.empty(shape, dtype=engine.kv_dtype, device=engine.device) for _ in range(2))
        if engine.kv_dtype not in SCALED_TYPES:
            return cls(k, v, None, None)
        return cls(k, v, *(torch.empty(shape[:-1], dtype=torch.float32, device=engine.device) for _ in range(2)))

    def layer(self, i: int, images: slice = slice(None)) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if x is None else x[i, images] for x in (self.k, self.v, self.k_scale, self.v_scale))


class Session:
    """Buffers for jobs of one plan, and one Window for each width that was asked for."""

    def __init__(self, engine: TritonEngine, shape: Shape) -> None:
        config, device, plan = engine.config, engine.device, shape.plan
        # Weakly, as the engine holds its idle sessions: without a cycle all memory goes when the last name does.
        self._engine, self.plan = weakref.ref(engine), plan
        self.draft = None if shape.draft is None else Draft(*shape.draft)
        n, lanes = plan.n, len(plan.lane_sources)
        self.cache = Cache.empty(engine, lanes, plan.capacity)
        self.n_sources = len(plan.sources) * (2 if plan.guided else 1)
        self.prefix = Cache.empty(engine, self.n_sources, plan.prefix_capacity) if plan.prefix_capacity else None
        self.prefix_lengths = torch.zeros(self.n_sources, dtype=torch.int32, device=device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.state = State(
            canvas=zeros(n, config.n_pixels), pass_starts=zeros(n, config.n_pixels, dtype=torch.int8),
            position=zeros(n), slots=zeros(lanes), offset=zeros(lanes), index=zeros(n, dtype=torch.int64),
            integers=zeros(2, dtype=torch.int64), numbers=zeros(3, dtype=torch.float32),
        )  # fmt: skip
        self.windows: dict[int, Window] = {}

    @property
    def engine(self) -> TritonEngine:
        engine = self._engine()
        assert engine is not None, "whoever runs a session holds its engine"
        return engine

    def release(self) -> None:
        """Lets go of buffers and graphs. Windows refer to their session and it to them, so that without this the memory
        would wait for the garbage collector."""
        self.windows.clear()
        if self.draft is not None:
            self.draft.session.release()

    # --- the start of a job ------------------------------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        """Sets the state to the start of a job, and prefills its prefixes."""
        config, device, state = self.engine.config, self.engine.device, self.state
        known = leading_known(job.tokens)
        counts = torch.tensor(self.plan.sources, device="cpu")
        firsts = counts.cumsum(0) - counts
        of_image = torch.repeat_interleave(torch.arange(len(firsts), device="cpu"), counts)
        start = known[firsts][of_image]  # where each image's own part begins
        lanes = len(state.slots) // self.plan.n
        state.canvas.copy_(job.tokens)
        state.pass_starts.zero_()
        state.position.copy_(start)
        state.offset.copy_(start.repeat(lanes))
        state.slots.copy_(torch.where(start < config.n_pixels, 0, -1).repeat(lanes))
        state.index.copy_(job.index)
        set_drawing(state.integers, state.numbers, job.drawing, config.n_colors)
        if self.prefix is None:
            return
        words = config.prompt_length if self.plan.prompted else 0
        lengths = torch.where(known[firsts] < config.n_pixels, known[firsts], 0)
        self.prefix_lengths.copy_(torch.cat([lengths + words, lengths] if self.plan.guided else [lengths + words]))
        tokens = job.tokens[firsts].clamp(min=0).to(device)
        prompt = None if job.prompt is None else job.prompt[firsts].to(device)
        self._prefill(tokens, prompt, int(lengths.max()), first_source=0)
        if self.plan.guided:
            self._prefill(tokens, None, int(lengths.max()), first_source=len(firsts))

    def _prefill(self, tokens: torch.Tensor, prompt: torch.Tensor | None, pixels: int, first_source: int) -> None:
        """Keys and values of [words, start, x₀ … x_{pixels−2}] of every source. Shorter ones are padded by what follows
        them, which `prefix_lengths` hides."""
        length = pixels + (0 if prompt is None else prompt.shape[1])
        if length == 0:
            return
        at_once = max(1, 32768 // length)
        for first in range(0, len(tokens), at_once):
            some = slice(first, first + at_once)
            x = self.engine.embed(tokens[some, : max(1, pixels)], None if prompt is None else prompt[some])
            self.engine.sequence(x[:, :length].contiguous(), self.engine.config.n_layer, self, first_source + first)

    def append_prefix(self, layer: int, first_source: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [sources, T, n_head, head_dim] into slots 0 … of these sources' prefixes."""
        assert self.prefix is not None
        slots = torch.zeros(len(k), dtype=torch.int32, device=k.device)
        to_k, to_v, k_scale, v_scale = self.prefix.layer(layer, slice(first_source, first_source + len(k)))
        assert to_k is not None and to_v is not None
        append_kv(k, v, to_k, to_v, slots, k_scale, v_scale)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def fill(self, job: Job, on_row: OnRow | None) -> Filled:
        config = self.engine.config
        self.begin(job)
        if self.draft is not None:
            self.draft.begin(job)
        tuner = WindowTuner(job.window)
        report = Report(self, on_row)
        position = self.state.position.tolist()
        window: Window | None = None
        ahead = 0  # passes that were launched and not yet reported
        while min(position) < config.n_pixels or ahead:
            left = config.n_pixels - min(position) - ahead  # at one token per pass
            if left > 0:
                width = tuner.width()
                if window is None or window.width != width:
                    window = self._switch(window, width)
                passes = self._passes(width, min(position) + ahead)
                report.launch(width, passes, window.runner(passes))
                ahead += passes
            # Nothing is waited for while the device has less than two launches to do; and where every pass decides one
            # token and nobody wants rows, not before the end.
            if report.pending() > 1 or left <= 0:
                if width == 1 and on_row is None and job.window == 1 and left > 0:
                    continue
                before = position
                width_done, passes_done, seconds, position = report.collect()
                ahead -= passes_done
                live = [b for b in range(len(before)) if before[b] < config.n_pixels]
                kept = sum(position[b] - before[b] for b in live) / max(1, len(live) * passes_done)
                tuner.record(width_done, seconds / passes_done, kept)
        report.rows(config.height)
        return Filled(self.state.canvas.long().cpu(), self.state.pass_starts.bool().cpu())

    def rehearsal(self, job: Job, position: int, width: int) -> Callable[[], None]:
        """Runs the same pass each time it is called, at this position of every image, on made-up keys and values."""
        self.begin(job)
        for x in (self.cache.k, self.cache.v, self.cache.k_scale, self.cache.v_scale):
            if x is not None:
                x.copy_(torch.ones((), device=x.device).expand(x.shape))
        self.state.position.fill_(position)
        self.state.slots.fill_(position)
        return self._switch(None, width).runner(1, again=True)

    def _passes(self, width: int, position: int) -> int:
        """How many passes the next launch makes: to the end of a row at one token each, fewer for wide windows."""
        row = self.engine.config.width
        return row - position % row if width == 1 else max(1, row // (2 * width))

    def _switch(self, old: Window | None, width: int) -> Window:
        """The window of this width, its inputs made from the old one's guesses, or at the start of a job from the
        pixels above."""
        if width not in self.windows:
            self.windows[width] = Window(self, width)
        new = self.windows[width]
        state, config = self.state, self.engine.config
        pixel = state.position[:, None].long() + torch.arange(width, device=new.x.device)
        at = (pixel - 1).clamp(0, config.n_pixels - 1)  # input j is the token before pixel j
        known = state.canvas.gather(1, at)
        last = torch.where(pixel[:, :1] > 0, known[:, :1], config.start_token)
        if old is None:
            above = state.canvas.gather(1, (at - config.width).clamp(min=0))
            guess = torch.where(above >= 0, above, last.clamp(max=config.n_colors - 1))
        else:
            guess = old.inputs[:, torch.arange(width, device=new.x.device).clamp(max=old.width - 1)]
        new.inputs.copy_(torch.where(known >= 0, known, guess))
        new.inputs[:, :1] = last
        new.embed()
        return new


class Window:
    """Buffers and launches of passes that score `width` tokens per image."""

    def __init__(self, session: Session, width: int) -> None:
        engine, plan = session.engine, session.plan
        config, device, dtype = engine.config, engine.device, engine.dtype
        self.session, self.width = session, width
        lanes = len(plan.lane_sources)
        rows = lanes * width
        d = config.n_embd

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.lanes, self.rows = lanes, rows
        self.x = empty(rows, d, dtype=torch.float32)
        self.inputs = empty(plan.n, width, dtype=torch.int32)
        # Keys and values go straight into the cache, except where scaling them needs a whole head or cuBLAS made them.
        self.straight = engine.kv_dtype not in SCALED_TYPES and not uses_cublas(rows, engine.configs)
        self.qkv = empty(rows, d if self.straight else 3 * d)
        self.attended = empty(rows, d)
        self.inner = empty(rows, config.inner)
        self.scratch = empty(rows * (d + max(3 * d, config.inner) + config.inner))
        self.sample_scratch = make_scratch(plan.n, width, config.n_colors, device)
        name = "decode_attention_1" if width == 1 else "decode_attention"
        splits = settings(engine.configs, name, lanes * config.n_head, dtype)["splits"]
        arrivals = torch.zeros(lanes * config.n_head, dtype=torch.int32, device=device)
        self.attention_scratch = (*part_scratch(splits, rows, config.n_head, config.head_dim, device), arrivals)
        self.prefixes: list[Prefix | None] = [None] * config.n_layer
        if session.prefix is not None:
            k, v, k_scale, v_scale = session.prefix.layer(0)
            assert k is not None and v is not None
            first = make_prefix(
                k, v, session.prefix_lengths, plan.lane_sources, width, engine.configs, dtype, k_scale, v_scale
            )
            for i in range(config.n_layer):
                parts: dict[str, Any] = dict(zip(("k", "v", "k_scale", "v_scale"), session.prefix.layer(i)))
                self.prefixes[i] = dataclasses.replace(first, **parts)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def engine(self) -> TritonEngine:
        return self.session.engine

    def embed(self) -> None:
        """The first hidden states of `inputs`, where they did not come out of the last pass."""
        state, config, head = self.session.state, self.engine.config, self.engine.head
        pixel = state.position[:, None].long() + torch.arange(self.width, device=self.x.device)
        where = pixel.clamp(max=config.n_pixels - 1)
        x = head.wte[self.inputs.long().clamp(min=0)].float() + head.wpe[where].float()
        self.x.view(-1, *x.shape).copy_(x)

    def one_pass(self) -> None:
        """The launches of one pass: scores the window of every image, keeps what stands, embeds the next inputs."""
        if self.session.draft is not None and self.width > 1:
            self.session.draft.guess(self)
        engine, config, state = self.engine, self.engine.config, self.session.state
        shape = (self.lanes, self.width, config.n_head, config.head_dim)
        shared: dict[str, Any] = {
            "configs": engine.configs,
            "epsilon": config.layer_norm_epsilon,
            "scratch": self.scratch,
        }
        for i, block in enumerate(engine.blocks):
            k, v, k_scale, v_scale = self.session.cache.layer(i)
            assert k is not None and v is not None
            if self.straight:
                norm_linear(
                    self.x, block.qkv, self.qkv, gain=block.ln_1, bias=block.qkv_bias,
                    kv_cache=(k, v), slots=state.slots, window=self.width, **shared,
                )  # fmt: skip
                q = self.qkv.view(shape)
            else:
                norm_linear(self.x, block.qkv, self.qkv, gain=block.ln_1, bias=block.qkv_bias, **shared)
                q, new_k, new_v = self.qkv.view(*shape[:2], 3, *shape[2:]).unbind(2)
                append_kv(new_k, new_v, k, v, state.slots, k_scale, v_scale)
            decode_attention(
                q, k, v, state.slots, configs=engine.configs, k_scale=k_scale, v_scale=v_scale,
                prefix=self.prefixes[i], out=self.attended.view(shape), scratch=self.attention_scratch,
            )  # fmt: skip
            norm_linear(self.attended, block.proj, self.x, bias=block.proj_bias, residual=True, **shared)
            norm_linear(self.x, block.fc, self.inner, gain=block.ln_2, bias=block.fc_bias, gelu=True, **shared)
            norm_linear(self.inner, block.out, self.x, bias=block.out_bias, residual=True, **shared)
        sample_head(
            self.x,
            self.inputs,
            engine.head,
            state,
            self.sample_scratch,
            self.session.plan.steps,
            configs=engine.configs,
        )

    def runner(self, passes: int, *, again: bool = False) -> Callable[[], None]:
        """Runs this many passes: a graph's replay on a GPU, direct launches in the interpreter. again: from where the
        images are now, every time."""
        start = (self.session.state.position.clone(), self.session.state.slots.clone()) if again else None
        if self.engine.device.type != "cuda":
            return lambda: self._run(passes, start)
        if again:
            return functools.partial(self._replay, self._capture(passes, start))
        if passes not in self.graphs:
            self.graphs[passes] = self._capture(passes, None)
        return self.graphs[passes].replay

    def _capture(self, passes: int, start: tuple[torch.Tensor, torch.Tensor] | None) -> torch.cuda.CUDAGraph:
        # Compiling and loading kernels launches them, so it happens before the capture, on a copy of the state that is
        # put back after. Graphs work in the session's buffers and share no pool: what little the capture allocates is
        # the graph's own, and torch refuses a pool whose graphs are all gone while cuBLAS's workspace is still in it.
        if not self.graphs:
            state = self.session.state
            kept = [x.clone() for x in (*vars(state).values(), self.inputs, self.x)]
            state.slots.fill_(-1)  # a warm-up that stores nothing in the caches
            self.one_pass()
            for x, old in zip((*vars(state).values(), self.inputs, self.x), kept):
                x.copy_(old)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(torch.cuda.current_device())
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._run(passes, start)
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()  # a graph knows addresses only: `self` keeps what is there

    @torch.inference_mode()
    def _run(self, passes: int, start: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        if start is not None:
            state = self.session.state
            state.position.copy_(start[0])
            state.slots.copy_(start[1])
            state.canvas.fill_(-1)
        for _ in range(passes):
            self.one_pass()


def drafting_job(job: Job) -> tuple[TritonEngine, Job] | None:
    """The draft's engine and the job as it sees it; None where there is no draft, or nothing to guess."""
    engine = job.draft
    if engine is None or job.window == 1:
        return None
    if engine.name != "triton":
        raise ValueError(f"the triton engine takes drafts from triton engines, not from {engine.name}")
    job = dataclasses.replace(job, draft=None, window=1)
    # A draft that cannot read the prompt guesses without it.
    if job.prompt is not None and engine.config.prompt_length != job.prompt.shape[1]:
        job = dataclasses.replace(job, prompt=None, drawing=dataclasses.replace(job.drawing, guidance_scale=None))
    return cast("TritonEngine", engine), job


class Draft:
    """A smaller model's caches for the same images. It draws a window's guesses one at a time with the same noise."""

    def __init__(self, engine: TritonEngine, plan: Plan) -> None:
        self.engine, self.session = engine, Session(engine, Shape(plan, None))

    def begin(self, job: Job) -> None:
        drafting = drafting_job(job)
        assert drafting is not None
        self.session.begin(drafting[1])

    def guess(self, window: Window) -> None:
        """Replaces the guesses among the window's inputs. Nothing of it visits the host, so it can be captured."""
        decided, mine = window.session.state, self.session.state
        n_pixels = mine.canvas.shape[1]
        mine.canvas.copy_(decided.canvas)
        mine.position.copy_(decided.position)
        position = decided.position.repeat(len(mine.offset) // len(decided.position))
        mine.slots.copy_(torch.where(position < n_pixels, position - mine.offset, -1))
        one = self.session._switch(None, 1)
        # One pass more than there are guesses: where all of them stand, the last has been read as well.
        for _ in range(window.width):
            one.one_pass()
        guessed = decided.position[:, None].long() + torch.arange(window.width - 1, device=mine.canvas.device)
        window.inputs[:, 1:] = mine.canvas.gather(1, guessed.clamp(max=n_pixels - 1))
        window.embed()


class Report:
    """What comes back from the device while it works on: how far the images are, and their finished rows.

    Positions are copied behind every launch, rows on a stream of their own, so that asking waits for a launch that is
    past and never for the one under way.
    """

    def __init__(self, session: Session, on_row: OnRow | None) -> None:
        self.session, self.on_row = session, on_row
        self.reported = 0
        self.on_gpu = session.engine.device.type == "cuda"
        self.side = torch.cuda.Stream(session.engine.device) if self.on_gpu else None
        self.queue: list[tuple[int, int, torch.Tensor, list[torch.cuda.Event]]] = []
        self.seconds: list[float] = []

    def launch(self, width: int, passes: int, run: Callable[[], None]) -> None:
        position = self.session.state.position
        if not self.on_gpu:
            run()
            self.queue.append((width, passes, position.clone(), []))
            return
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        copy = torch.empty(position.shape, dtype=position.dtype, device="cpu", pin_memory=True)
        events[0].record()
        run()
        events[1].record()
        copy.copy_(position, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self.queue.append((width, passes, copy, [*events, done]))

    def pending(self) -> int:
        return len(self.queue)

    def collect(self) -> tuple[int, int, float, list[int]]:
        """Waits for the oldest launch: its width, passes, seconds, and the images' positions after it."""
        width, passes, position, events = self.queue.pop(0)
        seconds = 0.0
        if events:
            events[2].synchronize()
            seconds = events[0].elapsed_time(events[1]) / 1e3
        found = position.tolist()
        if self.on_row is not None:
            self.rows(min(found) // self.session.engine.config.width)
        return width, passes, seconds, found

    def rows(self, done: int) -> None:
        """Hands rows up to `done` to the callback."""
        if self.on_row is None:
            return
        canvas, width = self.session.state.canvas, self.session.engine.config.width
        for row in range(self.reported, done):
            columns = slice(row * width, (row + 1) * width)
            if self.side is None:
                tokens = canvas[:, columns].long()
            else:
                # The launch that finished this row is past, so nothing has to be waited for but the copy itself.
                with torch.cuda.stream(self.side):
                    tokens = canvas[:, columns].long().to("cpu")
            self.reported = row + 1
            self.on_row(range(len(canvas)), row, tokens)
