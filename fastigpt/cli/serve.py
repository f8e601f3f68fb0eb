"""`fastigpt serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastigpt.cli.options import Backend, Device, Dtype
from fastigpt.extras import require

if TYPE_CHECKING:
    from fastigpt.server.moderation import Moderation

_NEEDS = ("fastapi", "uvicorn", "multipart", "prometheus_client")


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="NAME, NAME=DIRECTORY or NAME=HUB-ID, as often as you like. Default: the scenes."
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="ALIAS=NAME, for clients that ask for one model: gpt-image-2=NAME.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of SHA-256 digests of API keys, one a line.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen beyond this machine without keys.")] = False,
    make_key: Annotated[bool, typer.Option("--make-key", help="Print a new key and its digest, and end.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images side by side. Default: what fits memory, at most 64.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Images that may wait; more are answered with 429.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request, in MiB.")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of an upload, in millions.")] = 50,
    connections: Annotated[int, typer.Option(min=1, help="At a time; more are answered with 503.")] = 1024,
    cancel_on_disconnect: Annotated[
        bool, typer.Option(help="Give up images whose client has left, or draw them to the end.")
    ] = True,
    moderation: Annotated[
        str | None,
        typer.Option(help="module:function, or URL in the format of /v1/moderations, that is asked before and after."),
    ] = None,
    blocked_words: Annotated[Path | None, typer.Option(help="File of words that prompts must not hold.")] = None,
    no_c2pa: Annotated[bool, typer.Option("--no-c2pa", help="Do not sign where pictures come from.")] = False,
    c2pa_cert: Annotated[
        Path | None, typer.Option(help="Certificate (.pem) to sign with. Default: one of your own.")
    ] = None,
    c2pa_key: Annotated[Path | None, typer.Option(help="Private key (.pem) of --c2pa-cert.")] = None,
    device: Device = None,
    backend: Backend = "auto",
    dtype: Dtype = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the key-value cache.")] = None,
) -> None:
    """Serve models with OpenAI's Images API: `fastigpt serve`.

    Requests join a running batch at any row, and nobody's picture depends on who else is there. SIGTERM ends it when
    all pictures that were asked for are sent.
    """
    require(*_NEEDS, for_="serving")
    from fastigpt.server.keys import Keys
    from fastigpt.server.keys import make_key as new_key

    if make_key:
        key, digest = new_key()
        print(f"key (give it to a client; it is kept nowhere): {key}\nline for the file of --keys: {digest}")
        return
    from fastigpt.server.run import BUNDLED, Address, check_exposure
    from fastigpt.server.run import serve as run
    from fastigpt.server.service import Settings
    from fastigpt.server.signing import open_signing

    check_exposure(host, keys=keys is not None, no_auth=no_auth)
    sign, told = open_signing(c2pa_cert, c2pa_key, wanted=not no_c2pa)
    models = named_models(model or [BUNDLED], BUNDLED)
    settings = Settings(
        aliases=dict(_pair("--alias", text) for text in alias or ()),
        max_body=max_body << 20,
        max_pixels=max_pixels * 1_000_000,
        cancel_on_disconnect=cancel_on_disconnect,
        keys=None if keys is None else Keys.read(keys),
        moderation=_moderation(moderation, blocked_words),
        sign=sign,
    )
    status = run(
        models,
        Address(host, port, connections),
        settings,
        loading={"device": device, "backend": backend, "dtype": dtype, "kv_dtype": kv_dtype},
        batches={"capacity": batch_size, "max_queue": max_queue, "timeout": timeout},
        notes=told,
    )
    raise typer.Exit(status)


def named_models(given: list[str], bundled: str) -> dict[str, str | None]:
    """Paths by name; the bundled model's is None. Raises ValueError for a name that stands for two."""
    found: dict[str, str | None] = {}
    for text in given:
        name, path = _pair("--model", text) if "=" in text else (text, None if text == bundled else text)
        if name in found:
            raise ValueError(f"--model {name} is given twice")
        found[name] = path
    return found


def _pair(option: str, text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name.strip() or not value.strip():
        raise ValueError(f"{option} must be NAME=VALUE, not {text!r}")
    return name, value


def _moderation(hook: str | None, words: Path | None) -> "Moderation":
    from fastigpt.server.moderation import BlockedWords, Moderation, load_hook
    from fastigpt.server.moderation_endpoint import Endpoint

    made: Any = None if words is None else BlockedWords(words)
    if hook is None:
        return Moderation(made)
    return Moderation(made, Endpoint(hook) if "://" in hook else load_hook(hook))
