"""Training: goes on bit for bit after SIGKILL, refuses another configuration, survives bad files and full disks."""

import csv
import errno
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastigpt.codecs.palette import Palette
from fastigpt.errors import CheckpointError
from fastigpt.families.image_gpt.checkpoint import Checkpoint
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.image_gpt.network import Network
from fastigpt.model import ImageGPT
from fastigpt.training import report
from fastigpt.training.data import HELD_OUT_SEED, Folder, Scenes, fit_palette, scene_vocabulary
from fastigpt.training.train import train

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 5, "warmup": 3, "dtype": "float32", "threads": 1,
    "log_every": 5, "sample_every": 1000, "save_seconds": 1e-9, "progress": False,
}  # fmt: skip


@pytest.fixture
def palette(tmp_path):
    """A training folder that has its palette already: k-means takes seconds."""

    def prepare(name):
        folder = tmp_path / name
        (folder / "training").mkdir(parents=True)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 8)] * 3, indexing="ij"), -1).reshape(-1, 3)
        np.save(folder / "training" / "clusters.npy", grid.astype(np.float32))
        return folder

    return prepare


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """Grids of samples take seconds as well; one test draws them."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(report, "sample_grid", lambda *arguments, **named: None)
    yield
    torch.set_num_threads(threads)


def weights(folder):
    state = torch.load(folder / "training" / "state.pt", weights_only=True)
    return {**state["network"], **{"ema." + name: tensor for name, tensor in state["ema"].items()}}


# Killed while it writes its state for the eighth time: the seventh is what is left.
KILLED = """
import ast, os, signal, sys
from pathlib import Path
from fastigpt.training.train import train

folder, state, settings = Path(sys.argv[1]), Path(sys.argv[2]), ast.literal_eval(sys.argv[3])
fsync, written = os.fsync, []


def fsync_or_die(file):
    written.append(state.exists())
    if sum(written) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)


os.fsync = fsync_or_die
train(folder, **settings)
"""


def test_a_killed_training_ends_with_the_same_weights(palette):
    whole, killed = palette("whole"), palette("killed")
    settings = TINY | {"steps": 15}
    train(whole, **settings)
    state = killed / "training" / "state.pt"
    process = subprocess.run([sys.executable, "-c", KILLED, killed, state, repr(settings)], check=False)
    assert process.returncode == -signal.SIGKILL
    step = torch.load(state, weights_only=True)["step"]
    assert step == 7
    train(killed, **settings)
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["step"] for row in csv.DictReader((killed / "training" / "log.csv").open())] == ["5", "10", "15"]


def test_what_it_leaves_is_a_checkpoint_that_draws_from_prompts(palette, monkeypatch):
    monkeypatch.undo()
    folder = train(palette("run"), **TINY | {"steps": 3})
    with Image.open(folder / "training" / "samples-000003.png") as grid:
        assert grid.size == (512, 512)
    assert (folder / "training" / "loss.png").stat().st_size > 1000
    model = ImageGPT.from_pretrained(folder)
    assert model.vocabulary is not None and model.config.n_words == model.vocabulary.n_words
    tokens = model.encode(Image.new("RGB", (32, 32), "white"))
    assert model.nll(tokens, prompt="a red house").isfinite().all()


def test_another_configuration_is_refused_by_name(palette):
    folder = palette("run")
    train(folder, **TINY | {"steps": 2})
    before = weights(folder)
    with pytest.raises(ValueError, match=r"n_embd: 16 there, 32 here; .*learning_rate: 0.003 there, 0.001 here"):
        train(folder, **TINY | {"steps": 2, "n_embd": 32, "learning_rate": 1e-3})
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(folder).items())


def test_a_full_disk_leaves_the_last_good_state(palette, monkeypatch):
    folder = palette("run")
    saves = []
    save = torch.save

    def full(state, path):
        saves.append(path)
        save(state, path)
        if len(saves) == 3:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(folder, **TINY | {"steps": 10})
    assert torch.load(folder / "training" / "state.pt", weights_only=True)["step"] == 2
    assert sorted(p.name for p in (folder / "training").iterdir()) == ["clusters.npy", "log.csv", "state.pt"]
    monkeypatch.setattr(torch, "save", save)
    train(folder, **TINY | {"steps": 10})
    assert torch.load(folder / "training" / "state.pt", weights_only=True)["step"] == 10


def test_a_damaged_state_is_named(palette):
    folder = palette("run")
    (folder / "training" / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        train(folder, **TINY | {"steps": 2})


@pytest.mark.slow
def test_training_lowers_the_loss(palette):
    folder = train(palette("run"), **TINY | {"steps": 60, "n_embd": 32, "batch_size": 4})
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "training" / "log.csv").open())]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 1


# --- from a checkpoint -----------------------------------------------------------------------------------------------


def checkpoint_of_scenes(folder, **wrong):
    """A tiny checkpoint that reads the scenes' words, with random weights."""
    vocabulary = scene_vocabulary()
    config = ImageGPTConfig(
        1, 2, 16, n_colors=8, n_words=vocabulary.n_words, prompt_length=vocabulary.max_words, **wrong
    )
    network = Network(config, seed=3)
    palette = Palette(np.random.default_rng(0).uniform(-1, 1, (8, 3)))
    Checkpoint(config, dict(network.state_dict()), palette, vocabulary).write(folder)
    return folder, network, palette


def test_training_starts_from_a_checkpoint(tmp_path, monkeypatch):
    start, network, palette = checkpoint_of_scenes(tmp_path / "start")
    settings = {k: v for k, v in TINY.items() if not k.startswith("n_")} | {"steps": 2, "learning_rate": 1e-12}
    folder = train(tmp_path / "run", init=start, **settings)
    model = ImageGPT.from_pretrained(folder, dtype="float32")
    assert model.vocabulary is not None and np.array_equal(model.palette.clusters, palette.clusters)
    for name, expected in network.state_dict().items():  # steps of 1e-12 change next to nothing
        torch.testing.assert_close(weights(folder)[name], expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"init: .*start.* there, None here"):
        train(folder, n_layer=1, n_head=2, n_embd=16, **settings)


def test_images_take_a_checkpoints_shape_and_palette_but_not_its_prompt(tmp_path):
    start, network, palette = checkpoint_of_scenes(tmp_path / "start")
    settings = {k: v for k, v in TINY.items() if not k.startswith("n_")} | {"steps": 2, "learning_rate": 1e-12}
    folder = train(tmp_path / "run", images=photos(tmp_path / "photos", 3), init=start, **settings)
    model = ImageGPT.from_pretrained(folder)
    assert model.vocabulary is None and (model.config.height, model.config.n_embd) == (32, 16)
    assert np.array_equal(model.palette.clusters, palette.clusters)
    expected = network.state_dict()["lm_head.weight"]
    torch.testing.assert_close(weights(folder)["lm_head.weight"], expected, rtol=1e-6, atol=1e-9)


def test_what_no_training_can_start_from_is_refused(tmp_path):
    start, *_ = checkpoint_of_scenes(tmp_path / "start")
    wide, *_ = checkpoint_of_scenes(tmp_path / "wide", height=8, width=16)
    plain = ImageGPT.from_config(ImageGPTConfig(1, 2, 16, height=32, width=32, n_colors=8), seed=0)
    plain.save_pretrained(tmp_path / "plain")
    images = photos(tmp_path / "photos", 3)
    for arguments, message in (
        ({"init": start, "n_embd": 32}, "n_embd: 16 there, 32 asked for"),
        ({"init": start, "resolution": 16}, "height: 32 there, 16 asked for"),
        ({"init": wide, "images": images}, "square canvas.* 8 × 16"),
        ({"init": tmp_path / "plain", "images": images}, "has no palette"),
        ({"init": tmp_path / "plain"}, "has no palette"),
        ({"init": tmp_path / "nothing"}, "no directory"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=message):
            train(tmp_path / "run", steps=2, **arguments)
        assert not (tmp_path / "run").exists()


# --- a folder of images ----------------------------------------------------------------------------------------------


def photos(path, n, side=24):
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = np.full((side, 2 * side, 3), rng.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{k}.png")
    return path


def test_own_images_train_with_their_own_palette(tmp_path):
    folder = train(tmp_path / "run", images=photos(tmp_path / "photos", 24), resolution=4, **TINY | {"steps": 4})
    model = ImageGPT.from_pretrained(folder)
    assert model.vocabulary is None and (model.config.height, model.config.width) == (4, 4)
    with Image.open(tmp_path / "photos" / "3.png") as image:
        color = np.asarray(image)[0, 0]
        np.testing.assert_allclose(model.decode(model.encode(image))[0, 0, 0], color, atol=1)


def test_unreadable_images_are_named_skipped_and_counted(tmp_path):
    path = photos(tmp_path / "photos", 3)
    (path / "broken.png").write_bytes((path / "0.png").read_bytes()[:60])
    (path / "text.jpg").write_text("no image")
    (path / "notes.txt").write_text("not even called one")
    said = []
    data = Folder(path, 4, n_colors=8, seed=0, warn=said.append)
    assert data.n_skipped == 2 and data.name.startswith("3 images")
    assert "broken.png" in said[0] and "text.jpg" in said[1] and said[2] == "skipped 2 of 5 files"


def test_a_refused_training_leaves_nothing_behind(tmp_path):
    for name in ("empty", "good"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "good" / "a.png")
    for wrong, message in (
        ({"images": tmp_path / "empty"}, "no images in"),
        ({"images": tmp_path / "missing"}, "must be a folder"),
        ({"images": tmp_path / "good", "n_head": 3}, "n_head"),
        ({"images": tmp_path / "good", "device": "cuda:99"}, "cuda|CUDA"),
    ):
        with pytest.raises((ValueError, RuntimeError, AssertionError), match=message):
            train(tmp_path / "deep" / "run", **TINY | {"steps": 2} | wrong)
        assert not (tmp_path / "deep").exists()
    with pytest.raises(NotADirectoryError, match=r"a\.png is a file"):
        train(tmp_path / "good" / "a.png" / "run", **TINY | {"steps": 2})


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        train(tmp_path / "run", images=tmp_path / "empty", **TINY | {"steps": 2})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no images in .*1 could not be read"):
        train(tmp_path / "run", images=tmp_path / "bad", **TINY | {"steps": 2})
    with pytest.raises(ValueError, match="must be a folder"):
        train(tmp_path / "run", images=tmp_path / "missing", **TINY | {"steps": 2})


def test_held_out_images_are_never_trained_on(tmp_path):
    path = photos(tmp_path / "photos", 40)
    data = Folder(path, 2, n_colors=64, seed=0, warn=print)
    held = {tuple(row) for row in data.held_out(10).tokens.tolist()}
    trained = {tuple(row) for step in range(40) for row in data.batch(step, 16).tokens.tolist()}
    assert len(held) == 2 and len(trained) == 38 and not held & trained


@pytest.mark.parametrize("n_colors", [1, 3, 16, None])
def test_a_training_has_as_many_colours_as_were_asked_for_and_there_are(tmp_path, capsys, n_colors):
    (tmp_path / "digits").mkdir()
    for k in range(4):
        Image.fromarray((np.arange(64, dtype=np.uint8).reshape(8, 8) + k) // 13 * 50).save(
            tmp_path / "digits" / f"{k}.png"
        )
    folder = train(tmp_path / "run", images=tmp_path / "digits", resolution=8, n_colors=n_colors, **TINY | {"steps": 2})
    model = ImageGPT.from_pretrained(folder)
    n_there = 6
    assert model.config.n_colors == model.palette.n_colors == min(n_colors or 512, n_there)
    said = f"the images have 6 different colours, so the palette has 6, not {n_colors or 512}"
    assert (said in capsys.readouterr().err) == ((n_colors or 512) > n_there)
    assert (model.palette.colors.max(1) - model.palette.colors.min(1)).max() <= 1  # no colour that is not grey
    assert model.sample(1, seed=0, output_type="tokens").max() < model.config.n_colors
    train(folder, images=tmp_path / "digits", resolution=8, n_colors=n_colors, **TINY | {"steps": 2})  # goes on
    if n_colors == 3:
        with pytest.raises(ValueError, match="n_colors is 16, but the palette that is there has 3"):
            train(folder, images=tmp_path / "digits", resolution=8, n_colors=16, **TINY | {"steps": 2})


def test_a_training_takes_a_palette_of_ones_own(tmp_path):
    own = Palette(np.random.default_rng(1).uniform(-1, 1, (5, 3)))
    np.save(tmp_path / "own.npy", own.clusters)
    images = photos(tmp_path / "photos", 3)
    for k, given in enumerate((own, tmp_path / "own.npy")):
        folder = train(tmp_path / str(k), images=images, resolution=4, palette=given, **TINY | {"steps": 1})
        assert ImageGPT.from_pretrained(folder).palette == own
    other = Palette(own.clusters[::-1])
    for arguments, says in (
        ({"palette": other}, "palette is not that of the training which"),
        ({"palette": own, "n_colors": 4}, "n_colors is 4, but palette has 5"),
        ({"palette": tmp_path / "no.npy"}, r"no\.npy does not exist"),
        ({"palette": other, "init": tmp_path / "0"}, "palette is not that of init"),
        ({"n_colors": 4, "init": tmp_path / "0"}, "n_colors: 5 there, 4 asked for"),
    ):
        settings = TINY if "init" not in arguments else {k: v for k, v in TINY.items() if not k.startswith("n_")}
        with pytest.raises(ValueError, match=says):
            train(tmp_path / "0", images=images, resolution=4, **settings | {"steps": 1} | arguments)


def test_a_state_of_something_else_is_named(palette):
    folder = palette("run")
    train(folder, **TINY | {"steps": 1})
    good = torch.load(folder / "training" / "state.pt", weights_only=True)
    for wrong in (
        [1, 2],
        {},
        good | {"identity": 3},
        good | {"ema": {}},
        good | {"optimizers": []},
        good | {"step": "x"},
    ):
        torch.save(wrong, folder / "training" / "state.pt")
        with pytest.raises(CheckpointError, match=r"state\.pt is no"):
            train(folder, **TINY | {"steps": 1})


# --- parts -----------------------------------------------------------------------------------------------------------


def test_batches_depend_on_the_step_alone():
    data = Scenes(5, Palette(np.random.default_rng(0).uniform(-1, 1, (16, 3))))
    a, b = data.batch(2, 6), data.batch(0, 18)
    assert torch.equal(a.tokens, b.tokens[12:]) and torch.equal(a.prompt, b.prompt[12:])
    assert a.tokens.shape == (6, 1024) and a.prompt.shape == (6, 16)
    with pytest.raises(ValueError, match="seed"):
        Scenes(HELD_OUT_SEED)


def test_a_palette_of_few_colours_holds_them_exactly():
    pixels = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0]] * 5, np.uint8)
    palette = fit_palette(pixels, 8, seed=0)
    assert palette.n_colors == 8
    np.testing.assert_array_equal(palette.decode(palette.encode(pixels)), pixels)


def test_scenes_have_one_size(tmp_path):
    with pytest.raises(ValueError, match="resolution=16 needs a folder"):
        train(tmp_path, resolution=16)
