"""A job is its images, whoever draws them: in one process or several, in parts, from any place that fsspec opens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import checkpoint, files, local

import fastigpt
from fastigpt import ImageGPT, jobs, signals
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.store import open_store

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "tiny")


@pytest.fixture
def prompted(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "prompted", prompted=True)


def tokens(path: Path | str) -> np.ndarray:
    return np.concatenate([some for _, some in JobDirectory.open(open_store(path)).shards()])


@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
def test_image_k_of_a_job_is_sample_of_one_image(tmp_path, tiny, backend):
    options: dict[str, Any] = {"seed": 7, "temperature": 0.9, "top_k": 5, "top_p": 0.95}
    path = tmp_path / "job"
    jobs.run(path, 11, model=tiny, first_index=3, shard_size=4, backend=backend, **options, **QUIET)
    drawn, model = tokens(path), fastigpt.load(tiny, backend=backend)
    assert drawn.dtype == np.uint16 and drawn.shape == (11, 16)
    for k in range(11):
        alone = model.sample(1, first_index=3 + k, output_type="tokens", **options)
        assert np.array_equal(drawn[k], alone[0].numpy())


def test_images_read_the_prompts_in_turn(tmp_path, prompted):
    lines = ["a red cat", "blue dog", "dog"]
    lines[0] = "red cat"
    path = tmp_path / "prompts.txt"
    path.write_text("\r\n".join(lines) + "\n")
    how: dict[str, Any] = {"model": prompted, "seed": 1, "guidance_scale": 1.5, "shard_size": 2, **QUIET}
    jobs.run(tmp_path / "job", 7, prompts=path, first_index=4, **how)
    model = fastigpt.load(prompted)
    for k, drawn in enumerate(tokens(tmp_path / "job"), 4):
        alone = model.sample(1, seed=1, first_index=k, prompt=lines[k % 3], guidance_scale=1.5, output_type="tokens")
        assert np.array_equal(drawn, alone[0].numpy())
    path.unlink()  # the job has its own
    jobs.run(tmp_path / "job", prompts=lines, **QUIET)
    other = jobs.run(tmp_path / "other", 7, prompt="red cat", **how)
    assert other.complete
    alone = model.sample(7, seed=1, prompt="red cat", guidance_scale=1.5, output_type="tokens")
    assert np.array_equal(tokens(tmp_path / "other"), alone.numpy())
    away: dict[str, Any] = {"prompt": "red cat", "negative_prompt": "dog"}
    jobs.run(tmp_path / "away", 3, **away, **how)
    alone = model.sample(3, seed=1, guidance_scale=1.5, output_type="tokens", **away)
    assert np.array_equal(tokens(tmp_path / "away"), alone.numpy())


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"prompts": ["red cat", "green cat"]}, ValueError, "prompts, line 2: prompt: unknown word 'green'"),
        ({"prompts": ["red cat", " "]}, ValueError, "line 2 of 2 is empty"),
        ({"prompts": []}, TypeError, "prompts must be"),
        ({"prompts": ["red\ncat"]}, ValueError, "one line"),
        ({"prompts": "/no/such/file"}, FileNotFoundError, "/no/such/file"),
        ({"prompt": "red", "prompts": ["red"]}, ValueError, "not both"),
        ({"prompt": ["red", "cat"]}, TypeError, "prompts"),
        ({"guidance_scale": 2.0}, ValueError, "without a prompt"),
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"n": None}, ValueError, "how many images"),
        ({"n": 2.5}, TypeError, "n must be an int"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"first_index": 2**63 - 3}, ValueError, "first_index"),
        ({"shard_size": 0}, ValueError, "shard_size"),
        ({"workers": 0}, ValueError, "workers"),
        ({"part": (3, 2)}, ValueError, "part's i"),
        ({"part": 3}, ValueError, "part must be"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"window": "wide"}, ValueError, "window"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"backend": "turbo"}, ValueError, "turbo"),
        ({"dtype": "float7"}, ValueError, "float7"),
        ({"model": 5}, TypeError, "model must be"),
        ({"model": "/no/such/model"}, ValueError, "/no/such/model"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, prompted, given, error, told):
    with pytest.raises(error, match=told):
        jobs.run(tmp_path / "job", **{"n": 6, "model": prompted, **QUIET, **given})
    assert not (tmp_path / "job").exists()


def test_prompts_for_a_model_that_reads_none_are_refused(tmp_path, tiny):
    for given in ({"prompt": "red"}, {"prompts": ["red"]}):
        with pytest.raises(ValueError, match="reads no text"):
            jobs.run(tmp_path / "job", 6, model=tiny, **given, **QUIET)


@pytest.mark.parametrize("place", ["", "https://a/b", "nonsense://a"])
def test_places_that_are_none_are_told(place):
    with pytest.raises((ValueError, ImportError)):
        jobs.status(place)
    with pytest.raises(TypeError, match="path or a URL"):
        jobs.status(5)  # type: ignore[arg-type]


def test_a_directory_without_a_job_is_told(tmp_path):
    for call in (jobs.status, jobs.verify):
        with pytest.raises(FileNotFoundError, match=r"holds no job.*job.json"):
            call(tmp_path)


def test_a_run_of_other_parameters_is_refused_and_names_each(tmp_path, prompted):
    path, other = tmp_path / "job", checkpoint(tmp_path / "other", prompted=True, seed=1)
    jobs.run(path, 6, model=prompted, seed=1, prompt="red", dtype="float32", shard_size=2, part=(1, 3), **QUIET)
    before = files(path)
    given: dict[str, Any] = {"n": 7, "seed": 2, "prompt": "blue", "top_k": 3, "shard_size": 3, "temperature": 0.5}
    given |= {"dtype": "bf16", "backend": "portable", "first_index": 1}
    with pytest.raises(ValueError) as told:
        jobs.run(path, **given, **QUIET)
    for name, value in given.items():
        shown = "'bfloat16'" if name == "dtype" else repr(value)
        assert f"{name} is " in str(told.value) and f"and {shown} in this run" in str(told.value)
    assert "kv_dtype" not in str(told.value)
    with pytest.raises(ValueError, match="prompts is none in the job"):
        jobs.run(path, prompts=["red"], **QUIET)
    with pytest.raises(ValueError, match="another one than the job's"):
        jobs.run(path, model=other, **QUIET)
    assert files(path) == before
    said: dict[str, Any] = {"n": 6, "seed": 1, "prompt": "red", "dtype": "fp32", "temperature": 1, "shard_size": 2}
    assert jobs.run(path, model=prompted, backend="auto", **said, **QUIET).complete


def test_a_model_that_has_moved_is_the_same_and_one_that_has_changed_is_not(tmp_path, tiny):
    path = tmp_path / "job"
    jobs.run(path, 8, model=tiny, seed=1, shard_size=2, part=(1, 2), **QUIET)
    tiny.rename(tmp_path / "moved")
    with pytest.raises(fastigpt.CheckpointError, match="tiny"):
        jobs.run(path, **QUIET)
    assert jobs.run(path, model=tmp_path / "moved", **QUIET).complete
    checkpoint(tiny, seed=3)
    with pytest.raises(ValueError, match="another one than the job's"):
        jobs.verify(path, redraw=1)
    with pytest.raises(ValueError, match="another one than the job's"):
        jobs.export(path, "npz", tmp_path / "a.npz")
    assert jobs.verify(path, redraw=3, model=tmp_path / "moved").right


def test_verify_tells_images_that_are_drawn_otherwise_here(tmp_path, tiny):
    path = tmp_path / "job"
    jobs.run(path, 20, model=tiny, seed=1, shard_size=4, **QUIET)
    job = JobDirectory.open(local(path))
    record, shard = job.tokens(2)
    job.store.remove("shards/000002.json")
    wrong = shard.copy()
    wrong[:, 5] = (wrong[:, 5] + 1) % 9
    elsewhere = {"host": "b", "process": "b:1", "device": "cuda: another", "versions": "none", "peak_rss": 0}
    from fastigpt.jobs.records import Drawer

    job.commit(2, wrong, Drawer(**elsewhere), 1.0)
    assert jobs.status(path).devices == {f"{record.device} ({record.versions})": 16, "cuda: another (none)": 4}
    found = jobs.verify(path, redraw=6)
    assert len(found.redrawn) == 6 and not found.right
    told = {image.index: (image.differs > 0, image.first) for image in found.redrawn}
    assert sum(differs for differs, _ in told.values()) == 3  # half of them are of the rarer device
    assert all(first == 5 and 8 <= index < 12 for index, (differs, first) in told.items() if differs)
    assert all(image.device == "cuda: another (none)" for image in found.redrawn if image.differs)


@pytest.mark.parametrize("url", ["memory://jobs/{}", "file://{}/job"])
def test_a_url_is_as_good_as_a_directory(tmp_path, tiny, url):
    place = url.format(tmp_path)
    here = jobs.run(tmp_path / "here", 10, model=tiny, seed=2, shard_size=4, **QUIET)
    jobs.run(place, 10, model=tiny, seed=2, shard_size=4, part=(1, 2), **QUIET)
    assert jobs.status(place).done == 6
    there = jobs.run(place, **QUIET)
    assert there.complete and there.tokens_sha256 == here.tokens_sha256
    jobs.export(place, "npz", tmp_path / "a.npz")
    store = open_store(place)
    name = JobDirectory.open(store).record(1).file
    store.put(f"shards/{name}", b"damaged")
    assert jobs.verify(place).damaged
    assert jobs.run(place, **QUIET).complete and jobs.verify(place, redraw=2).complete
    assert not store.names("claims") and store.read("manifest.json")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_between_two_writes(tmp_path, tiny, monkeypatch, number):
    path, fill = tmp_path / "job", ImageGPT.fill
    truth = jobs.run(tmp_path / "unbroken", 12, model=tiny, seed=1, shard_size=2, **QUIET)
    drawn: list[int] = []

    def stopped(model: ImageGPT, canvases: torch.Tensor, **options: Any) -> Any:
        if len(drawn) == 3:
            os.kill(os.getpid(), number)
        drawn.append(1)
        return fill(model, canvases, **options)

    monkeypatch.setattr(ImageGPT, "fill", stopped)
    with pytest.raises(signals.Interrupted):
        jobs.run(path, 12, model=tiny, seed=1, shard_size=2, **QUIET)
    monkeypatch.undo()
    assert jobs.status(path).done == 6 and jobs.status(path).drawing == ()
    assert len(files(path)) == 1 + 6
    assert jobs.run(path, **QUIET).tokens_sha256 == truth.tokens_sha256


def test_a_log_is_told_how_far_it_is(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr("fastigpt.jobs.progress.LOG_SECONDS", 0.0)
    jobs.run(tmp_path / "job", 12, model=tiny, seed=1, shard_size=4, part=(1, 3))
    jobs.run(tmp_path / "job")
    lines = capsys.readouterr().err.splitlines()
    assert "12 of 12 images" in lines[-1] and "images" in lines[0]


def test_status_counts_who_draws_and_how_fast(tmp_path, tiny):
    path = tmp_path / "job"
    found = jobs.run(path, 12, model=tiny, seed=1, shard_size=4, part=(1, 2), **QUIET)
    assert (found.done, found.complete, found.tokens_sha256) == (8, False, None)
    assert found.rate is not None and found.rate > 0
    assert found.seconds_left == pytest.approx(4 / found.rate)
    (drawer,) = found.drawers
    assert drawer["images"] == 8 and drawer["images_per_second"] > 0 and drawer["peak_rss"] > 2**20
    assert drawer["process"].endswith(f":{os.getpid()}") and drawer["device"].startswith("cpu: ")


def test_rates_are_of_the_last_minutes():
    from fastigpt.jobs.records import Record
    from fastigpt.jobs.state import recent_rate

    def record(finished: float, seconds: float, n: int = 10) -> Record:
        return Record(0, 0, n, "", 0, "", "", "", "", "", 0, seconds, finished)

    assert recent_rate([], 1000.0) is None and recent_rate([record(100.0, 5.0)], 10_000.0) is None
    assert recent_rate([record(110.0, 10.0), record(120.0, 10.0)], 130.0) == pytest.approx(1.0)
    two = [record(110.0, 10.0), record(110.0, 10.0)]  # side by side
    assert recent_rate(two, 130.0) == pytest.approx(2.0)
    old = [record(100.0, 10.0, 1000), record(10_000.0, 10.0), record(10_010.0, 10.0)]
    assert recent_rate(old, 10_020.0) == pytest.approx(1.0)


def test_status_and_verify_need_no_torch(tmp_path, tiny):
    jobs.run(tmp_path / "job", 4, model=tiny, seed=1, **QUIET)
    code = (
        "import sys; from fastigpt import jobs; p = sys.argv[1]\n"
        "assert jobs.status(p).complete and jobs.verify(p).complete and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "job"], check=True)


def test_two_workers_draw_what_one_does(tmp_path, tiny, capfd):
    path = tmp_path / "job"
    truth = jobs.run(tmp_path / "unbroken", 40, model=tiny, seed=1, shard_size=3, **QUIET)
    found = jobs.run(path, 40, model=tiny, seed=1, shard_size=3, workers=2, **QUIET)
    assert found.complete and found.tokens_sha256 == truth.tokens_sha256
    assert all(not drawer["process"].endswith(f":{os.getpid()}") for drawer in found.drawers)
    assert capfd.readouterr().out == "" and not [name for name in files(path) if name.startswith("claims")]


@pytest.mark.slow
def test_what_a_worker_is_told_is_told_by_the_run(tmp_path, tiny):
    with pytest.raises(ValueError, match="temperature"):
        jobs.run(tmp_path / "job", 40, model=tiny, temperature=-1.0, workers=2, **QUIET)
    with pytest.raises(ValueError, match="/no/such/model"):
        jobs.run(tmp_path / "job", 40, model="/no/such/model", workers=2, **QUIET)
    assert not (tmp_path / "job").exists()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        jobs.run(tmp_path / "job", 40, model=tiny, workers=2, **QUIET)


@pytest.mark.slow
def test_workers_end_with_their_driver(tmp_path, tiny):
    import time

    path = tmp_path / "job"
    code = "import sys; from fastigpt import jobs; jobs.run(*sys.argv[1:2], 10**6, model=sys.argv[2], workers=2)"
    driver = subprocess.Popen([sys.executable, "-P", "-c", code, path, tiny])
    while not (path / "shards").is_dir() or not list((path / "shards").glob("*.json")):
        assert driver.poll() is None
        time.sleep(0.05)
    workers = _children(driver.pid)  # not those of the claims: a worker between two shards has none
    assert len(workers) >= 2
    driver.kill()
    driver.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    assert jobs.status(path).drawing == ()


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_a_worker_that_dies_again_and_again_ends_the_run(tmp_path, tiny, monkeypatch, capfd):
    from fastigpt.jobs import processes

    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match=r"3 workers died.*status 1"):
        jobs.run(tmp_path / "job", 40, model=tiny, workers=2, **QUIET)


# --- Ray ----------------------------------------------------------------------------------------------------------


def test_actors_share_out_what_the_cluster_has():
    from fastigpt.jobs.ray_actors import share_out

    def node(**resources: float) -> dict[str, Any]:
        return {"Alive": True, "Resources": resources}

    laptop, small, big = node(CPU=2.0), node(CPU=8.0), node(CPU=32.0)
    assert share_out([laptop], None) == (1, {"num_cpus": 2}, 2)
    assert share_out([laptop], 2) == (2, {"num_cpus": 1}, 1)
    assert share_out([laptop], 5) == (5, {"num_cpus": 1}, 1)
    assert share_out([node(), small, big], None) == (5, {"num_cpus": 8}, 8)
    assert share_out([small, small], 1) == (1, {"num_cpus": 8}, 8)
    assert share_out([node(), {"Alive": False, "Resources": {"CPU": 8.0}}], None) == (1, {"num_cpus": 1}, 1)
    gpus = [node(CPU=16.0, GPU=4.0), node(CPU=16.0, GPU=2.0)]
    assert share_out(gpus, None) == (6, {"num_gpus": 1}, None) and share_out(gpus, 32)[0] == 32


def test_a_node_that_sees_another_directory_is_told(tmp_path, tiny):
    from fastigpt.jobs.ray_actors import check_seen

    jobs.run(tmp_path / "job", 4, model=tiny, **QUIET)
    text = (tmp_path / "job" / "job.json").read_text()
    check_seen(local(tmp_path / "job"), text, "the node a")
    with pytest.raises(OSError, match=r"the node a does not see the job in .*/other: use a file system"):
        check_seen(local(tmp_path / "other"), text, "the node a")
    with pytest.raises(OSError, match="the node a does not see"):
        check_seen(local(tmp_path / "job"), text.replace('"n": 4', '"n": 5'), "the node a")


def test_ray_that_is_not_installed_is_named(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="pip install ray"):
        jobs.run(tmp_path / "job", 4, model=tiny, ray="local", **QUIET)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_draws_what_one_process_does(tmp_path, tiny):
    code = """
import os, sys
from fastigpt import jobs
path, model = sys.argv[1:]
try:
    jobs.run(path, 40, model=model, temperature=-1, ray="local", progress=False)
except ValueError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError
found = jobs.run(path, 40, model=model, seed=1, shard_size=3, ray="local", workers=2, progress=False)
assert found.complete and os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and os.environ["RAY_AUTH_MODE"] == "token"
"""
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "job", tiny], check=True)
    truth = jobs.run(tmp_path / "unbroken", 40, model=tiny, seed=1, shard_size=3, **QUIET)
    found = jobs.status(tmp_path / "job")
    assert found.tokens_sha256 == truth.tokens_sha256


def test_a_job_file_is_written_once_and_says_everything(tmp_path, tiny):
    path = tmp_path / "job"
    jobs.run(path, 4, model=tiny, part=(1, 1), **QUIET)
    text = (path / "job.json").read_text()
    told = json.loads(text)
    assert told["model"] == str(tiny) and told["dtype"] and told["kv_dtype"] and told["backend"] != "auto"
    assert told["made_with"]["fastigpt"] == fastigpt.__version__ and 0 <= told["seed"] < 2**64
    jobs.run(path, **QUIET)
    assert (path / "job.json").read_text() == text
