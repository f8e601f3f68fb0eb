"""`fastigpt job run | status | verify | export`: jobs that are directories, drawn by any number of workers."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastigpt.cli.options import AsJson, Device, given, window_size

if TYPE_CHECKING:
    from fastigpt.jobs import Status

app = typer.Typer(
    help="Draw any number of images into a directory that any number of workers fill.", no_args_is_help=True
)

Directory = Annotated[str, typer.Argument(help="A directory, or a URL that fsspec opens.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Directory or hub id. Default: the job's own, or the bundled scenes."),
]


@app.command()
def run(
    directory: Directory,
    n: Annotated[int | None, typer.Option("-n", help="How many images.")] = None,
    model: Model = None,
    prompts: Annotated[
        str | None, typer.Option(help="File with one prompt a line: image i reads line i mod their number.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What all images read.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="File with one class a line, number or name, or [bold]all[/]: each in turn.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class of all images, number or name.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly to follow prompts. Default: the model's.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: a new one, which the job keeps.")] = None,
    first_index: Annotated[int | None, typer.Option(help="Image index of the first image. Default: 0.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits. Default: the model's, or 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens. Default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest of this probability.")] = None,
    backend: Annotated[str | None, typer.Option(help="One that `fastigpt info` lists. Default: the fastest.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights. Default: the backend's best.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the key-value cache.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Images drawn and committed together. Default: up to 256.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the cores; with --ray actors, at most.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="i/N, i from 1: draw every N-th shard and no other.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Draw with Ray: [bold]local[/], [bold]auto[/] (this machine's cluster) or an address."),
    ] = None,
    device: Device = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images at a time. Default: what fits memory and is of use.")
    ] = None,
    window: Annotated[str, typer.Option(help="Tokens per pass: auto, 1, 2, … Same images.")] = "auto",
    draft: Annotated[str | None, typer.Option(help="A smaller model that guesses the windows. Same images.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a job, or what is missing of it: `fastigpt job run fid -n 50000 --seed 0 --workers 2`.

    The same command, or `fastigpt job run fid`, goes on after Ctrl-C, a crash or a kill; any number of them may run on
    one directory at once.
    """
    import sys
    import time

    given("DIRECTORY", directory)
    pair = None if part is None else _part(part)

    from fastigpt.jobs import run as run_job
    from fastigpt.jobs.directory import JobDirectory
    from fastigpt.jobs.store import open_store
    from fastigpt.signals import Interrupted

    job = JobDirectory.find(open_store(directory))
    before, started = 0 if job is None else job.done(job.committed()), time.perf_counter()
    options: dict[str, Any] = {
        "prompt": prompt,
        "label": label,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "first_index": first_index,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "backend": backend,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "device": device,
        "batch_size": batch_size,
        "draft": draft,
    }
    try:
        found = run_job(
            directory,
            n,
            model=model,
            prompts=prompts,
            labels=labels,
            shard_size=shard_size,
            workers=workers,
            part=pair,
            ray=ray,
            window=window_size(window),
            **options,
        )
    except Interrupted as stop:
        job = JobDirectory.find(open_store(directory))
        told = (
            "no image was drawn" if job is None else f"{job.done(job.committed()):,} of {job.parameters.n:,} are drawn"
        )
        how = "the same command goes on" if job is None else f"fastigpt job run {directory} goes on"
        print(f"interrupted: {told}; {how}", file=sys.stderr)
        raise typer.Exit(128 + stop.number) from None
    _report(found, as_json, (found.done - before, time.perf_counter() - started))


@app.command()
def status(directory: Directory, as_json: AsJson = False) -> None:
    """Show how far a job is, who draws it, and the time that is left."""
    from fastigpt.jobs import status as status_of_job

    _report(status_of_job(given("DIRECTORY", directory)), as_json)


@app.command()
def verify(
    directory: Directory,
    redraw: Annotated[int, typer.Option(min=0, help="Draw so many images again here and compare their tokens.")] = 0,
    model: Model = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare every shard with its record, and some images with what is drawn here; status 1: wrong."""
    import json
    from dataclasses import asdict

    from fastigpt.jobs import verify as verify_job

    found = verify_job(given("DIRECTORY", directory), redraw=redraw, model=model, device=device)
    if as_json:
        print(json.dumps({**asdict(found), "right": found.right}))
    else:
        for sentence in found.damaged:
            print(sentence)
        if found.damaged:
            print(f"{len(found.damaged)} found wrong; fastigpt job run {directory} draws damaged shards anew")
        if found.missing:
            print(f"{len(found.missing)} shards are missing; fastigpt job run {directory} draws them")
        for image in found.redrawn:
            if image.differs:
                print(
                    f"image {image.index}: {image.differs} tokens differ, the first at position {image.first}; "
                    f"drawn on {image.device}, and now on {found.redrawn_on}"
                )
        if found.redrawn:
            same = sum(image.differs == 0 for image in found.redrawn)
            print(f"{same} of {len(found.redrawn)} images drawn again here came out the same, token for token")
        if len(found.devices) > 1:
            print(f"a mixed fleet: {_devices(found.devices)}. Equal tokens are promised on one kind of device only")
        if found.complete:
            print("complete: every shard is what its record and the manifest say")
    if not found.right:
        raise typer.Exit(1)


@app.command()
def export(
    directory: Directory,
    kind: Annotated[str, typer.Argument(help="npz, png, parquet or webdataset.")],
    out: Annotated[
        str, typer.Option(help="A .npz; a folder or .zip of PNGs; a folder of Parquet; a .tar or a folder.")
    ],
    model: Model = None,
    device: Device = None,
) -> None:
    """Write a complete job as evaluations and datasets read it: `fastigpt job export fid npz --out fid.npz`."""
    from fastigpt.jobs import export as export_job

    export_job(given("DIRECTORY", directory), kind, given("--out", out), model=model, device=device)
    print(f"wrote {out}")


def _part(text: str) -> tuple[int, int]:
    i, _, of = text.partition("/")
    if not (i.isdigit() and of.isdigit() and 1 <= int(i) <= int(of)):
        raise ValueError(f"--part must be i/N with i from 1 to N, such as 1/8, not {text!r}")
    return int(i), int(of)


def _report(found: "Status", as_json: bool, took: tuple[int, float] | None = None) -> None:
    """took: the images that were drawn in this run, by whomever, and its seconds."""
    import json
    from dataclasses import asdict

    p = found.parameters
    if as_json:
        print(json.dumps({**asdict(found), "devices": found.devices, "took": took}))
        return
    line = f"{found.directory}: {found.done:,} of {p.n:,} images, seed {p.seed}, {p.backend} in {p.dtype}"
    if took is not None:
        line += f"; {took[0]:,} of them now in {took[1]:,.1f} s, {took[0] / took[1]:,.2f} images/s"
    elif found.rate and not found.complete:
        left = "" if found.seconds_left is None else f", about {_time(found.seconds_left)} left"
        line += f", {found.rate:,.2f} images/s{left}"
    print(line + (f"; complete, sha256 of all tokens {found.tokens_sha256}" if found.complete else ""))
    for drawer in found.drawers:
        print(
            f"  {drawer['process']}: {drawer['images']:,} images at {drawer['images_per_second']:,.2f} images/s, "
            f"{drawer['peak_rss'] / 2**20:,.0f} MiB at most, {drawer['device']}"
        )
    for process, shard in found.drawing:
        print(f"  {process} is drawing shard {shard}")
    if len(found.devices) > 1:
        print(f"  a mixed fleet: {_devices(found.devices)}. fastigpt job verify --redraw tells whether tokens differ")


def _devices(devices: dict[str, int]) -> str:
    return "; ".join(f"{count:,} images on {device}" for device, count in devices.items())


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
