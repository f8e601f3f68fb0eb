"""Full disks, directories that cannot be written, damage: a clear error or another draw, never a wrong export."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import forked
from small_jobs import checkpoint, expected_sha256, files, local, made_up, worker

from fastigpt import jobs
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.records import Damaged
from fastigpt.jobs.store import LocalStore


@pytest.fixture
def done(tmp_path: Path) -> JobDirectory:
    job = made_up(local(tmp_path / "job"))
    worker(job).run()
    job.seal()
    return job


def data_of(job: JobDirectory, shard: int) -> Path:
    assert isinstance(job.store, LocalStore)
    return job.store.root / "shards" / job.record(shard).file


def record_of(job: JobDirectory, shard: int) -> Path:
    assert isinstance(job.store, LocalStore)
    return job.store.root / "shards" / f"{shard:06d}.json"


def flip(job: JobDirectory) -> None:
    path = data_of(job, 2)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(job: JobDirectory) -> None:
    path = data_of(job, 2)
    path.write_bytes(path.read_bytes()[:-2])


def empty(job: JobDirectory) -> None:
    data_of(job, 2).write_bytes(b"")


def lose(job: JobDirectory) -> None:
    data_of(job, 2).unlink()


def half_a_record(job: JobDirectory) -> None:
    path = record_of(job, 2)
    path.write_text(path.read_text()[:40])


def another_record(job: JobDirectory) -> None:
    record_of(job, 2).write_bytes(record_of(job, 1).read_bytes())


def a_file_outside(job: JobDirectory) -> None:
    path = record_of(job, 2)
    path.write_text(json.dumps({**json.loads(path.read_text()), "file": "../../elsewhere.npy"}))


DAMAGES = [flip, truncate, empty, lose, half_a_record, another_record, a_file_outside]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_drawn_anew(tmp_path, done, damage):
    truth = done.manifest()
    damage(done)
    found = jobs.verify(tmp_path / "job")
    assert len(found.damaged) == 1 and "000002" in found.damaged[0] and not found.right and not found.complete
    with pytest.raises(Damaged, match="000002"):
        done.seal()
    wrong = done.repair()
    assert wrong == list(found.damaged) and done.committed() == {0, 1, 3, 4, 5}
    worker(done).run()
    assert done.seal() == truth and jobs.verify(tmp_path / "job").complete


@pytest.mark.parametrize("damage", [flip, lose, half_a_record])
def test_run_repairs_a_job_that_was_complete(tmp_path, capsys, damage):
    path, model = tmp_path / "job", checkpoint(tmp_path / "tiny")
    truth = jobs.run(path, 12, model=model, seed=1, shard_size=4, progress=False)
    damage(JobDirectory.open(local(path)))
    found = jobs.run(path, progress=False)
    assert found.complete and found.tokens_sha256 == truth.tokens_sha256
    assert "000002" in capsys.readouterr().err


def test_what_others_found_damaged_and_drew_anew_stays(done):
    standing = done.record(2)
    other = type(standing)(**{**vars(standing), "sha256": "f" * 64})
    done.discard(2, other)
    assert done.record(2) == standing


def test_a_manifest_that_says_something_else_is_told(tmp_path, done):
    path = tmp_path / "job" / "manifest.json"
    data = json.loads(path.read_text())
    data["shards"][4]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    assert "shard 4" in jobs.verify(tmp_path / "job").damaged[0]
    record_of(done, 3).unlink()
    assert any("shard 3" in sentence for sentence in jobs.verify(tmp_path / "job").damaged)
    for text, word in (("{", "JSON"), ("[]", "object"), ("{}", "manifest"), (json.dumps({**data, "n": 5}), "5 images")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"manifest.json.*{word}"):
            jobs.verify(tmp_path / "job")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ("[1]", "object"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1}', "lacks 'n'"),
        ({"n": "many"}, "'n' must be int"),
        ({"n": True}, "'n' must be int"),
        ({"n": 0}, "numbers"),
        ({"seed": -1}, "numbers"),
        ({"prompt": 5}, "'prompt'"),
        ({"n_prompts": 3}, "numbers"),
    ],
)
def test_a_job_file_that_is_damaged_is_told_by_name(tmp_path, done, text, word):
    path = tmp_path / "job" / "job.json"
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    with pytest.raises(ValueError, match=f"job.json.*{word}"):
        jobs.status(tmp_path / "job")


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_what_is_committed_stays(tmp_path, small_disk):
    truth = expected_sha256(tmp_path / "unbroken", n=90, shard_size=4)
    job = made_up(local(small_disk / "job"), n=90, shard_size=4)
    with pytest.raises(OSError, match="/job/") as told:
        worker(job).run()
    assert told.value.errno == errno.ENOSPC
    committed = job.committed()
    assert committed and not [name for name in files(small_disk) if name.endswith(".tmp")]
    for shard in committed:
        job.tokens(shard)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    worker(job).run()
    assert job.seal().tokens_sha256 == truth


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
def test_a_write_that_the_system_refuses_is_told_and_leaves_nothing(tmp_path):
    job = made_up(local(tmp_path / "job"), n=90, shard_size=30)

    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # a shard has 488 bytes, a claim fewer
        with pytest.raises(OSError, match=r"/job/shards/0000") as told:
            worker(job).run()
        assert told.value.errno == errno.EFBIG

    assert forked(work) == 0
    assert files(tmp_path / "job") == {"job.json"}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the system has no users")
def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "job").mkdir(mode=0o755)
    made_up(local(tmp_path / "job"))
    for folder in ("", "shards", "claims"):
        os.chmod(tmp_path / "job" / folder, 0o555)

    def work() -> None:
        os.chdir(tmp_path / "job")
        if os.geteuid() == 0:
            os.seteuid(65534)
        job = JobDirectory.open(local(Path()))
        with pytest.raises(PermissionError, match="000"):
            worker(job).run()

    assert forked(work) == 0
    assert files(tmp_path / "job") == {"job.json"}


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        made_up(local(tmp_path))
    with pytest.raises(NotADirectoryError, match=r"notes\.txt"):
        made_up(local(tmp_path / "notes.txt"))
    assert files(tmp_path) == {"notes.txt"}


def test_an_export_of_a_damaged_or_unfinished_job_leaves_nothing(tmp_path):
    path, model = tmp_path / "job", checkpoint(tmp_path / "tiny")
    jobs.run(path, 12, model=model, seed=1, shard_size=4, part=(1, 2), progress=False)
    for kind, out in (("npz", "a.npz"), ("png", "a"), ("png", "a.zip"), ("parquet", "a"), ("webdataset", "a.tar")):
        with pytest.raises(ValueError, match="not complete: 8 of 12"):
            jobs.export(path, kind, tmp_path / out)
    jobs.run(path, progress=False)
    flip(JobDirectory.open(local(path)))
    for kind, out in (("npz", "a.npz"), ("png", "a"), ("png", "a.zip"), ("parquet", "a"), ("webdataset", "a.tar")):
        with pytest.raises(Damaged, match="000002"):
            jobs.export(path, kind, tmp_path / out)
    assert {p.name for p in tmp_path.iterdir()} == {"job", "tiny"}
