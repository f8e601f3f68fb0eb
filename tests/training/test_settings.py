"""The numbers of a training: what is refused, by name and before any work, and what follows from the others."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastigpt.training.run import Run, Settings, warmup_for
from fastigpt.training.train import train

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "steps": 2, "batch_size": 5, "resolution": 4, "progress": False}


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (60, 6), (1000, 100), (3800, 100)])
def test_the_warm_up_fits_the_run(steps, warmup):
    settings = Settings(steps, warmup=warmup_for(steps))
    assert settings.warmup == warmup
    peak = max(Run.schedule(SimpleNamespace(settings=settings), step) for step in range(steps))
    assert peak == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("threads", value) for value in (0, -1, 1.5, "2", True, 10**6, 2**70)],
        *[("save_seconds", value) for value in (0, -1.0, float("nan"), "30", None, True)],
        *[("log_every", value) for value in (0, 2.5, float("nan"), "x", None)],
        ("sample_every", 0),
        *[("n_layer", value) for value in (0, -3, 1.5, "2")],
        ("n_head", 0),
        ("n_embd", 0),
        ("resolution", 0),
        *[("n_colors", value) for value in (0, 65537, 2.0, "16")],
        *[("steps", value) for value in (0, True, "10", float("inf"))],
        ("batch_size", "12"),
        ("learning_rate", "fast"),
        ("learning_rate", 10**400),
        ("ema_decay", None),
        ("warmup", -1),
        ("seed", 2**32),
        ("out", 3),
        ("images", 3),
        ("init", 3),
        *[("device", value) for value in ("nonsense", "meta", "cuda:99", "hpu", 3.5, "cpu:x")],
    ],
)
def test_hostile_numbers_are_refused_by_name_before_any_work(tmp_path, name, value):
    before = torch.get_num_threads()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    arguments = {"out": tmp_path / "run", "images": tmp_path, **TINY} | {name: value}
    with pytest.raises((TypeError, ValueError), match=name):
        train(**arguments)
    assert not (tmp_path / "run").exists() and torch.get_num_threads() == before


@pytest.mark.parametrize(("name", "value"), [("n_embd", 10**6), ("batch_size", 10**12), ("resolution", 4000)])
def test_sizes_that_no_machine_has_memory_for_are_refused_before_any_work(tmp_path, name, value):
    with pytest.raises(ValueError, match=r"more than \d+ GiB, \d+ are free: lower n_embd"):
        train(tmp_path / "run", images=tmp_path, **TINY | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("ema_decay", 1.0),
        ("prompt_dropout", -0.1),
        ("dtype", "int8"),
        ("seed", -1),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(TypeError if (name, value) == ("steps", 1.5) else ValueError, match=name):
        Settings(**{name: value})
