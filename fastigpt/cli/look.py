"""`fastigpt info`, `bench` and `probe`: what there is, how fast it is, what it knows."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastigpt.cli.options import AsJson, Backend, Device, Dtype, Model, given
from fastigpt.extras import require
from fastigpt.files import check_writable

PLOTS = (".png", ".svg", ".pdf")


def info(as_json: AsJson = False) -> None:
    """Show devices, backends and why each is or isn't available, versions, and the bundled model."""
    import json

    from rich.console import Console
    from rich.table import Table

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


def bench(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A preset (small, janus-pro-1b, llamagen-b, …), a directory or hub id."),
    ] = "small",
    n: Annotated[str, typer.Option("-n", "--n", help="Images at a time, comma-separated.")] = "1,8,64",
    backend: Backend = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the weights; several, comma-separated.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache; one for each --dtype, comma-separated.")] = None,
    device: Device = None,
    window: Annotated[
        int, typer.Option(min=1, help="Tokens that a pass of ours scores; peers score one. Needs a trained model.")
    ] = 1,
    peers: Annotated[bool, typer.Option(help="Measure transformers and the portable engine as well.")] = True,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds in which the peers take turns.")] = 3,
    plot: Annotated[str | None, typer.Option(help="Draw throughput against n.")] = None,
    out: Annotated[str | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Measure speed beside peers and the machine's limits: `fastigpt bench --model small --n 1,8,64`.

    Passes are timed early, in the middle and late in the image; the time of whole images is put together from them.
    """
    plot_path = None if plot is None else _plot("--plot", plot)
    json_path = None if out is None else Path(given("--json", out))
    if json_path is not None:
        check_writable(json_path)
    if plot is not None:
        require("matplotlib", for_="--plot")

    from fastigpt.bench.run import bench as run_bench

    run_bench(
        given("--model", model),
        _counts(n),
        backend=backend,
        dtypes=[None] if dtype is None else list(dtype.split(",")),
        kv_dtypes=None if kv_dtype is None else list(kv_dtype.split(",")),
        device=device,
        window=window,
        peers=peers,
        rounds=rounds,
        plot=plot_path,
        json=json_path,
    )


def probe(
    data: Annotated[
        str, typer.Argument(help="A folder of class folders, an .npz of x and y, [bold]digits[/] or [bold]scenes[/].")
    ],
    model: Model = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images at most.")] = 1000,
    out: Annotated[str, typer.Option(help="The plot.")] = "probe.png",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the split and of the untrained model.")] = 0,
    device: Device = None,
    backend: Backend = "auto",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Probe what each layer knows: `fastigpt probe digits --out probe.png`.

    Logistic regression on the features of every layer, beside raw pixels and an untrained model of the same shape.
    """
    import json

    require("sklearn", "matplotlib", for_="probing")
    path = _plot("--out", out)

    from fastigpt import probe as probing
    from fastigpt.api import load
    from fastigpt.probe_data import load as load_data

    loaded = load(None if model is None else given("--model", model), device=device, backend=backend, dtype=dtype)
    labelled = load_data(given("DATA", data), n, *loaded.image_size, seed)
    probes = probing.probe(loaded, labelled, seed=seed, progress=None)
    probing.plot(path, probes)
    if as_json:
        print(json.dumps(probing.as_dict(loaded, labelled, probes)))
        return
    print(probing.table(probes))
    print(f"{out}: probes of {loaded.name} on {len(labelled.pixels)} images of {labelled.name}")


def _plot(option: str, path: str) -> Path:
    found = Path(given(option, path))
    if found.suffix.lower() not in PLOTS:
        raise ValueError(f"{option} {path}: the plot is a .png, .svg or .pdf")
    check_writable(found)
    return found


def _counts(text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise ValueError(f"--n must be numbers of images, comma-separated, not {text!r}") from None
