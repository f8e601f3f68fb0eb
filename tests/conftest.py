"""What tests share: small random models, the engines that every suite runs on, and how work is spread over cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: no library may take all cores for itself
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

# Tests must not reach for the network; the hub is only ever asked for what is in its local cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from llama_blocks import LLAMA, llama
from transformers import ImageGPTConfig as HfConfig
from transformers import ImageGPTForCausalImageModeling

from fastigpt.engine import Engine, Window, loop
from fastigpt.engine.choose import BACKENDS, build, why_unavailable
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.job import Filled, Request
from fastigpt.sampling import Drawing

# The models here are tiny: torch's threads would only wait for each other.
torch.set_num_threads(1)

_MOST_PROCESSES = 8  # each imports torch and transformers: more would start longer than they help

CPU = torch.device("cpu")
CACHED = [name for name in BACKENDS if name != "reference" and why_unavailable(name, CPU) is None]

TINY = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, height=4, width=4, n_colors=9)
ODD = ImageGPTConfig(n_layer=3, n_head=3, n_embd=15, n_inner=37, height=3, width=5, n_colors=7)
PROMPTED = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, height=4, width=4, n_colors=9, n_words=5, prompt_length=3)
SMALLER = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=4, width=4, n_colors=9)
HEAD_DIM_96 = ImageGPTConfig(n_layer=2, n_head=2, n_embd=192, height=8, width=8)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Folders are tested by a process for each core; single files are not worth starting several. -n and --pdb decide
    otherwise, and without pytest-xdist there is one process."""
    options = config.option
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.pluginmanager.has_plugin("xdist"):
        return
    chosen = options.numprocesses is not None or options.dist != "no" or options.usepdb or options.collectonly
    if not chosen and any(Path(argument).is_dir() for argument in config.args):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.numprocesses = min(cores, _MOST_PROCESSES) if cores > 1 else 0
        options.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First what takes ten minutes of one process, or the others would wait for it at the end.
    items.sort(key=lambda item: "a_dry_run_walks" not in item.name)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


# Tables that a person wants to see when all is well: captured output would only show them when a test fails. They
# travel in a test's report, which reaches the process that writes the summary from whichever process ran the test.
@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A function that puts a table below pytest's own summary."""
    return lambda table: request.node.user_properties.append(("table", table))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, table in report.user_properties:
                    if name == "table":
                        terminalreporter.write_line("")
                        terminalreporter.write_line(table)


@pytest.fixture(scope="session", autouse=True)
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests make no certificates where the user's own are."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


def random_weights(
    config: ImageGPTConfig, seed: int = 0, *, biases: bool = False, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Weights whose logits spread over several nats, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**config.tensor_shapes(), **(config.bias_shapes() if biases else {})}
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weights[name] = 1 + 0.2 * noise
        elif name.endswith("bias"):
            weights[name] = 0.3 * noise
        elif ".h." in name:
            weights[name] = noise * shape[0] ** -0.5
        else:
            weights[name] = noise * (shape[-1] ** -0.5 if name == "lm_head.weight" else 0.5)
    return {name: tensor * scale for name, tensor in weights.items()}


def huggingface_model(config: ImageGPTConfig, weights: dict[str, torch.Tensor]) -> ImageGPTForCausalImageModeling:
    """transformers' own model with these weights; biases that are absent are zero."""
    theirs = HfConfig(
        vocab_size=config.n_colors + 1,
        n_positions=config.n_pixels,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
    )
    model = ImageGPTForCausalImageModeling(theirs).eval()
    zeros = {name: torch.zeros(shape) for name, shape in config.bias_shapes().items()}
    missing, unexpected = model.load_state_dict({**zeros, **weights}, strict=False)
    assert not missing and not unexpected
    return model


def random_tokens(config: ImageGPTConfig, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.n_colors, (n, config.n_pixels), generator=torch.Generator().manual_seed(seed))


PLAIN = Drawing()


def engine(backend: str, config: ImageGPTConfig, weights: dict[str, torch.Tensor], **kwargs: object) -> Engine:
    spec, canonical = image_gpt.spec(config), image_gpt.canonical(config, weights)
    return build(spec, canonical, backend=backend, device="cpu", **kwargs)  # type: ignore[arg-type]


def prefixes(engine: Engine, words: torch.Tensor) -> torch.Tensor:
    """int64 [n, L]: what an engine reads for prompts int64 [n, prompt_length]: the words, then start."""
    start = torch.tensor(engine.spec.unconditional).expand(len(words), -1)
    return torch.cat([words, start], 1)


def requests(
    engine: Engine,
    tokens: torch.Tensor,
    drawing: Drawing = PLAIN,
    *,
    prompt: torch.Tensor | None = None,
    first_index: int = 0,
    **kwargs: Any,
) -> list[Request]:
    """A request for each canvas of tokens int64 [n, n_positions], −1 = draw; image indices count from first_index.
    prompt: int64 [n, prompt_length]. kwargs: stop, score."""
    unconditional = engine.spec.unconditional
    read = [unconditional] * len(tokens)
    if prompt is not None:
        read = [tuple(row) for row in prefixes(engine, prompt).tolist()]
    negative = None if drawing.guidance_scale is None else unconditional
    return [
        Request(canvas, first_index + i, drawing, prefix, negative, **kwargs)
        for i, (canvas, prefix) in enumerate(zip(tokens, read))
    ]


def fill(
    engine: Engine,
    tokens: torch.Tensor,
    drawing: Drawing = PLAIN,
    *,
    prompt: torch.Tensor | None = None,
    first_index: int = 0,
    window: Window = 1,
    draft: Engine | None = None,
    on_row: loop.OnRow | None = None,
    batch_size: int | None = None,
) -> Filled:
    """`requests`, drawn by the loop, at window 1 if no other is asked for."""
    canvases = requests(engine, tokens, drawing, prompt=prompt, first_index=first_index)
    return loop.run(engine, canvases, window=window, draft=draft, on_row=on_row, batch_size=batch_size)[0]


@pytest.fixture(params=CACHED)
def backend(request: pytest.FixtureRequest) -> str:
    """Every engine with a cache that runs on this machine's CPU."""
    return request.param


def exact(backend: str, config: ImageGPTConfig = PROMPTED, seed: int = 31) -> Engine:
    """In float32, whose tokens are the reference's."""
    return engine(backend, config, random_weights(config, seed), dtype="float32", kv_dtype="float32")


ENGINES = ["reference", *CACHED]


@pytest.fixture(params=[*ENGINES, *(f"{name}-llama" for name in ENGINES)])
def tested(request: pytest.FixtureRequest) -> Engine:
    """Every engine that runs on this machine's CPU, in float32, of the model that reads prompts, and of a model of
    Llama's blocks that reads the same."""
    backend, _, blocks = request.param.partition("-")
    return llama(backend, dtype="float32") if blocks else exact(backend)


@pytest.fixture
def truth(request: pytest.FixtureRequest) -> Engine:
    """What `tested` is held to."""
    if "tested" in request.fixturenames and request.getfixturevalue("tested").spec == LLAMA:
        return llama("reference")
    return exact("reference")
