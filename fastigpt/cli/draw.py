"""`fastigpt sample` and `fastigpt complete`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from fastigpt.cli.options import DrawingOptions, given, split, with_options
from fastigpt.cli.signing import sign_images, signer
from fastigpt.extras import require
from fastigpt.files import replacing

if TYPE_CHECKING:
    from fastigpt.cli.chunks import Totals
    from fastigpt.model import Model

OUT = "a grid (.png), an array (.npz, arr_0 uint8 NHWC), or a new folder; - (or -.npz) is standard output."


@with_options
def sample(
    n: Annotated[int, typer.Option("-n", help="How many images.")] = 64,
    out: Annotated[str, typer.Option(help=f"Where to: {OUT}")] = "samples.png",
    heat_map: Annotated[str | None, typer.Option(help="Picture of where passes of the model began.")] = None,
    **options: Unpack[DrawingOptions],
) -> None:
    """Draw images: `fastigpt sample -n 64 --seed 0 --out samples.png`.

    A folder and an .npz are written as images are finished, whatever their number; Ctrl-C keeps what is there.
    """
    from fastigpt.cli.destination import output
    from fastigpt.cli.output import check_picture

    picture = None if heat_map is None else check_picture("--heat-map", heat_map)
    if picture is not None:
        require("matplotlib", for_="--heat-map")
    target = output(out, scale=options["scale"])
    signing = signer(options, target)

    import torch

    from fastigpt.chunks import Repeated
    from fastigpt.cli.chunks import draw
    from fastigpt.sampling import fresh_seed
    from fastigpt.scalars import whole

    count = whole("n", n, 1)
    load, how = split(options)
    model = _load(options["model"], load)
    target.expect(count, *model.image_size)
    seed = fresh_seed() if options["seed"] is None else options["seed"]
    target.facts = {"model": model.name, "seed": str(seed), "first_index": str(options["first_index"])}
    if signing is not None:
        target.sign = sign_images(signing, model.name, seed, options["first_index"])
    canvases = Repeated(torch.tensor(-1, device="cpu").expand(count, model.spec.n_positions))
    totals = draw(model, canvases, target, seed=seed, first_index=options["first_index"], options=how)
    if picture is not None:
        from fastigpt.heat_map import draw_heat_map

        with replacing(picture) as path:
            draw_heat_map(totals.drawn, totals.pass_starts, totals.images).save(path)
    report(options["as_json"], f"{n} images", model, totals, out)


@with_options
def complete(
    images: Annotated[list[Path], typer.Argument(help="Photographs, of any size.")],
    n: Annotated[int, typer.Option("-n", help="Results for each image.")] = 8,
    rows: Annotated[int | None, typer.Option(help="Keep this many rows of tokens from the top.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Picture of what to draw anew (white), canvas or image size.")
    ] = None,
    particles: Annotated[
        int, typer.Option(help="Candidates per result, weighted by the known cells after the hole.")
    ] = 1,
    out: Annotated[
        str, typer.Option(help=f"Where to: {OUT} A grid shows the original, what was kept, the results.")
    ] = "completed.png",
    **options: Unpack[DrawingOptions],
) -> None:
    """Complete photographs: `fastigpt complete photo.jpg -n 8 --rows 16 --out grid.png`.

    Without --rows and --mask the transparent parts of the images are drawn anew.
    """
    from fastigpt.cli.destination import output
    from fastigpt.cli.output import Grid
    from fastigpt.scalars import whole

    whole("n", n, 1)
    target = output(out, scale=options["scale"], columns=n + 2)
    signing = signer(options, target)

    from fastigpt.chunks import Repeated
    from fastigpt.cli.chunks import draw
    from fastigpt.cli.photographs import Photographs
    from fastigpt.sampling import fresh_seed

    load, how = split(options)
    model = _load(options["model"], load)
    photographs = Photographs(model, images, rows, mask)
    beside = isinstance(target, Grid)
    target.expect(len(images) * (n + 2 * beside), *model.image_size)
    seed = fresh_seed() if options["seed"] is None else options["seed"]
    target.facts = {"model": model.name, "seed": str(seed), "first_index": str(options["first_index"])}
    if signing is not None:
        parents: Any = {"photographs": images, "n": n, "beside": 2 * beside}
        target.sign = sign_images(signing, model.name, seed, options["first_index"], **parents)
    totals = draw(
        model,
        Repeated(photographs.unfinished, n),
        target,
        seed=seed,
        first_index=options["first_index"],
        options={**how, "particles": particles},
        show=photographs.beside_results(n) if beside else None,
    )
    report(options["as_json"], f"{n} completions of {len(images)} image(s)", model, totals, out)


def _load(name: str | None, options: dict[str, Any]) -> "Model":
    from fastigpt.api import load

    return load(None if name is None else given("--model", name), **options)


def report(as_json: bool, what: str, model: "Model", totals: "Totals", out: str) -> None:
    """Prints what a job took, to stderr where the images went to standard output."""
    import json

    to = sys.stderr if out.startswith("-") else sys.stdout
    rate = totals.images / totals.seconds
    if as_json:
        facts = {
            "out": out,
            "model": model.name,
            "backend": model.backend,
            "device": str(model.device),
            "dtype": str(model.dtype),
            "seed": totals.seed,
            "images": totals.images,
            "seconds": round(totals.seconds, 4),
            "images_per_second": round(rate, 4),
            "passes_per_image": round(totals.passes, 2),
            "tokens_per_pass": round(totals.tokens_per_pass, 3),
            "milliseconds_per_pass": round(totals.seconds_per_pass * 1e3, 4),
        }
        print(json.dumps(facts), file=to)
        return
    print(
        f"{out}: {what} from {model.name}, seed {totals.seed}, in {totals.seconds:.1f} s "
        f"({rate:.2f} images/s, {totals.passes:.0f} passes per image of {totals.tokens_per_pass:.1f} tokens in "
        f"{totals.seconds_per_pass * 1e3:.2f} ms, {model.backend} on {model.device})",
        file=to,
    )
