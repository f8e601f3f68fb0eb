"""The command line: `fastigpt sample | complete | info | convert | …`. Errors are one line and exit status 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.table import Table

from fastigpt.files import check_writable, replacing, write_folder

app = typer.Typer(
    name="fastigpt",
    help="Draws images from autoregressive image transformers, fast and exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_err = Console(stderr=True, highlight=False)
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Model = Annotated[str | None, typer.Option("--model", "-m", help="Directory or hub id. Default: the bundled scenes.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same images. Default: a new one.")]
Prompt = Annotated[str | None, typer.Option(help="What to draw, for models that read text.")]
Guidance = Annotated[float | None, typer.Option(help="How strongly to follow the prompt: logits u + s·(c − u).")]
Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that make up this probability.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: CUDA if there is one.")]
Backend = Annotated[str, typer.Option(help="auto, or one that `fastigpt info` lists.")]
Dtype = Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, … Default: the backend's best.")]
KvDtype = Annotated[str | None, typer.Option(help="Of the key-value cache.")]
BatchSize = Annotated[int | None, typer.Option(help="Images at a time. Default: what fits memory.")]
Window = Annotated[str, typer.Option(help="Tokens per pass (fixed-point sampling): auto, 1, 2, … Same images.")]
Draft = Annotated[
    str | None, typer.Option(help="A smaller model, same palette, that guesses the windows. Same images.")
]
Scale = Annotated[int, typer.Option(min=1, max=64, help="Each pixel becomes this many, squared, in a grid.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]


@app.command()
def sample(
    n: Annotated[int, typer.Option("-n", help="How many images.")] = 64,
    out: Annotated[Path, typer.Option(help="A grid (.png), an array (.npz, arr_0 uint8 NHWC), or a folder.")] = Path(
        "samples.png"
    ),
    model: Model = None,
    prompt: Prompt = None,
    guidance_scale: Guidance = None,
    seed: Seed = None,
    first_index: Annotated[int, typer.Option(help="Number of the first image: the job goes on from there.")] = 0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = None,
    backend: Backend = "auto",
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    batch_size: BatchSize = None,
    window: Window = "auto",
    draft: Draft = None,
    heat_map: Annotated[Path | None, typer.Option(help="Picture of where passes of the model began.")] = None,
    scale: Scale = 4,
    as_json: AsJson = False,
) -> None:
    """Draw images: `fastigpt sample -n 64 --seed 0 --out samples.png`."""
    from fastigpt.api import load

    if heat_map is not None:
        check_writable(heat_map)
        _require("matplotlib", "train")
    save = _writer(out, scale)
    loaded = load(model, device=device, backend=backend, dtype=dtype, kv_dtype=kv_dtype)
    pixels, stats = loaded.sample(
        n,
        prompt=prompt,
        guidance_scale=guidance_scale,
        seed=seed,
        first_index=first_index,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        window=_window(window),
        draft=draft,
        output_type="np",
        return_stats=True,
    )
    save(pixels, {"model": loaded.name, "seed": str(stats.seed), "first_index": str(first_index)})
    if heat_map is not None:
        from fastigpt.heat_map import draw_heat_map

        with replacing(heat_map) as path:
            draw_heat_map(stats).save(path)
    _report(as_json, f"{n} images", loaded, stats, n, out)


@app.command()
def complete(
    images: Annotated[list[Path], typer.Argument(help="Photographs, of any size.")],
    n: Annotated[int, typer.Option("-n", help="Results for each image.")] = 8,
    rows: Annotated[int | None, typer.Option(help="Keep this many rows from the top.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Picture of what to draw anew (white), canvas or image size.")
    ] = None,
    particles: Annotated[
        int, typer.Option(help="Candidates per result, weighted by the known cells after the hole.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="A grid: original, what was kept, results; or .npz, or a folder.")] = Path(
        "completed.png"
    ),
    model: Model = None,
    prompt: Prompt = None,
    guidance_scale: Guidance = None,
    seed: Seed = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = None,
    backend: Backend = "auto",
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    batch_size: BatchSize = None,
    window: Window = "auto",
    draft: Draft = None,
    scale: Scale = 4,
    as_json: AsJson = False,
) -> None:
    """Complete photographs: `fastigpt complete photo.jpg -n 8 --rows 16 --out grid.png`.

    Without --rows and --mask the transparent parts of the images are drawn anew.
    """
    from fastigpt.api import load

    pictures = [_open(path) for path in images]
    drawn_mask = None if mask is None else _open(mask)
    save = _writer(out, scale, columns=n + 2)
    loaded = load(model, device=device, backend=backend, dtype=dtype, kv_dtype=kv_dtype)
    results, stats = loaded.complete(
        pictures,
        n,
        rows=rows,
        mask=drawn_mask,
        particles=particles,
        prompt=prompt,
        guidance_scale=guidance_scale,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        window=_window(window),
        draft=draft,
        output_type="np",
        return_stats=True,
    )
    if out.suffix.lower() in _PICTURES:
        results = _beside_originals(loaded, pictures, rows, drawn_mask, results, n)
    save(results, {"model": loaded.name, "seed": str(stats.seed)})
    _report(as_json, f"{n} completions of {len(pictures)} image(s)", loaded, stats, len(stats.passes), out)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show devices, backends and why each is or isn't available, versions, and the bundled model."""
    from fastigpt.info import collect

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    cpu, bundled = facts["cpu"], facts["bundled_model"]
    table.add_row("versions", ", ".join(f"{k} {v or '–'}" for k, v in facts["versions"].items()))
    table.add_row("python", f"{facts['python']} on {facts['platform']}")
    free = cpu["free_memory_bytes"] / 2**30
    table.add_row("cpu", f"{cpu['cores']} cores, {', '.join(cpu['instruction_sets'])}, {free:.1f} GiB free")
    table.add_row("gpus", ", ".join(facts["gpus"]) or "none that torch sees")
    table.add_row("extension", f"fastigpt._C, {'with' if facts['extension']['cuda'] else 'without'} CUDA kernels")
    for name, state in facts["backends"].items():
        chosen = "  ← auto" if name == facts["auto"] else ""
        table.add_row(f"backend {name}", f"{state}{chosen}")
    table.add_row("bundled model", f"{bundled['size']}, {bundled['parameters'] / 1e6:.2f} M parameters")
    table.add_row("", f"weights {bundled['dtype']}, cache {bundled['kv_dtype']}")
    Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(table)


@app.command()
def convert(
    tf_checkpoint: Annotated[str, typer.Argument(help="Prefix of OpenAI's checkpoint: …/model.ckpt-1000000")],
    palette: Annotated[Path, typer.Option(help="OpenAI's kmeans_centers.npy.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    n_head: Annotated[int | None, typer.Option(help="Attention heads, where the file doesn't tell.")] = None,
) -> None:
    """Convert OpenAI's TensorFlow checkpoint to a directory that fastigpt and transformers open."""
    from fastigpt.openai_checkpoint import convert as convert_checkpoint

    print(f"wrote {convert_checkpoint(tf_checkpoint, palette, out, n_head=n_head)}")


@app.command()
def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A preset (small, …), a directory or a hub id.")
    ] = "small",
    n: Annotated[str, typer.Option("-n", "--n", help="Images at a time, comma-separated.")] = "1,8,64",
    backend: Backend = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the weights; several, comma-separated.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache; one for each --dtype, comma-separated.")] = None,
    device: Device = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens per pass.")] = 1,
    peers: Annotated[bool, typer.Option(help="Measure transformers and the portable engine as well.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the peers take turns.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="Draw throughput against n.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Measure speed beside peers and the machine's limits: `fastigpt bench --model small --n 1,8,64`.

    Passes are timed early, in the middle and late in the image; the time of whole images is put together from them.
    """
    from fastigpt.bench.run import bench as run_bench

    for path in (plot, out):
        if path is not None:
            check_writable(path)
    if plot is not None:
        _require("matplotlib", "train")
    run_bench(
        model,
        [int(count) for count in n.split(",")],
        backend=backend,
        dtypes=[None] if dtype is None else list(dtype.split(",")),
        kv_dtypes=None if kv_dtype is None else list(kv_dtype.split(",")),
        device=device,
        window=window,
        peers=peers,
        rounds=rounds,
        plot=plot,
        json=out,
    )


@app.command()
def train(
    images: Annotated[Path | None, typer.Argument(help="Folder of images. Default: the scenes fastigpt draws.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the training; goes on if it holds one.")] = Path("my-model"),
    init: Annotated[
        str | None, typer.Option(help="Start from this checkpoint: directory, hub id or [bold]bundled[/].")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Canvas, squared. Default: init's, else 32.")] = None,
    n_layer: Annotated[int | None, typer.Option(help="Blocks. Default: init's, else 5.")] = None,
    n_head: Annotated[int | None, typer.Option(help="Attention heads. Default: init's, else 3.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width. Default: init's, else 192.")] = None,
    colors: Annotated[
        int | None, typer.Option(help="Colours of the palette, at most. Default: init's, else 512.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3800,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 12,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: a minute, then faster steps.")] = False,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. Default: torch's choice.")] = None,
) -> None:
    """Train a model, on a folder of your images or on drawn scenes: `fastigpt train photos/ --out my-model`."""
    from fastigpt.training.train import train as train_model

    folder = train_model(
        out,
        images=images,
        init=init,
        resolution=resolution,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_colors=colors,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        compile=compile,
        threads=threads,
    )
    print(f"trained {folder}; draw from it: fastigpt sample --model {folder}")


@app.command()
def probe(
    data: Annotated[
        str, typer.Argument(help="A folder of class folders, an .npz of x and y, [bold]digits[/] or [bold]scenes[/].")
    ],
    model: Model = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images at most.")] = 1000,
    out: Annotated[Path, typer.Option(help="The plot.")] = Path("probe.png"),
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the untrained model.")] = 0,
    device: Device = None,
    backend: Backend = "auto",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Probe what each layer knows: `fastigpt probe digits --out probe.png`.

    Logistic regression on the features of every layer, beside raw pixels and an untrained model of the same shape.
    """
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"probing needs scikit-learn and matplotlib (fastigpt[train]): {error}") from None
    from fastigpt import probe as probing
    from fastigpt.api import load
    from fastigpt.probe_data import load as load_data

    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: the plot is a .png, .svg or .pdf")
    check_writable(out)
    loaded = load(model, device=device, backend=backend, dtype=dtype)
    labelled = load_data(data, n, loaded.config.height, loaded.config.width, seed)
    probes = probing.probe(loaded, labelled, seed=seed, progress=None)
    probing.plot(out, probes)
    if as_json:
        print(json.dumps(probing.as_dict(loaded, labelled, probes)))
        return
    print(probing.table(probes))
    print(f"{out}: probes of {loaded.name} on {len(labelled.pixels)} images of {labelled.name}")


def _require(module: str, extra: str) -> None:
    """Raises ImportError, before any work, if an optional package is missing."""
    if find_spec(module) is None:
        raise ImportError(f"this needs {module}: pip install 'fastigpt[{extra}]'")


def _window(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _open(path: Path) -> Image.Image:
    from fastigpt.images import read_image

    return read_image(path)


def _writer(out: Path, scale: int, columns: int | None = None) -> Callable[[np.ndarray, dict[str, str]], None]:
    """A function that saves images to `out`. Raises now, not after the work, if `out` can't be written."""
    from fastigpt.images import grid

    suffix = out.suffix.lower()
    if suffix == ".npz" or suffix in _PICTURES:
        check_writable(out)
    elif suffix:
        raise ValueError(f"--out {out}: write a picture (.png, .jpg, …), an array (.npz) or a folder (no suffix)")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file of that name exists, and no suffix means a folder")

    def save(pixels: np.ndarray, facts: dict[str, str]) -> None:
        if suffix == ".npz":
            with replacing(out) as path, path.open("wb") as file:
                np.savez_compressed(file, pixels)
        elif suffix in _PICTURES:
            with replacing(out) as path:
                _save_picture(grid(pixels, columns, scale=scale, gap=max(2, scale // 2)), path, facts)
        else:
            write_folder(out, lambda folder: _save_each(pixels, folder, facts))

    return save


def _save_each(pixels: np.ndarray, folder: Path, facts: dict[str, str]) -> None:
    for i, image in enumerate(pixels):
        _save_picture(Image.fromarray(image), folder / f"{i:05d}.png", facts)


def _save_picture(picture: Image.Image, path: Path, facts: dict[str, str]) -> None:
    if path.suffix.lower() != ".png":
        picture.save(path)
        return
    text = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        text.add_text(key, value)
    picture.save(path, pnginfo=text)


def _beside_originals(
    model: Any, pictures: list[Image.Image], rows: int | None, mask: Any, results: np.ndarray, n: int
) -> np.ndarray:
    """For each image: as the model sees it, what was kept of it (the rest grey), then its n results."""
    known = model.known_cells(pictures, rows=rows, mask=mask)
    originals = model.decode(model.encode(pictures))
    kept = np.where(known.view(*originals.shape[:3], 1).numpy(), originals, np.uint8(128))
    lines = [
        np.concatenate([o[None], k[None], r]) for o, k, r in zip(originals, kept, np.split(results, len(pictures)))
    ]
    return np.concatenate(lines)


def _report(as_json: bool, what: str, model: Any, stats: Any, count: int, out: Path) -> None:
    passes = float(stats.passes.double().mean())
    facts = {
        "out": str(out),
        "model": model.name,
        "backend": model.backend,
        "device": str(model.device),
        "dtype": str(model.dtype),
        "seed": stats.seed,
        "images": count,
        "seconds": round(stats.seconds, 4),
        "images_per_second": round(count / stats.seconds, 4),
        "passes_per_image": round(passes, 2),
        "tokens_per_pass": round(stats.tokens_per_pass, 3),
        "milliseconds_per_pass": round(stats.seconds_per_pass * 1e3, 4),
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(
        f"{out}: {what} from {model.name}, seed {stats.seed}, in {stats.seconds:.1f} s "
        f"({count / stats.seconds:.2f} images/s, {passes:.0f} passes per image of "
        f"{stats.tokens_per_pass:.1f} tokens in {stats.seconds_per_pass * 1e3:.2f} ms, "
        f"{model.backend} on {model.device})"
    )


def main() -> None:
    """Entry point. What is wrong with the user's input or files is told in one line, exit status 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        _err.print(f"[bold red]error:[/] {_one_line(error)}", soft_wrap=True, markup=True)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()) or type(error).__name__)


if __name__ == "__main__":
    main()
