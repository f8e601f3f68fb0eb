"""The program: its commands, and how whatever is wrong becomes one line and exit status 2."""

import os
import sys
from typing import Annotated, Any

import typer

from fastigpt.cli import draw, job, look, make, serve, verify

app = typer.Typer(
    name="fastigpt",
    help="Draws images from autoregressive image transformers, fast and exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    draw.sample,
    draw.complete,
    verify.verify,
    look.info,
    make.convert,
    look.bench,
    make.train,
    look.probe,
    serve.serve,
):
    app.command()(command)
app.add_typer(job.app, name="job")

# What the command line itself raises for options it does not take, in every version of typer.
_UsageError: Any = typer.BadParameter.__bases__[0]


def _version(wanted: bool) -> None:
    if wanted:
        import fastigpt

        print(f"fastigpt {fastigpt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. What is wrong with the user's input or files is told in one line, exit status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="fastigpt", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has read enough; nothing must be written at exit any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except _UsageError as error:
        _fail(error.format_message())
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(str(error) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _fail(f"out of memory (a smaller --batch-size needs less): {error}")
    else:
        sys.exit(status or 0)


def _out_of_memory(error: Exception) -> bool:
    """torch raises RuntimeErrors on CPUs, OutOfMemoryError, which is one, on GPUs."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, highlight=False).print(
        f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True, markup=True
    )
    sys.exit(2)
