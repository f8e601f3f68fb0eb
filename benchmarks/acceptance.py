"""The first thing to run on a GPU: builds, tests, tunes, measures, and writes JSON, a Markdown table and plots.

    python -m benchmarks.acceptance --out DIR [--only STAGE ...]

Needs no network and less than nine minutes. Each stage is a process of its own with a time limit, so one that fails or
hangs is recorded and the others still run; rows are written as they are measured, so a stage that is stopped keeps what
it has. A stage that had no time is run by itself with --only, into the same DIR; all but "build" need what it built,
and most the limits found by "machine". DIR holds README.md, results.json, log.txt, the launch configurations that were
chosen and two plots: copy all but the log to benchmarks/results/<gpu>/ and commit it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "baselines")]

LIMIT = 530.0  # seconds for everything
STAGES = {  # name: most seconds it may take, or what is left of LIMIT. The first figures asked for come first.
    "build": 150.0,
    "machine": 30.0,
    "tests": 120.0,
    "tune": 110.0,
    "engine": 190.0,
    "kernels": 90.0,
    "quantize": 20.0,
    "peers": 110.0,
    "memcheck": 60.0,
}
COMPILING = {"tune": 35.0, "engine": 60.0, "kernels": 45.0}  # stages that compile first, and most seconds for that
TARGETS = {  # the figures asked for on an H200 in bf16: what, reach, stretch
    "small n=1, seconds per image": (0.35, 0.15),
    "small n=64, seconds": (0.65, 0.48),
    "small n=512, images/s": (130.0, 160.0),
    "small n=512 float8_e4m3fn cache, images/s": (220.0, 300.0),
    "large n=64, seconds": (3.8, 3.2),
    "completion speed-up by prefix sharing": (1.8, None),
    "nearest centroid, 512 colours, uint8, Gpixel/s": (10.0, None),
}


class Results:
    """DIR/results.json: {stage: rows}, written whole whenever a row is added, so that whoever is stopped loses none."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.json"

    def read(self) -> dict[str, list[dict]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, stage: str) -> list[dict]:
        return self.read().get(stage, [])

    def set(self, stage: str, rows: list[dict]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.read(), stage: rows}, indent=1) + "\n")
        temporary.replace(self.path)

    def machine(self) -> dict:
        """The limits this run is measured against."""
        rows = self.of("machine")
        if not rows:
            raise RuntimeError("the stage 'machine' must run first: every figure stands beside its limits")
        return rows[0]


class Rows:
    """What a stage found, on disk after every row."""

    def __init__(self, out: Path, stage: str) -> None:
        self.out, self.stage, self.results = out, stage, Results(out)
        self.rows: list[dict] = []
        self.failed: list[str] = []
        self.results.set(stage, [])

    def add(self, **row: object) -> None:
        self.rows.append(row)
        self.results.set(self.stage, self.rows)
        print(row, flush=True)

    def attempt(self, work: str, measure: Callable[[], object]) -> None:
        """Runs what adds rows; if it fails that becomes a row, and the rest of the stage still runs."""
        try:
            measure()
        except Exception:
            self.failed.append(traceback.format_exc())
            self.add(work=work, error=self.failed[-1][-1500:])

    def finish(self) -> None:
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} parts of {self.stage} failed:\n" + "\n".join(self.failed))


def compile_on_all_cores(stage: str, out: Path) -> None:
    """Triton compiles for seconds per kernel and keeps the result on disk: processes that each launch a share of a
    stage's kernels leave the stage itself nothing to wait for. What they do not get done it compiles itself."""
    shares = max(1, min(14, (os.cpu_count() or 2) - 1))
    command = [sys.executable, "-m", "benchmarks.acceptance", "--out", str(out), "--compile", stage]
    begun = time.monotonic()
    processes = [subprocess.Popen([*command, "--share", str(i), str(shares)], cwd=ROOT) for i in range(shares)]
    late = 0
    for process in processes:
        try:
            process.wait(timeout=max(0.1, begun + COMPILING[stage] - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    codes = [process.returncode for process in processes]
    print(f"compiled in {time.monotonic() - begun:.1f} s; {late} stopped; exit codes {codes}", flush=True)


# --- stages: each runs in its own process -----------------------------------------------------------------------------


def build(out: Path, rows: Rows) -> None:
    """The extension, and the package where Python finds it: installed, or failing that in place."""
    install = [sys.executable, "-m", "pip", "install", "-q", "-e", ".", "--no-build-isolation", "--no-deps"]
    run = subprocess.run(install, cwd=ROOT, capture_output=True, text=True, check=False)
    rows.add(step="pip install -e .", ok=run.returncode == 0, output=(run.stdout + run.stderr)[-1500:])
    if run.returncode:
        site = Path(os.environ["ACCEPTANCE_SITE"])  # on the path of every later stage
        # setup.py beside no pyproject.toml: an old setuptools refuses that file, and the extension needs none of it.
        for link, target in (
            (site / "fastigpt", ROOT / "fastigpt"),
            (site / "csrc", ROOT / "csrc"),
            (site / "setup.py", ROOT / "setup.py"),
        ):
            if not link.exists():
                link.symlink_to(target)
        if importlib.util.find_spec("pybind11") is None:
            pybind11_of_torch(site / "pybind11")
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
        run = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
        rows.add(step="setup.py build_ext", ok=run.returncode == 0, output=(run.stdout + run.stderr)[-1500:])
        run.check_returncode()
        for library in (site / "built" / "fastigpt").iterdir():
            shutil.copy(library, ROOT / "fastigpt")


def pybind11_of_torch(folder: Path) -> None:
    """As much of the package pybind11 as setup.py needs, around the headers that torch brings along."""
    import torch

    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "setup_helpers.py").write_text(
        "from setuptools import Extension\n"
        "class Pybind11Extension(Extension):\n"
        "    def __init__(self, *args, cxx_std=17, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        f"        self.include_dirs.append({str(Path(torch.__file__).parent / 'include')!r})\n"
        "        self.extra_compile_args.append(f'-std=c++{cxx_std}')\n"
        "        self.language = 'c++'\n"
    )


def tests(out: Path, rows: Rows) -> None:
    """pytest -m gpu: compiling takes most of the time, so on as many processes as there are cores where xdist is."""
    # Only the files that need a GPU are collected: others may import what a bare machine does not have.
    wanted = re.compile(r"mark\.gpu|import .*pytestmark")
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if wanted.search(file.read_text())]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 1)))]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            if line.startswith(("FAILED", "ERROR")):
                rows.add(work=line.strip())
    rows.add(work="pytest -m gpu", returncode=run.returncode, summary=last)
    if run.returncode:
        raise RuntimeError(f"pytest ended with {run.returncode}")


def machine(out: Path, rows: Rows) -> None:
    import torch

    from fastigpt.bench.machine import measure_machine

    found = measure_machine(torch.device("cuda"))
    rows.add(**found.as_dict(), torch=torch.__version__, cuda=torch.version.cuda)


def tune(out: Path, rows: Rows) -> None:
    compile_on_all_cores("tune", out)
    import torch
    import tune as tuning

    from fastigpt.kernels import launch

    family = launch.family(torch.device("cuda"))

    def keep(table: launch.Table) -> None:
        tuning.write(table, launch.FOLDER / f"{family}.json")
        tuning.write(table, out / f"{family}.json")

    rows.add(family=family, table=tuning.tune(STAGES["tune"] - COMPILING["tune"] - 35, keep))


def compile_tune(share: int, shares: int) -> None:
    import tune as tuning

    tuning.rehearse(share, shares)


KERNELS = ("decode_attention", "causal_attention", "norm_linear", "sample_head")


def kernels(out: Path, rows: Rows) -> None:
    """Every kernel beside its peers."""
    compile_on_all_cores("kernels", out)
    limits = Results(out).machine()

    def one(name: str) -> None:
        limit = limits["gemm"]["bfloat16"] if name == "causal_attention" else limits["bandwidth"]
        for row in importlib.import_module(f"bench_{name}").measure(limit):
            rows.add(**row)

    for name in KERNELS:
        rows.attempt(name, partial(one, name))
    rows.finish()


def compile_kernels(share: int, shares: int) -> None:
    for name in KERNELS[share::shares]:
        importlib.import_module(f"bench_{name}").measure(1.0)


def quantize(out: Path, rows: Rows) -> None:
    """Nearest centroid of 67 million pixels, beside the bytes it must move: the points, and an int64 for each."""
    import numpy as np
    import torch
    from gpu_time import graph_seconds

    from fastigpt import Palette, nearest_centroid

    limits = Results(out).machine()
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    palette, centroids = Palette(clusters), torch.from_numpy(clusters).cuda()
    pixels = torch.randint(0, 256, (1 << 26, 3), dtype=torch.uint8, device="cuda")
    colors = torch.rand(1 << 24, 3, device="cuda") * 2 - 1
    for work, points, call in (
        ("512 colours, uint8", pixels, lambda: palette.encode(pixels)),
        ("512 colours, float32", colors, lambda: nearest_centroid(colors, centroids)),
    ):
        seconds = graph_seconds([call])
        moved = len(points) * (points[0].nbytes + 8)
        floor = moved / limits["bandwidth"]
        rows.add(work=work, seconds=seconds, gigapixels=len(points) / seconds / 1e9, share_of_floor=floor / seconds)


def memcheck(out: Path, rows: Rows) -> None:
    """compute-sanitizer over the kernels of csrc, then over Triton's: out-of-bounds and misaligned accesses."""
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider"]
    for file, which in (
        ("test_quantize_cuda.py", "equals_cpu and not 256 and not 1048576 and not 5000"),
        ("kernels/test_decode_attention.py", "one_token"),
        ("kernels/test_sample_head.py", "last_position or chunk"),
    ):
        command = [*sanitizer, *pytest, str(ROOT / "tests" / file), "-k", which]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        rows.add(work=file, returncode=run.returncode, output=(run.stdout + run.stderr)[-1500:])
        if run.returncode:
            rows.failed.append(f"{file}: {run.returncode}")
    rows.finish()


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


def timed(work: Callable[[], object], warm: bool = True) -> float:
    import torch

    if warm:
        work()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def floor_seconds(config, n: int, kv_bytes: float, bandwidth: float) -> float:
    """One token per pass: the weights n_pixels times, and every image's cache as it grows."""
    from fastigpt.bench.floor import matrix_parameters

    weights = 2 * matrix_parameters(config) * config.n_pixels
    return (weights + n * kv_bytes * config.n_pixels**2 / 2) / bandwidth


PRESETS = (("small", (1, 64, 512)), ("large", (1, 64)))
BUNDLED = (1, 64, 512)  # images at once of the bundled model


def engine(out: Path, rows: Rows) -> None:
    """Whole images: the presets with random weights, then the bundled model with windows."""
    compile_on_all_cores("engine", out)
    import torch

    from fastigpt import ImageGPTConfig
    from fastigpt.bench.floor import kv_bytes_per_token
    from fastigpt.engine.choose import build as build_engine
    from fastigpt.families import image_gpt

    limits, device = Results(out).machine(), torch.device("cuda")

    def make(spec, weights, **options):
        return build_engine(spec, weights, backend="triton", device=device, dtype=torch.bfloat16, **options)

    def whole(name: str, config, made, n: int) -> None:
        work = requests(made.spec, n)
        seconds = timed(lambda: fill(made, work))
        floor = floor_seconds(config, n, kv_bytes_per_token(config, made.kv_dtype), limits["bandwidth"])
        cache = str(made.kv_dtype).removeprefix("torch.")
        rows.add(work=f"{name} n={n} {cache} cache", seconds=seconds, images_per_second=n / seconds, floor=floor,
                 share_of_floor=floor / seconds)  # fmt: skip

    def completion(made) -> None:
        spec, known = made.spec, 16 * made.spec.columns
        tokens = torch.full((64, spec.n_positions), -1)
        tokens[:, :known] = torch.randint(0, spec.n_tokens, (64, known))
        alone = timed(partial(fill, made, requests(spec, 64, tokens)))
        tokens[:, :known] = tokens[:1, :known]
        shared = timed(partial(fill, made, requests(spec, 64, tokens)))
        rows.add(work="completion, 16 rows known, 64 results", seconds=shared, without_sharing=alone,
                 speed_up=alone / shared)  # fmt: skip

    def preset(name: str, sizes: tuple[int, ...]) -> None:
        config = ImageGPTConfig.preset(name)
        spec = image_gpt.spec(config)
        weights = random_weights(spec, device)
        made = make(spec, weights)
        for n in sizes:
            rows.attempt(f"{name} n={n}", partial(whole, name, config, made, n))
        if name == "small":
            rows.attempt("completion", partial(completion, made))
            for kv_dtype in eight_bit_caches():
                eight_bit = partial(make, spec, weights, kv_dtype=kv_dtype)
                rows.attempt(f"{kv_dtype} cache", lambda: whole(name, config, eight_bit(), 512))  # noqa: B023

    for name, sizes in PRESETS:
        rows.attempt(name, partial(preset, name, sizes))
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
        tokens = fill(engine, requests(engine.spec, 16, temperature=0.0)).tokens
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
    from fastigpt.engine.triton import TritonEngine
    from fastigpt.families import image_gpt

    model = fastigpt.load(device="cuda", backend="triton")
    spec = model.engine.spec
    fixed = TritonEngine(spec, image_gpt.canonical(model.config, model.weights), device="cuda", configs="fixed")
    one, eight = (fill(fixed, requests(spec, 16, seed=7), window).tokens for window in (1, 8))
    rows.add(work="fixed configuration, window=8", identical_images=float((one == eight).all(1).double().mean()))
    for n in BUNDLED:
        figures = {}
        for window in (1, 8, "auto"):
            work = requests(spec, n, seed=7)
            fill(model.engine, work, window)
            begun = time.perf_counter()
            filled = fill(model.engine, work, window)
            figures[window] = (time.perf_counter() - begun, filled)
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
    presets = {name: replace(ImageGPTConfig.preset(name), n_layer=2) for name, _ in PRESETS}
    bundled = replace(fastigpt.load(device="cpu", backend="reference").config, n_layer=2)

    def make(config, kv_dtype=torch.bfloat16, configs=family):
        spec = image_gpt.spec(config)
        weights = random_weights(spec, torch.device("cuda"))
        return TritonEngine(spec, weights, device="cuda", dtype=torch.bfloat16, kv_dtype=kv_dtype, configs=configs)

    def a_pass(n: int, window: int, *how) -> None:
        make(*how).prepared_pass(n=n, position=1, window=window)()

    def completion(prefixes: int, config) -> None:
        tokens = torch.full((64, config.n_pixels), -1)
        tokens[:, : -config.width] = (torch.arange(64) * prefixes // 64)[:, None]
        made = make(config)
        fill(made, requests(made.spec, 64, tokens))

    def scores(config) -> None:
        make(config).logits(torch.zeros((16, config.n_pixels), dtype=torch.int64))

    todo: list[Callable[[], None]] = [
        partial(a_pass, n, 1, config) for name, config in presets.items() for n in dict(PRESETS)[name]
    ]
    todo += [partial(a_pass, 512, 1, presets["small"], kv_dtype) for kv_dtype in eight_bit_caches()]
    todo += [partial(completion, prefixes, presets["small"]) for prefixes in (1, 64)]
    todo += [partial(a_pass, n, width, bundled) for n in BUNDLED for width in WIDTHS]
    todo += [partial(a_pass, 16, 1, bundled, kv_dtype) for kv_dtype in (torch.bfloat16, *eight_bit_caches())]
    todo += [partial(a_pass, 16, window, bundled, torch.bfloat16, "fixed") for window in (1, 8)]
    todo += [partial(scores, bundled)]
    for work in todo[share::shares]:
        work()
        torch.cuda.synchronize()


def peers(out: Path, rows: Rows) -> None:
    """The same work by transformers and by the compiled static cache."""
    import torch
    from static_cache import StaticCacheModel

    from fastigpt import ImageGPTConfig
    from fastigpt.bench.peers import TransformersPeer
    from fastigpt.families import image_gpt

    device, config = torch.device("cuda"), ImageGPTConfig.preset("small")
    begun = time.monotonic()

    def room(seconds: float) -> bool:
        return time.monotonic() - begun + seconds < STAGES["peers"] - 10

    spec = image_gpt.spec(config)
    weights = random_weights(spec, device)
    theirs = TransformersPeer(config, device, torch.bfloat16).model

    def generate(n: int, length: int) -> None:
        ids = torch.full((n, 1), config.start_token, device=device)
        theirs.generate(ids, max_length=length + 1, min_length=length + 1, do_sample=True, top_k=0, pad_token_id=0)

    def transformers(n: int) -> None:
        generate(n, 8)
        rows.add(work=f"transformers small n={n}", seconds=timed(lambda: generate(n, config.n_pixels), warm=False))

    def static_cache(n: int) -> None:
        model = StaticCacheModel(spec, weights, n, device=device, dtype=torch.bfloat16)
        compile_seconds = timed(partial(model.sample, 16), warm=False)
        seconds = timed(model.sample, warm=False)
        rows.add(work=f"static cache, torch.compile, small n={n}", seconds=seconds, compile_seconds=compile_seconds)

    for peer, n, needed in (
        (transformers, 1, 0),
        (static_cache, 1, 35),
        (static_cache, 64, 35),
        (transformers, 64, 40),
    ):
        if room(needed):
            rows.attempt(f"{peer.__name__} n={n}", partial(peer, n))
    rows.finish()


# --- all of them, and the report -------------------------------------------------------------------------------------


def run_stage(stage: str, out: Path, site: Path, seconds: float) -> dict[str, object]:
    """Runs a stage in a process of its own and says how it went. What it prints goes to log.txt."""
    command = [sys.executable, "-m", "benchmarks.acceptance", "--out", str(out), "--stage", stage]
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "ACCEPTANCE_SITE": str(site), "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n=== {stage}\n".encode())
        log.flush()
        start = log.tell()
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = f"stopped after {seconds:.0f} s"
    result: dict[str, object] = {"stage": stage, "seconds": time.monotonic() - begun, "ok": code == 0}
    if code != 0:
        result["result"] = code
        result["log"] = (out / "log.txt").read_bytes()[start:].decode(errors="replace")[-2000:]
    return result


def figures(out: Path) -> dict[str, float]:
    """The measured value of each target."""
    results = Results(out)
    found = {row["work"]: row for row in results.of("engine") if "error" not in row}
    values = {}
    for target, work, key in (
        ("small n=1, seconds per image", "small n=1 bfloat16 cache", "seconds"),
        ("small n=64, seconds", "small n=64 bfloat16 cache", "seconds"),
        ("small n=512, images/s", "small n=512 bfloat16 cache", "images_per_second"),
        ("small n=512 float8_e4m3fn cache, images/s", "small n=512 float8_e4m3fn cache", "images_per_second"),
        ("large n=64, seconds", "large n=64 bfloat16 cache", "seconds"),
        ("completion speed-up by prefix sharing", "completion, 16 rows known, 64 results", "speed_up"),
    ):
        if work in found:
            values[target] = found[work][key]
    for row in results.of("quantize"):
        if row["work"] == "512 colours, uint8":
            values["nearest centroid, 512 colours, uint8, Gpixel/s"] = row["gigapixels"]
    return values


def table(rows: list[dict]) -> list[str]:
    """Rows of one kind as Markdown, columns in order of appearance."""
    if not rows:
        return ["Nothing was measured."]
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ").replace("|", "/")
        return text if len(text) < 200 else text[:200] + " …"

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]


def report(out: Path, stages: list[dict[str, object]]) -> None:
    """README.md, and plots where matplotlib is installed."""
    results = Results(out)
    limits = (results.of("machine") or [{"name": "unknown GPU"}])[0]
    lines = [f"# {limits['name']}", "", time.strftime("Measured on %Y-%m-%d by `python -m benchmarks.acceptance`."), ""]
    if "bandwidth" in limits:
        terabytes, teraflops = limits["bandwidth"] / 1e12, limits["gemm"]["bfloat16"] / 1e12
        lines.append(f"In this run: copies at {terabytes:.2f} TB/s, bf16 products at {teraflops:.0f} TFLOP/s, ")
        lines += [f"torch {limits['torch']}.", ""]
    values = figures(out)
    lines += ["## Targets", "", "| | measured | reach | stretch |", "| --- | --- | --- | --- |"]
    for name, (reach, stretch) in TARGETS.items():
        measured = f"{values[name]:.4g}" if name in values else "not measured"
        lines.append(f"| {name} | {measured} | {reach} | {stretch if stretch is not None else '–'} |")
    for stage in ("engine", "peers", "kernels", "quantize", "tests", "memcheck"):
        lines += ["", f"## {stage}", "", *table(results.of(stage))]
    lines += ["", "## Stages", "", *table(stages), ""]
    (out / "README.md").write_text("\n".join(lines))
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for stage, key in (("kernels", "share_of_bandwidth"), ("engine", "share_of_floor")):
        bars = [(row["work"], row[key]) for row in results.of(stage) if key in row]
        if bars:
            figure, axes = plt.subplots(figsize=(9, 0.3 * len(bars) + 1), layout="constrained")
            axes.barh([name for name, _ in bars], [value for _, value in bars])
            axes.axvline(1.0, color="black", linewidth=0.8)
            axes.set_xlabel(key.replace("_", " "))
            axes.invert_yaxis()
            figure.savefig(out / f"{stage}.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run; all report")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--compile", choices=COMPILING, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.compile:
        globals()[f"compile_{options.compile}"](*options.share)
        return 0
    if options.stage:
        globals()[options.stage](out, Rows(out, options.stage))
        return 0
    begun, found = time.monotonic(), Results(out)
    with tempfile.TemporaryDirectory() as site:
        for stage in options.only:
            left = LIMIT - (time.monotonic() - begun)
            if left < 10:
                result: dict[str, object] = {"stage": stage, "seconds": 0.0, "ok": False, "result": "no time was left"}
            else:
                result = run_stage(stage, out, Path(site), min(STAGES[stage], left))
            print({key: value for key, value in result.items() if key != "log"}, flush=True)
            # A stage that is run again takes the place of its last run.
            found.set("stages", [*(row for row in found.of("stages") if row["stage"] != stage), result])
            report(out, found.of("stages"))
    return 0 if all(row["ok"] for row in found.of("stages") if row["stage"] in options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
