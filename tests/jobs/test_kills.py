"""Whatever is killed, wherever: nothing committed is wrong, nothing is lost or doubled, and the next run ends with the
tokens of a run that nothing broke."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import die_at, forked
from small_jobs import checkpoint, expected_sha256, files, local, made_up, worker

from fastigpt import ImageGPT, jobs
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.state import status_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")


def test_a_kill_before_or_after_any_write_costs_nothing(tmp_path):
    """Every moment between two calls that change the disk, from making the job to sealing it."""
    sizes = {"n": 5, "shard_size": 3}
    truth = expected_sha256(tmp_path / "unbroken", **sizes)
    left_behind: set[str] = set()
    for moment in range(10_000):
        path = tmp_path / str(moment)

        def work(path: Path = path, moment: int = moment) -> None:
            die_at(moment)
            job = made_up(local(path), **sizes)
            worker(job).run()
            job.seal()

        status = forked(work)
        assert status in (0, -signal.SIGKILL)
        left_behind |= {name for name in files(path) if name.endswith(".tmp")} if path.exists() else set()
        store = local(path)
        found = JobDirectory.find(store)
        for shard in found.committed() if found else ():
            found.tokens(shard)  # raises what is damaged
        job = found or made_up(store, **sizes)
        store.clean()
        worker(job).run()
        assert job.seal().tokens_sha256 == truth
        assert len([name for name in files(path / "shards") if name.endswith(".json")]) == 2
        assert not [name for name in files(path) if name.endswith(".tmp") or name.startswith("claims")]
        if status == 0:
            break
    assert moment > 40 and left_behind  # kills in the middle of writes were among them


def test_drawing_goes_on_after_kills_at_random_moments(tmp_path):
    model, path = checkpoint(tmp_path / "tiny"), tmp_path / "job"
    asked: dict[str, Any] = {"model": model, "seed": 5, "shard_size": 4, "progress": False}
    truth = jobs.run(tmp_path / "unbroken", 120, **asked)
    random = np.random.default_rng(1)
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            jobs.run(path, 120, **asked)
            os._exit(0)
        already = committed(path)
        while committed(path) < already + 3 and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))
        kill(pid)
    found = jobs.run(path, 120, **asked)
    assert found.complete and found.tokens_sha256 == truth.tokens_sha256
    assert not jobs.verify(path).damaged and jobs.verify(path).complete
    assert len(files(path / "shards")) == 60 and not [name for name in files(path) if name.endswith(".tmp")]


def test_what_a_worker_leaves_that_dies_during_a_run_is_removed_at_its_end(tmp_path, monkeypatch):
    model, path, fill = checkpoint(tmp_path / "tiny"), tmp_path / "job", ImageGPT.fill

    def with_a_death(model: ImageGPT, canvases: Any, **options: Any) -> Any:
        assert forked(lambda: local(path)._written(path / "shards" / "000001.json", b"half")) == 0
        assert [name for name in files(path) if name.endswith(".tmp")]
        return fill(model, canvases, **options)

    monkeypatch.setattr(ImageGPT, "fill", with_a_death)
    jobs.run(path, 8, model=model, seed=5, shard_size=4, progress=False)
    assert len(files(path)) == 6


def committed(path: Path) -> int:
    return len(list((path / "shards").glob("[0-9]*.json")))


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def at_work(path: Path) -> list[int]:
    """Processes that hold a claim now."""
    job = JobDirectory.find(local(path))
    return [] if job is None else sorted({int(who.rpartition(":")[2]) for who, _ in status_of(job).drawing})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("what", "options", "kills"),
    [
        ("worker", ("--workers", "2"), 56),
        ("driver", ("--workers", "2"), 24),
        ("worker", ("--ray", "local", "--workers", "2"), 16),
        ("driver", ("--ray", "local", "--workers", "2"), 4),
    ],
    ids=["worker", "driver", "ray worker", "ray driver"],
)
def test_a_hundred_kills(tmp_path, what, options, kills):
    """Each after something was committed since the last one, and a random moment more; in as many jobs as it takes."""
    import itertools
    import subprocess
    import sys

    model, random, n = checkpoint(tmp_path / "tiny"), np.random.default_rng(kills), 8000
    truth = jobs.run(tmp_path / "unbroken", n, model=model, seed=5, shard_size=250, progress=False)
    done = 0
    for attempt in itertools.count():
        path = tmp_path / str(attempt)
        command = [sys.executable, "-P", "-m", "fastigpt", "job", "run", str(path), "-n", str(n), "-m", str(model)]
        command += ["--seed", "5", "--shard-size", "16", *options]
        driver = subprocess.Popen(command)
        while done < kills and driver.poll() is None:
            before = committed(path)
            while driver.poll() is None and (committed(path) == before or not at_work(path)):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.2))
            if driver.poll() is not None:
                break
            for pid in [driver.pid] if what == "driver" else at_work(path):
                kill(pid)
                done += 1
            if what == "driver":
                driver.wait()
                driver = subprocess.Popen(command)
        assert driver.wait() == 0
        found = jobs.status(path)
        assert found.complete and found.tokens_sha256 == truth.tokens_sha256
        assert jobs.verify(path, redraw=1).right and committed(path) == n // 16
        assert len(list((path / "shards").iterdir())) == 2 * n // 16
        if done >= kills:
            return
