"""A directory that is written over holds the old checkpoint or the new one, whenever the writer dies, and nothing of
anybody else is lost. What is loaded is the files' own copy, and a changed file is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CACHED, PROMPTED, TINY, random_tokens, random_weights
from safetensors.torch import load_file, save_file

import fastigpt
from fastigpt import CheckpointError, ImageGPT, ImageGPTConfig, Palette, checkpoint
from fastigpt.prompts import Vocabulary
from fastigpt.save import NEW

WIDER = ImageGPTConfig(n_layer=1, n_head=1, n_embd=16, height=4, width=4, n_colors=9)


def palette(seed: int) -> Palette:
    return Palette(np.random.default_rng(seed).uniform(-1, 1, (9, 3)).astype(np.float32))


def model(config: ImageGPTConfig = TINY, seed: int = 0, colors: Palette | None = None) -> ImageGPT:
    vocabulary = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3) if config.n_words else None
    weights = random_weights(config, seed)
    return ImageGPT(config, weights, palette=colors, vocabulary=vocabulary, backend="portable", device="cpu")


def load(folder: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(folder, backend="portable", device="cpu")


def same(one: ImageGPT, other: ImageGPT) -> bool:
    return (
        one.config == other.config
        and one.palette == other.palette
        and one.vocabulary == other.vocabulary
        and one.weights.keys() == other.weights.keys()
        and all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())
    )


# Dies at the k-th change of the file system made in the folder. Every function of os that changes it counts.
DYING = """
    import os, sys
    from pathlib import Path
    from fastigpt import ImageGPT
    import fastigpt.save
    source, target, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = ImageGPT.from_pretrained(source, backend="portable", device="cpu")
    calls = 0
    def counted(function):
        def run(*args, **kwargs):
            global calls
            calls += 1
            if calls == k:
                os._exit(9)
            return function(*args, **kwargs)
        return run
    for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    fill = fastigpt.save.replace
    model.save_pretrained(target)
    os._exit(0)
"""


def save_and_die(source: Path, target: Path, k: int) -> bool:
    """Whether it died."""
    command = [sys.executable, "-c", textwrap.dedent(DYING), str(source), str(target), str(k)]
    code = subprocess.run(command, check=False).returncode
    assert code in (0, 9)
    return code == 9


def forked_save(source: ImageGPT, target: Path, k: int) -> bool:
    """Saves in a child that dies at the k-th change of the file system; whether it died. Forked, because a new
    interpreter takes seconds to import torch; nothing is computed in the child."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(function):
            def run(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == k:
                    os._exit(9)
                return function(*args, **kwargs)

            return run

        try:
            for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod"):
                setattr(os, name, dying(getattr(os, name)))
            source.save_pretrained(target)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_save_that_dies_at_any_step_leaves_the_old_or_the_new(tmp_path):
    """With a prompt and a palette, without, and back: what only one of them has must not stay beside the other."""
    old, new = model(PROMPTED, 1, palette(1)), model(WIDER, 2)
    for first, second in ((old, new), (new, old), (old, model(PROMPTED, 3, palette(3)))):
        seen = set()
        k = died = 1
        while died:
            folder = tmp_path / f"{id(first)}-{id(second)}-{k}"
            first.save_pretrained(folder)
            (folder / "notes.txt").write_text("mine")
            (folder / "training").mkdir()
            (folder / "training" / "state.pt").write_text("mine")
            died = forked_save(second, folder, k)
            found = load(folder)
            assert same(found, first) or same(found, second)
            seen.add(same(found, second))
            assert (folder / "notes.txt").read_text() == (folder / "training" / "state.pt").read_text() == "mine"
            # The next save finishes what was left, and leaves nothing of it.
            first.save_pretrained(folder)
            assert same(load(folder), first)
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
            k += 1
        assert seen == {False, True}


def test_dying_in_another_process_is_the_same(tmp_path):
    """Once with a fresh interpreter, killed between the files."""
    old, new = model(TINY, 1, palette(1)), model(TINY, 2, palette(2))
    old.save_pretrained(tmp_path / "m")
    new.save_pretrained(tmp_path / "new")
    assert save_and_die(tmp_path / "new", tmp_path / "m", 10)
    assert same(load(tmp_path / "m"), old) or same(load(tmp_path / "m"), new)


def test_readers_that_know_nothing_of_it_find_no_mixture(tmp_path, monkeypatch):
    """Between the moment the new one counts and its last file there is no config.json to open."""
    model(TINY, 1, palette(1)).save_pretrained(tmp_path / "m")
    states = []
    replace = os.replace

    def watched(source, target):
        replace(source, target)
        states.append({path.name for path in (tmp_path / "m").iterdir()})

    monkeypatch.setattr(os, "replace", watched)
    model(TINY, 2, palette(2)).save_pretrained(tmp_path / "m")
    assert len(states) == 4  # the new checkpoint as a whole, two files, config.json
    assert all("config.json" not in names for names in states[1:-1]) and "config.json" in states[-1]


def test_a_model_without_palette_or_prompt_leaves_none_of_the_older(tmp_path):
    model(PROMPTED, 1, palette(1)).save_pretrained(tmp_path)
    np.save(tmp_path / "clusters.npy", palette(1).clusters)
    model(TINY, 2).save_pretrained(tmp_path)
    assert load(tmp_path).palette is None and load(tmp_path).vocabulary is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_palette_that_is_not_read_stays(tmp_path):
    np.save(tmp_path / "kmeans_centers.npy", palette(5).clusters)
    model(TINY, 2, palette(2)).save_pretrained(tmp_path)
    assert load(tmp_path).palette == palette(2)
    assert Palette.from_file(tmp_path / "kmeans_centers.npy") == palette(5)


def test_a_failed_save_is_forgotten(tmp_path, monkeypatch):
    old = model(PROMPTED, 1, palette(1))
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("fastigpt.families.image_gpt.checkpoint.save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TINY, 2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_hostile_leftovers_of_a_save(tmp_path):
    """The folder that a save leaves when it dies may be made up, too."""
    model(TINY, 1, palette(1)).save_pretrained(tmp_path)
    (tmp_path / NEW).mkdir()
    assert same(load(tmp_path), model(TINY, 1, palette(1)))  # without its list of files it counts for nothing
    for text in ("[", "[" * 100_000, "{}", '["config.json"]', '["../x", 3, null]', '["model.safetensors"]'):
        (tmp_path / NEW / "files.json").write_text(text)
        try:
            load(tmp_path)
        except CheckpointError:
            continue


@pytest.mark.parametrize("backend", [*CACHED, "reference"])
def test_weights_belong_to_the_model_not_to_their_file(tmp_path, backend):
    """Truncated, overwritten in place, removed: the model draws and saves what it read."""
    model(TINY, 1, palette(1)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    loaded = ImageGPT.from_pretrained(tmp_path, backend=backend, device="cpu", dtype="float32")
    tokens = random_tokens(TINY, 1)
    before = loaded.logits(tokens)
    data = file.read_bytes()
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * len(data))
    assert torch.equal(loaded.logits(tokens), before)
    os.truncate(file, 100)
    assert torch.equal(loaded.logits(tokens), before)
    loaded.save_pretrained(tmp_path)
    assert same(load(tmp_path), model(TINY, 1, palette(1)))


def test_saving_over_the_directory_a_model_came_from(tmp_path):
    model(TINY, 1, palette(1)).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert same(load(tmp_path), loaded)


def test_tensors_that_share_memory_are_saved_and_read(tmp_path):
    weights = random_weights(TINY)
    big = torch.randn(40, 16)
    weights["lm_head.weight"], weights["transformer.wte.weight"] = big[:9], big[:10]
    weights["transformer.wpe.weight"] = torch.randn(16, 1).expand(16, 16)
    shared = ImageGPT(TINY, weights, backend="portable")
    shared.save_pretrained(tmp_path / "m")
    assert same(load(tmp_path / "m"), shared)
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].contiguous()
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "m" / "pytorch_model.bin")
    assert same(load(tmp_path / "m"), shared)


def test_a_directory_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    old, new = model(TINY, 1, palette(1)), model(WIDER, 2, palette(2))
    old.save_pretrained(tmp_path)
    read_json = checkpoint.read_json
    saves = [new]

    def meanwhile(path):
        data = read_json(path)
        if saves and path.name == "config.json":
            saves.pop().save_pretrained(tmp_path)
        return data

    monkeypatch.setattr(checkpoint, "read_json", meanwhile)
    assert same(load(tmp_path), new)


def test_a_path_is_loaded_again_when_its_files_have_changed(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    first, second = model(TINY, 1, palette(1)), model(TINY, 2, palette(2))
    first.save_pretrained(folder)

    def drawn(**kwargs):
        return fastigpt.sample(2, seed=0, model=kwargs.pop("at", folder), output_type="tokens", **kwargs)

    options = {"backend": "portable", "dtype": "float32", "device": "cpu"}
    one = drawn(**options)
    assert torch.equal(drawn(**options), one)
    second.save_pretrained(folder)
    two = drawn(**options)
    assert torch.equal(two, second.sample(2, seed=0, output_type="tokens")) and not torch.equal(one, two)
    # In place, by somebody else's tools, with the time of the file set back.
    at = (folder / "model.safetensors").stat()
    save_file(load_file(folder / "model.safetensors") | first.weights, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(at.st_atime_ns, at.st_mtime_ns))
    assert torch.equal(drawn(**options), one)
    # The same relative name means another directory elsewhere.
    second.save_pretrained(tmp_path / "elsewhere" / "m")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(drawn(at="m", **options), one)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(drawn(at="m", **options), two)


def test_a_model_that_is_kept_is_not_loaded_twice(tmp_path, monkeypatch):
    model(TINY, 1, palette(1)).save_pretrained(tmp_path)
    loads = []
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda folder: loads.append(folder) or read(folder))
    for _ in range(3):
        fastigpt.sample(1, seed=0, model=tmp_path, output_type="tokens", backend="portable")
    assert len(loads) == 1


def test_a_draft_is_loaded_again_when_its_files_have_changed(tmp_path, monkeypatch):
    target = model(TINY, 1)
    model(WIDER, 2).save_pretrained(tmp_path)
    loads = []
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda folder: loads.append(folder) or read(folder))
    tokens = [target.sample(1, seed=0, draft=tmp_path, output_type="tokens") for _ in range(2)]
    model(WIDER, 3).save_pretrained(tmp_path)
    tokens.append(target.sample(1, seed=0, draft=tmp_path, output_type="tokens"))
    assert len(loads) == 2 and all(torch.equal(tokens[0], other) for other in tokens)


@pytest.mark.parametrize("positions", [17, 18, 40])
def test_positions_behind_the_canvas_are_not_saved(tmp_path, positions):
    """What is written has the canvas's positions and loads the same again, here and in transformers."""
    before = model(TINY, 1, palette(1))
    before.save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    more = torch.cat([weights["transformer.wpe.weight"], torch.randn(positions - 16, 16)])
    save_file({**weights, "transformer.wpe.weight": more}, tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"n_positions": positions}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    extra = load(tmp_path / "m")
    assert same(extra, before)
    extra.save_pretrained(tmp_path / "again")
    assert same(load(tmp_path / "again"), before)
