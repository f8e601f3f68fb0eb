"""Classes by name: ImageNet's, in any case, with synonyms; for one image, for many, for jobs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_defaults import CONFIG, tiny, tokens
from typer.testing import CliRunner

import fastigpt
from fastigpt import ImageGPT, jobs
from fastigpt.classes import ClassNames, imagenet
from fastigpt.cli import app
from fastigpt.families.llamagen import LlamaGen, LlamaGenConfig
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.store import open_store
from fastigpt.model import Model
from fastigpt.prompts import ClassReader

LINES = ("cat, house cat", "dog", "crane", "crane", "lynx, catamount", "puma, catamount", "crayfish",
         "spiny lobster, crayfish", "maillot", "maillot, tank suit")  # fmt: skip
NAMES = ClassNames(LINES)
HOW: dict[str, Any] = {"device": "cpu", "backend": "portable", "dtype": "float32"}


def test_there_are_a_thousand_in_the_order_in_which_models_number_them():
    names = imagenet()
    assert len(names.lines) == 1000 and all(names.lines)
    for number, name in {
        0: "tench",
        207: "golden retriever",
        360: "otter",
        817: "sports car",
        999: "toilet tissue",
    }.items():
        assert names.number(name) == number and names.lines[number].startswith(name)


@pytest.mark.parametrize(
    ("name", "number"),
    [("Golden Retriever", 207), (" golden_retriever ", 207), ("Tinca tinca", 0), ("T-shirt", 610), ("t shirt", 610),
     ("great white shark", 2), ("crayfish", 124), ("missile", 657), ("maillot, tank suit", 639)],
)  # fmt: skip
def test_names_are_read_as_people_write_them(name, number):
    assert imagenet().number(name) == number


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("crane", "label 'crane' names 2 classes: 134 is crane; 517 is crane. Give a number"),
        ("goldn retriever", r"is no class: .* 0 to 999, or a name \(near: golden retriever"),
        ("retriever", r"near: .*retriever"),
        ("", r"'' is no class"),
        ("x" * 500, "is no class"),
    ],
)
def test_what_is_ambiguous_or_unknown_is_told_with_what_it_may_be(name, told):
    with pytest.raises(ValueError, match=told) as error:
        imagenet().number(name)
    assert len(str(error.value)) < 400


def test_the_usual_name_of_a_class_is_that_class():
    assert NAMES.number("crayfish") == 6
    with pytest.raises(ValueError, match="4 is lynx, catamount; 5 is puma, catamount"):
        NAMES.number("catamount")


@pytest.fixture
def model() -> Model:
    found = Model(tiny(), **HOW)
    found.reader = ClassReader(CONFIG.n_classes, NAMES)
    return found


def test_one_for_all_or_one_for_each(model):
    how: dict[str, Any] = {"seed": 1, "output_type": "tokens"}
    expected = model.sample(3, label=[0, 1, 4], **how)
    assert torch.equal(model.sample(3, label=["House Cat", 1, "lynx"], **how), expected)
    assert torch.equal(model.sample(3, label=torch.tensor([0, 1, 4]), **how), expected)
    assert torch.equal(model.sample(3, label="dog", **how), model.sample(3, label=1, **how))
    with pytest.raises(ValueError, match="label has 2 entries for 3 images"):
        model.sample(3, label=["dog", "dog"], **how)
    for label, told in (
        (10, "label .*"),
        (-1, "label"),
        ("cow", "label 'cow' is no class"),
        ([1.5], "label must be"),
        (True, "label"),
    ):
        with pytest.raises((ValueError, TypeError), match=told):
            model.sample(1, label=label, **how)
    with pytest.raises(ValueError, match="knows no classes"):
        ImageGPT.from_config(fastigpt.ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=2, width=2)).sample(
            1, label="dog"
        )


def test_a_model_of_a_thousand_classes_knows_their_names():
    config = LlamaGenConfig(1, 2, 2, 16, 24, 12, 1000, 2, 3)
    reader = LlamaGen(config, {}).reader
    assert reader.prefix("golden retriever", "label") == (207,) == reader.prefix("207")
    assert tiny().reader.names is None


def test_the_command_line_takes_names(tmp_path, monkeypatch):
    monkeypatch.setattr("fastigpt.families.llamagen.imagenet", lambda: NAMES)
    (tmp_path / "a").mkdir()
    tiny().write(tmp_path / "model")
    drawn = []
    for label in ("dog", "1"):
        folder = tmp_path / label
        command = [
            "job",
            "run",
            str(folder),
            "-n",
            "2",
            "--seed",
            "1",
            "--model",
            str(tmp_path / "model"),
            "--label",
            label,
        ]
        result = CliRunner().invoke(app, [*command, "--device", "cpu", "--backend", "portable"])
        assert result.exit_code == 0, result.output
        drawn.append(tokens(folder))
    assert torch.equal(*drawn)


def prompts(folder: Path) -> list[str | None]:
    job = JobDirectory.open(open_store(folder))
    return [job.prompt(k) for shard in range(job.parameters.n_shards) for k in job.parameters.images(shard)]


def test_a_job_of_all_classes_has_as_many_of_each(tmp_path):
    tiny().write(tmp_path / "model")
    for _ in range(2):  # the same command goes on with it
        jobs.run(
            tmp_path / "job", 25, model=tmp_path / "model", labels="all", seed=1, first_index=5, progress=False, **HOW
        )
    counts = Counter(prompts(tmp_path / "job"))
    assert set(counts) == {str(k) for k in range(10)} and set(counts.values()) == {2, 3}
    assert prompts(tmp_path / "job")[0] == "5"
    model = fastigpt.load(tmp_path / "model", **HOW)
    alone = model.sample(1, label=7, seed=1, first_index=17, output_type="tokens")
    assert torch.equal(tokens(tmp_path / "job")[12:13], alone)
    with pytest.raises(ValueError, match="another job: prompts"):
        jobs.run(tmp_path / "job", labels=[1, 2], progress=False)


def test_a_job_reads_labels_from_a_file_or_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr("fastigpt.families.llamagen.imagenet", lambda: NAMES)
    tiny().write(tmp_path / "model")
    (tmp_path / "labels.txt").write_text("dog\n4\n")
    how: dict[str, Any] = {"model": tmp_path / "model", "seed": 1, "progress": False, **HOW}
    jobs.run(tmp_path / "a", 4, labels=tmp_path / "labels.txt", **how)
    jobs.run(tmp_path / "b", 4, labels=["dog", 4], **how)
    jobs.run(tmp_path / "c", 4, labels=[1, 4], **how)
    assert torch.equal(tokens(tmp_path / "a"), tokens(tmp_path / "b"))
    assert torch.equal(tokens(tmp_path / "a"), tokens(tmp_path / "c"))
    for wrong, told in (
        ({"labels": ["cow"]}, "line 1.*no class"),
        ({"labels": [10]}, "line 1"),
        ({"labels": "all", "prompts": ["1"]}, "prompts or labels, not both"),
        ({"labels": "all", "label": 3}, "not both"),
        ({"label": 3, "prompt": "3"}, "not both"),
    ):
        with pytest.raises(ValueError, match=told):
            jobs.run(tmp_path / "d", 4, **{**how, **wrong})
    assert not (tmp_path / "d" / "job.json").exists()
