"""One set of options: named once, checked once, and seen by everybody who looks at a signature or asks for help."""

from __future__ import annotations

import ast
import inspect
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_weights

import fastigpt
from fastigpt import ImageGPT
from fastigpt.options import CompleteOptions, DrawOptions, JobOptions, LoadOptions, ModelOptions

PACKAGE = Path(fastigpt.__file__).parent
DRAWING = [
    (fastigpt.sample, (JobOptions, LoadOptions)),
    (fastigpt.complete, (CompleteOptions, LoadOptions)),
    (fastigpt.load, (LoadOptions,)),
    (ImageGPT.__init__, (ModelOptions,)),
    (ImageGPT.from_pretrained, (LoadOptions,)),
    (ImageGPT.from_config, (LoadOptions,)),
    (ImageGPT.sample, (JobOptions,)),
    (ImageGPT.complete, (CompleteOptions,)),
    (ImageGPT.fill, (JobOptions,)),
    (ImageGPT.stream, (DrawOptions,)),
    (ImageGPT.generate, (DrawOptions,)),
]


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    return ImageGPT(TINY, random_weights(TINY), backend="portable")


@pytest.mark.parametrize("name", ["api.py", "model.py", "drawing.py", "filling.py", "generating.py", "scoring.py"])
def test_no_signature_has_more_than_eight_parameters(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            a = node.args
            names = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            assert len(names) <= 8, f"{name}:{node.lineno} has {len(names)} parameters"


@pytest.mark.parametrize(("function", "options"), DRAWING, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures_and_help_list_every_option_with_its_meaning(function, options):
    parameters = inspect.signature(function).parameters
    text = inspect.getdoc(function)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    for fields in options:
        for name, hint in fields.__annotations__.items():
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert f"    {name}: {hint.__metadata__[0][:40]}" in text
    for name in parameters.keys() - {"self", "cls"}:
        assert name in text, f"{function.__qualname__} does not say what {name} is"


def test_defaults_in_signatures_are_those_that_hold(model):
    parameters = inspect.signature(ImageGPT.sample).parameters
    stated = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert stated["temperature"] is None and stated["window"] == "auto" and stated["first_index"] == 0
    given = {**stated, "seed": 3, "output_type": "tokens"}
    assert torch.equal(model.sample(2, **given), model.sample(2, seed=3, output_type="tokens"))


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda model: model.sample(1, temprature=0.5), "temperature"),
        (lambda model: model.complete(None, 1, row=3), "rows"),
        (lambda model: model.fill(torch.zeros(1, 16, dtype=torch.int64), on_rows=print), "on_row"),
        (lambda model: model.stream(1, fist_index=3), "first_index"),
        (lambda model: model.generate(torch.tensor([[9]]), max_lenght=4), "max_length"),
        (lambda model: fastigpt.sample(1, models="x"), "model"),
        (lambda model: fastigpt.complete(None, particle=2), "particles"),
        (lambda model: fastigpt.load("x", d_type="float32"), "dtype"),
        (lambda model: ImageGPT.from_config(TINY, kvdtype="int8"), "kv_dtype"),
    ],
)
def test_a_keyword_that_is_no_option_is_told_with_those_near_it(model, call, near):
    with pytest.raises(TypeError, match=f"has no argument .*{near}"):
        call(model)


def test_options_of_one_call_do_not_reach_another(model):
    options = {"seed": 1, "progress": False}
    model.fill(torch.full((1, 16), -1), **options)
    model.generate(torch.tensor([[9]]), seed=2)
    assert options == {"seed": 1, "progress": False}


def test_large_windows_and_filters_mean_the_largest_there_are(model):
    expected = model.sample(2, seed=0, output_type="tokens")
    assert torch.equal(expected, model.sample(2, seed=0, output_type="tokens", window=3 * 10**9, top_k=2**40))


@pytest.mark.parametrize("index", [0, 2**31, 2**48, 2**63 - 2])
def test_images_of_every_index_can_be_drawn_alone_and_in_a_job(model, index):
    job = model.sample(2, seed=0, first_index=index, output_type="tokens")
    assert torch.equal(job[1], model.sample(1, seed=0, first_index=index + 1, output_type="tokens")[0])
    with pytest.raises(ValueError, match="first_index"):
        model.sample(2, first_index=2**63 - 1, output_type="tokens")


@pytest.mark.parametrize("device", ["meta", "xpu", "cuda:99", "mps:3", "vulkan", "cpu:x", "", "nonsense"])
def test_devices_that_are_not_here_are_refused_by_name(device):
    with pytest.raises(ValueError, match="device"):
        ImageGPT.from_config(TINY, device=device)


def test_generate_reads_prompts_and_indices_as_the_other_calls_do(model):
    start = torch.tensor([[TINY.start_token]])
    drawn = model.generate(start, do_sample=True, seed=5, first_index=7, num_return_sequences=2)
    assert torch.equal(drawn[:, 1:], model.sample(2, seed=5, first_index=7, output_type="tokens"))


def test_return_types_are_checked_where_the_package_is():
    config = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "tests/typing" in config["files"] and config["warn_unused_ignores"]
