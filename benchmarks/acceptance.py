"""The first thing to run on a GPU: builds, tests, tunes, measures, and writes JSON, a Markdown table and plots.

    python -m benchmarks.acceptance --out DIR [--only STAGE ...]

Needs no network and less than nine minutes. Each stage is a process of its own with a time limit, so one that fails or
hangs is recorded and the others still run; rows are written as they are measured, so a stage that is stopped keeps what
it has. Copy DIR to benchmarks/results/<gpu>/ and commit it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `python -m` puts the repository first, where transformers would take kernels/ for the PyPI package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "baselines")]

LIMIT = 530.0  # seconds for everything
STAGES = {  # name: most seconds it may take
    "build": 120.0,
    "machine": 30.0,
    "tests": 120.0,
    "tune": 100.0,
    "kernels": 70.0,
    "quantize": 20.0,
    "engine": 120.0,
    "peers": 110.0,
    "memcheck": 60.0,
}
TARGETS = {  # the figures asked for on an H200 in bf16: what, reach, stretch
    "small n=1, seconds per image": (0.35, 0.15),
    "small n=64, seconds": (0.65, 0.48),
    "small n=512, images/s": (130.0, 160.0),
    "small n=512 float8_e4m3fn cache, images/s": (220.0, 300.0),
    "large n=64, seconds": (3.8, 3.2),
    "completion speed-up by prefix sharing": (1.8, None),
    "nearest centroid, 512 colours, uint8, Gpixel/s": (10.0, None),
}


class Rows:
    """Results of a stage, on disk after every row."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []  # type: tuple[Path, list[dict[str, object]]]

    def add(self, **row: object) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(row, flush=True)


def read(out: Path, stage: str) -> list[dict]:
    path = out / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else []


# --- stages: each runs in its own process -----------------------------------------------------------------------------


def build(out: Path, rows: Rows) -> None:
    """The extension, and the package where Python finds it: installed, or failing that in place."""
    install = [sys.executable, "-m", "pip", "install", "-q", "-e", ".", "--no-build-isolation", "--no-deps"]
    run = subprocess.run(install, cwd=ROOT, capture_output=True, text=True, check=False)
    rows.add(step="pip install -e .", ok=run.returncode == 0, output=(run.stdout + run.stderr)[-1500:])
    if run.returncode:
        site = out / "site"  # on the path of every later stage
        site.mkdir(exist_ok=True)
        for link, target in ((ROOT / "fastigpt" / "kernels", ROOT / "kernels"), (site / "fastigpt", ROOT / "fastigpt")):
            if not link.exists():
                link.symlink_to(target)
        if importlib.util.find_spec("pybind11") is None:
            pybind11_of_torch(site / "pybind11")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        rows.add(step="setup.py build_ext", ok=run.returncode == 0, output=(run.stdout + run.stderr)[-1500:])
        run.check_returncode()


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
    """pytest -m gpu, a process per file: compiling takes most of the time, and there are cores for it."""
    files = [*sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ROOT / "tests"]
    ignore = ["--ignore", str(ROOT / "tests" / "kernels")]
    running = []
    for file in files:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(file)]
        command += [*ignore, "--continue-on-collection-errors"] if file.name == "tests" else []
        log = (out / f"tests_{file.stem}.txt").open("w")
        running.append((file, log, subprocess.Popen(command, cwd=out, stdout=log, stderr=subprocess.STDOUT)))
    for file, log, process in running:
        code = process.wait()
        log.close()
        summary = (out / f"tests_{file.stem}.txt").read_text().strip().splitlines()[-1:]
        rows.add(file=str(file.relative_to(ROOT)), returncode=code, summary=summary)  # 5: nothing marked gpu


def machine(out: Path, rows: Rows) -> None:
    import torch

    from fastigpt.bench.machine import measure_machine

    found = measure_machine(torch.device("cuda"))
    rows.add(**found.as_dict(), torch=torch.__version__, cuda=torch.version.cuda)


def tune(out: Path, rows: Rows) -> None:
    import torch
    import tune as tuning
    from fastigpt.kernels import launch

    family = launch.family(torch.device("cuda"))
    table = tuning.tune(STAGES["tune"] - 20)
    tuning.write(table, launch.FOLDER / f"{family}.json")
    tuning.write(table, out / f"{family}.json")
    rows.add(family=family, table=table)


def kernels(out: Path, rows: Rows) -> None:
    """Every kernel beside its peers. One that fails does not stop the others."""
    (limits,) = read(out, "machine")
    failed = []
    for name in ("decode_attention", "causal_attention", "norm_linear", "sample_head"):
        limit = limits["gemm"]["bfloat16"] if name == "causal_attention" else limits["bandwidth"]
        try:
            for row in importlib.import_module(f"bench_{name}").measure(limit):
                rows.add(**row)
        except Exception:
            failed.append(traceback.format_exc())
            rows.add(work=name, error=failed[-1])
    if failed:
        raise RuntimeError(f"{len(failed)} kernels failed:\n" + "\n".join(failed))


def quantize(out: Path, rows: Rows) -> None:
    """Nearest centroid of 67 million pixels, beside the bytes it must move: the points, and an int64 for each."""
    import numpy as np
    import torch
    from gpu_time import graph_seconds

    from fastigpt import Palette, nearest_centroid

    (limits,) = read(out, "machine")
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
    """compute-sanitizer over the CUDA kernels of csrc: out-of-bounds and misaligned accesses."""
    tests = ROOT / "tests" / "test_quantize_cuda.py"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    command += ["-m", "gpu", "-p", "no:cacheprovider", str(tests), "-k", "equals_cpu and not 256 and not 1048576"]
    run = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    rows.add(step="memcheck", returncode=run.returncode, output=(run.stdout + run.stderr)[-1500:])
    run.check_returncode()


def random_weights(config, device):
    """Weights of the right sizes, made on the device; what is drawn from them is noise, and the time the same."""
    import torch

    shapes = config.tensor_shapes()
    return {
        name: torch.ones(shape, device=device)
        if "ln_" in name
        else torch.randn(shape, device=device).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }


def job(config, n, window=1, tokens=None, source=None, seed=0):
    import torch

    from fastigpt.engine import Drawing, Job

    tokens = torch.full((n, config.n_pixels), -1) if tokens is None else tokens
    source = torch.zeros(n, dtype=torch.int64) if source is None else source
    return Job(tokens, torch.arange(n), source, None, Drawing(seed=seed), window)


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


def engine(out: Path, rows: Rows) -> None:
    import torch
    from fastigpt.kernels import launch

    import fastigpt
    from fastigpt import ImageGPTConfig
    from fastigpt.bench.floor import kv_bytes_per_token
    from fastigpt.engine.choose import build as build_engine

    (limits,) = read(out, "machine")
    device = torch.device("cuda")

    def whole(name: str, made, n: int) -> None:
        work = job(made.config, n)
        seconds = timed(lambda: made.fill(work))
        floor = floor_seconds(made.config, n, kv_bytes_per_token(made.config, made.kv_dtype), limits["bandwidth"])
        cache = str(made.kv_dtype).removeprefix("torch.")
        rows.add(work=f"{name} n={n} {cache} cache", seconds=seconds, images_per_second=n / seconds, floor=floor,
                 share_of_floor=floor / seconds)  # fmt: skip

    for name, sizes in (("small", (1, 64, 512)), ("large", (1, 64))):
        config = ImageGPTConfig.preset(name)
        weights = random_weights(config, device)
        made = build_engine(config, weights, backend="triton", device=device, dtype=torch.bfloat16)
        for n in sizes:
            whole(name, made, n)
        if name == "small":
            tokens = torch.full((64, config.n_pixels), -1)
            tokens[:, : 16 * config.width] = torch.randint(0, config.n_colors, (1, 16 * config.width))
            shared = timed(partial(made.fill, job(config, 64, tokens=tokens)))
            alone = timed(partial(made.fill, job(config, 64, tokens=tokens, source=torch.arange(64))))
            rows.add(work="completion, 16 rows known, 64 results", seconds=shared, without_sharing=alone,
                     speed_up=alone / shared)  # fmt: skip
            for kv_dtype in (torch.int8, torch.float8_e4m3fn):
                if kv_dtype == torch.int8 or launch.stores_float8(device):
                    other = build_engine(
                        config, weights, backend="triton", device=device, dtype=torch.bfloat16, kv_dtype=kv_dtype
                    )
                    whole(name, other, 512)
        made = other = None  # frees the caches
        torch.cuda.empty_cache()

    model = fastigpt.load(device=device, backend="triton")
    for n in (1, 64, 512):
        figures = {}
        for window in (1, 8, "auto"):
            work = job(model.config, n, window=window, seed=7)
            model.engine.fill(work)
            begun = time.perf_counter()
            filled = model.engine.fill(work)
            figures[window] = (time.perf_counter() - begun, filled)
        one = figures[1]
        for window in (8, "auto"):
            seconds, filled = figures[window]
            rows.add(
                work=f"bundled model n={n} window={window}", seconds=seconds, seconds_window_1=one[0],
                passes_per_image=float(filled.pass_starts.sum(1).double().mean()),
                identical_images=float((filled.tokens == one[1].tokens).all(1).double().mean()),
            )  # fmt: skip


def peers(out: Path, rows: Rows) -> None:
    """The same work by transformers and by the compiled static cache."""
    import torch
    from static_cache import StaticCacheModel

    from fastigpt import ImageGPTConfig
    from fastigpt.bench.peers import TransformersPeer

    device, config = torch.device("cuda"), ImageGPTConfig.preset("small")
    begun = time.monotonic()

    def room(seconds: float) -> bool:
        return time.monotonic() - begun + seconds < STAGES["peers"] - 10

    weights = random_weights(config, device)
    theirs = TransformersPeer(config, device, torch.bfloat16).model

    def generate(n: int, length: int) -> None:
        ids = torch.full((n, 1), config.start_token, device=device)
        theirs.generate(ids, max_length=length + 1, min_length=length + 1, do_sample=True, top_k=0, pad_token_id=0)

    generate(1, 8)
    rows.add(work="transformers small n=1", seconds=timed(lambda: generate(1, config.n_pixels), warm=False))
    for n in (1, 64):
        if room(35):
            model = StaticCacheModel(config, weights, n, device=device, dtype=torch.bfloat16)
            compile_seconds = timed(partial(model.sample, 16), warm=False)
            seconds = timed(model.sample, warm=False)
            rows.add(work=f"static cache, torch.compile, small n={n}", seconds=seconds, compile_seconds=compile_seconds)
    if room(40):
        rows.add(work="transformers small n=64", seconds=timed(lambda: generate(64, config.n_pixels), warm=False))


# --- all of them, and the report
# ---------------------------------------------------------------------------------------


def run_stage(stage: str, out: Path, seconds: float) -> dict[str, object]:
    """Runs a stage in a process of its own and says how it went."""
    command = [sys.executable, "-m", "benchmarks.acceptance", "--out", str(out), "--stage", stage]
    begun = time.monotonic()
    with (out / f"{stage}.log").open("w") as log:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(out / "site")}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = f"stopped after {seconds:.0f} s"
    result: dict[str, object] = {"stage": stage, "seconds": time.monotonic() - begun, "ok": code == 0}
    if code != 0:
        result["result"] = code
        result["log"] = (out / f"{stage}.log").read_text()[-2000:]
    return result


def figures(out: Path) -> dict[str, float]:
    """The measured value of each target."""
    found = {row["work"]: row for row in read(out, "engine") if "work" in row}
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
    for row in read(out, "quantize"):
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
    limits = (read(out, "machine") or [{"name": "unknown GPU"}])[0]
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
        lines += ["", f"## {stage}", "", *table(read(out, stage))]
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
        bars = [(row["work"], row[key]) for row in read(out, stage) if key in row]
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
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        rows = Rows(out / f"{options.stage}.json")
        globals()[options.stage](out, rows)
        return 0
    begun, results = time.monotonic(), []
    for stage in options.only:
        left = LIMIT - (time.monotonic() - begun)
        if left < 10:
            results.append({"stage": stage, "seconds": 0.0, "ok": False, "result": "no time was left"})
            continue
        results.append(run_stage(stage, out, min(STAGES[stage], left)))
        print({key: value for key, value in results[-1].items() if key != "log"}, flush=True)
        (out / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
        report(out, results)
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
