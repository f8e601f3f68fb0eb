"""`fastigpt convert` and `fastigpt train`: commands that write checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastigpt.cli.options import given


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="Prefix of OpenAI's checkpoint, …/model.ckpt-1000000, or a LlamaGen, …/c2i_B_384.pt")
    ],
    out: Annotated[str, typer.Option(help="Directory to write.")],
    palette: Annotated[Path | None, typer.Option(help="OpenAI's kmeans_centers.npy, for OpenAI's checkpoint.")] = None,
    n_head: Annotated[int | None, typer.Option(help="Attention heads, where the file doesn't tell.")] = None,
) -> None:
    """Convert OpenAI's TensorFlow checkpoint to a directory that fastigpt and transformers open, or a LlamaGen and the
    VQ beside it to one that fastigpt opens."""
    folder: str | Path = given("--out", out)
    if checkpoint.endswith(".pt"):
        from fastigpt.families.llamagen import read_file

        if palette is not None:
            raise ValueError("--palette was given, but a LlamaGen has none")
        read_file(Path(checkpoint), n_head=n_head).write(folder)
    else:
        from fastigpt.families.image_gpt.tensorflow import convert as convert_checkpoint

        if palette is None:
            raise ValueError("--palette is missing: OpenAI's checkpoint needs its kmeans_centers.npy")
        folder = convert_checkpoint(checkpoint, palette, folder, n_head=n_head)
    print(f"wrote {folder}")


def train(
    images: Annotated[Path | None, typer.Argument(help="Folder of images. Default: the scenes fastigpt draws.")] = None,
    out: Annotated[str, typer.Option(help="Folder of the training; goes on if it holds one.")] = "my-model",
    init: Annotated[
        str | None, typer.Option(help="Start from this checkpoint: directory, hub id or [bold]bundled[/].")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Canvas, squared. Default: init's, else 32.")
    ] = None,
    n_layer: Annotated[int | None, typer.Option(min=1, max=1024, help="Blocks. Default: init's, else 5.")] = None,
    n_head: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Attention heads. Default: init's, else 3.")
    ] = None,
    n_embd: Annotated[int | None, typer.Option(min=1, max=65_536, help="Width. Default: init's, else 192.")] = None,
    colors: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Colours of the palette, at most. Default: init's, else 512.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="Of a model of captions and 128 × 128 scenes: [bold]tokenizer[/], then [bold]transformer[/]."
        ),
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="That the transformer is shown. Default: 80,000.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps. Default: 3,800, or the stage's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Images per step. Default: 12, or the stage's.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak. Default: 0.003.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: a minute, then faster steps.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Of the CPU. Default: torch's choice.")] = None,
) -> None:
    """Train a model, on a folder of your images or on drawn scenes: `fastigpt train photos/ --out my-model`."""
    folder = given("--out", out)
    numbers = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    chosen: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    shape: dict[str, Any] = {
        "resolution": resolution,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
    }
    if stage is not None:
        from fastigpt.training.captioned import train_stage

        unfit = {"images": images, **shape, "colors": colors}
        for name, value in unfit.items():
            if value is not None:
                raise ValueError(f"{name} was given, but --stage trains on scenes, in a shape of its own")
        if device != "cpu":
            raise ValueError("--device was given, but --stage trains on the CPU")
        trained = train_stage(
            stage, folder, **chosen, n_scenes=scenes, init=init, seed=seed, compile=compile, threads=threads
        )
        if stage == "tokenizer":
            print(f"trained the tokenizer of {trained}; next: fastigpt train --stage transformer --out {trained}")
            return
    else:
        from fastigpt.training.train import train as train_model

        if scenes is not None:
            raise ValueError("--scenes was given, but only --stage transformer takes it")
        trained = train_model(
            folder,
            images=images,
            init=init,
            **shape,
            n_colors=colors,
            **chosen,
            seed=seed,
            device=device,
            compile=compile,
            threads=threads,
        )
    print(f"trained {trained}; draw from it: fastigpt sample --model {trained}")
