"""Whole images: the presets with random weights, the bundled model's accuracy, and its windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.acceptance.building import compile_on_all_cores
from benchmarks.acceptance.results import Results, Rows

COMPILING = 60.0  # most seconds for that
PRESETS = {"small": {1: 1, 64: 64, 512: 512}, "large": {1: 1, 64: 64}}  # images at once, by the number in their name
RESULTS = 64  # of a completion
BUNDLED = (1, 64, 512)  # images at once of the bundled model
CHECKED = 16  # of its images that are held against the reference


def random_weights(spec, device):
    """Weights of the right sizes, made on the device; what is drawn from them is noise, and the time the same."""
    import torch

    return {
        name: torch.ones(shape, device=device)
        if len(shape) == 1
        else torch.randn(shape, device=device).mul_(0.02).bfloat16()
        for name, shape in spec.weight_shapes().items()
    }


def requests(spec, n, tokens=None, seed=0, temperature=1.0):
    """n canvases, empty or as given, that know nothing else."""
    import torch

    from fastigpt.job import Request
    from fastigpt.sampling import Drawing

    tokens = torch.full((n, spec.n_positions), -1) if tokens is None else tokens
    drawing = Drawing(seed=seed, temperature=temperature)
    return [Request(row, i, drawing, spec.unconditional) for i, row in enumerate(tokens)]


def fill(engine, asked, window=1):
    """The canvases, all drawn side by side."""
    from fastigpt.engine import loop

    return loop.run(engine, asked, batch_size=len(asked), window=window)[0]


def floor_seconds(config, n: int, kv_bytes: float, bandwidth: float) -> float:
    """One token per pass: the weights n_pixels times, and every image's cache as it grows."""
    from fastigpt.bench.floor import matrix_parameters
    from fastigpt.families import image_gpt

    weights = 2 * matrix_parameters(image_gpt.spec(config)) * config.n_pixels
    return (weights + n * kv_bytes * config.n_pixels**2 / 2) / bandwidth


def engine(out: Path, rows: Rows) -> None:
    """Whole images: the presets with random weights, then the bundled model with windows."""
    compile_on_all_cores("engine", out, COMPILING)
    import torch

    from fastigpt import ImageGPTConfig
    from fastigpt.bench.floor import kv_bytes_per_token
    from fastigpt.bench.timing import repeat
    from fastigpt.engine.choose import build as build_engine
    from fastigpt.families import image_gpt

    limits, device = Results(out).machine(), torch.device("cuda")

    def make(spec, weights, **options):
        return build_engine(spec, weights, backend="triton", device=device, dtype=torch.bfloat16, **options)

    def whole(name: str, config, made, n: int) -> None:
        images = PRESETS[name][n]
        work = requests(made.spec, images)
        seconds = repeat(lambda: fill(made, work), device, 1)[0]
        floor = floor_seconds(
            config, images, kv_bytes_per_token(image_gpt.spec(config), made.kv_dtype), limits["bandwidth"]
        )
        cache = str(made.kv_dtype).removeprefix("torch.")
        rows.add(work=f"{name} n={n} {cache} cache", seconds=seconds, images_per_second=images / seconds, floor=floor,
                 share_of_floor=floor / seconds)  # fmt: skip

    def completion(made) -> None:
        spec, known = made.spec, made.spec.n_positions // 2
        tokens = torch.full((RESULTS, spec.n_positions), -1)
        tokens[:, :known] = torch.randint(0, spec.n_tokens, (RESULTS, known))
        alone = repeat(partial(fill, made, requests(spec, RESULTS, tokens)), device, 1)[0]
        tokens[:, :known] = tokens[:1, :known]
        shared = repeat(partial(fill, made, requests(spec, RESULTS, tokens)), device, 1)[0]
        rows.add(work="completion, half known, 64 results", seconds=shared, without_sharing=alone,
                 speed_up=alone / shared)  # fmt: skip

    def preset(name: str) -> None:
        config = ImageGPTConfig.preset(name)
        spec = image_gpt.spec(config)
        weights = random_weights(spec, device)
        made = make(spec, weights)
        for n in PRESETS[name]:
            rows.attempt(f"{name} n={n}", partial(whole, name, config, made, n))
        if name == "small":
            rows.attempt("completion", partial(completion, made))
            for kv_dtype in eight_bit_caches():
                eight_bit = partial(make, spec, weights, kv_dtype=kv_dtype)
                rows.attempt(f"{kv_dtype} cache", lambda: whole(name, config, eight_bit(), max(PRESETS[name])))  # noqa: B023

    for name in PRESETS:
        rows.attempt(name, partial(preset, name))
        torch.cuda.empty_cache()  # of that preset's weights and caches
    rows.attempt("bundled model, accuracy", partial(accuracy, rows))
    rows.attempt("bundled model, windows", partial(windows, rows))
    rows.finish()


def eight_bit_caches():
    import torch

    from fastigpt.kernels import launch

    return [torch.int8] + [torch.float8_e4m3fn] * launch.stores_float8(torch.device("cuda"))


def accuracy(rows: Rows) -> None:
    """The bundled model beside the float32 reference: its scores, and how likely that finds what the greedy decoder
    draws, which is what the decode kernels wrote and read."""
    import torch

    import fastigpt

    reference = fastigpt.load(device="cuda", dtype="float32", backend="reference").engine
    for kv_dtype in (torch.bfloat16, *eight_bit_caches()):
        engine = fastigpt.load(device="cuda", dtype="bfloat16", kv_dtype=kv_dtype, backend="triton").engine
        tokens = fill(engine, requests(engine.spec, CHECKED, temperature=0.0)).tokens
        truth = reference.logits(tokens).double().cpu()
        lost = truth.max(-1).values - truth.gather(-1, tokens[..., None])[..., 0]
        figures = {"nats_lost_by_greedy": float(lost.mean()), "most_lost": float(lost.max())}
        if kv_dtype == torch.bfloat16:
            found = engine.logits(tokens).double().cpu()
            figures["relative_l2"] = float((found - truth).norm() / truth.norm())
            p, q = truth.log_softmax(-1), found.log_softmax(-1)
            figures["kl_per_token"] = float((p.exp() * (p - q)).sum(-1).mean())
        rows.add(work=f"bundled model, {str(kv_dtype).removeprefix('torch.')} cache, against the reference", **figures)


def windows(rows: Rows) -> None:
    """Fixed-point sampling of the bundled model, and that the fixed configuration makes it exact."""
    import fastigpt
    from fastigpt.bench.timing import timed
    from fastigpt.engine.triton import TritonEngine
    from fastigpt.families import image_gpt

    model = fastigpt.load(device="cuda", backend="triton")
    spec = model.engine.spec
    fixed = TritonEngine(spec, image_gpt.canonical(model.config, model.weights), device="cuda", configs="fixed")
    one, eight = (fill(fixed, requests(spec, CHECKED, seed=7), window).tokens for window in (1, 8))
    rows.add(work="fixed configuration, window=8", identical_images=float((one == eight).all(1).double().mean()))
    for n in BUNDLED:
        figures = {}
        for window in (1, 8, "auto"):
            work = requests(spec, n, seed=7)
            fill(model.engine, work, window)
            filled, seconds = timed(partial(fill, model.engine, work, window), "cuda")
            figures[window] = (seconds, filled)
            rows.add(
                work=f"bundled model n={n} window={window}", seconds=figures[window][0],
                seconds_window_1=figures[1][0], passes_per_image=float(filled.pass_starts.sum(1).double().mean()),
                identical_images=float((filled.tokens == figures[1][1].tokens).all(1).double().mean()),
            )  # fmt: skip


def compile_engine(share: int, shares: int) -> None:
    """Two layers are enough to launch what any number of them would."""
    import torch

    import fastigpt
    from fastigpt import ImageGPTConfig
    from fastigpt.engine.triton import TritonEngine
    from fastigpt.engine.window import WIDTHS
    from fastigpt.families import image_gpt
    from fastigpt.kernels import launch

    family = launch.family(torch.device("cuda"))
    presets = {name: replace(ImageGPTConfig.preset(name), n_layer=2) for name in PRESETS}
    most = max(PRESETS["small"].values())
    bundled = replace(fastigpt.load(device="cpu", backend="reference").config, n_layer=2)

    def make(config, kv_dtype=torch.bfloat16, configs=family):
        spec = image_gpt.spec(config)
        weights = random_weights(spec, torch.device("cuda"))
        return TritonEngine(spec, weights, device="cuda", dtype=torch.bfloat16, kv_dtype=kv_dtype, configs=configs)

    def a_pass(n: int, window: int, *how) -> None:
        make(*how).prepared_pass(n=n, position=1, window=window)()

    def completion(prefixes: int, config) -> None:
        tokens = torch.full((RESULTS, config.n_pixels), -1)
        tokens[:, : -config.width] = (torch.arange(RESULTS) * prefixes // RESULTS)[:, None]
        made = make(config)
        fill(made, requests(made.spec, RESULTS, tokens))

    def scores(config) -> None:
        make(config).logits(torch.zeros((CHECKED, config.n_pixels), dtype=torch.int64))

    todo: list[Callable[[], None]] = [
        partial(a_pass, n, 1, config) for name, config in presets.items() for n in PRESETS[name].values()
    ]
    todo += [partial(a_pass, most, 1, presets["small"], kv_dtype) for kv_dtype in eight_bit_caches()]
    todo += [partial(completion, prefixes, presets["small"]) for prefixes in (1, RESULTS)]
    todo += [partial(a_pass, n, width, bundled) for n in BUNDLED for width in WIDTHS]
    todo += [partial(a_pass, CHECKED, 1, bundled, kv_dtype) for kv_dtype in (torch.bfloat16, *eight_bit_caches())]
    todo += [partial(a_pass, CHECKED, window, bundled, torch.bfloat16, "fixed") for window in (1, 8)]
    todo += [partial(scores, bundled)]
    for work in todo[share::shares]:
        work()
        torch.cuda.synchronize()
