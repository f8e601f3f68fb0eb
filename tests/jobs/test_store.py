"""Files appear whole or not at all, once if they should, wherever a job lies."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from killing import forked
from small_jobs import files, local

from fastigpt.jobs.store import LocalStore, Store, open_store
from fastigpt.owner import Owner, this_process


@pytest.fixture(params=["disk", "disk without links", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "disk without links":

        def refused(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refused)
    found = open_store("memory://store" + str(tmp_path) if request.param == "memory" else tmp_path / "job")
    found.make()
    return found


def test_files_are_written_read_listed_and_removed(store):
    store.put("a.json", b"1")
    store.put("shards/b.npy", b"12")
    store.put("shards/b.npy", b"123")
    assert store.names("") == {"a.json": 1} and store.names("shards") == {"b.npy": 3}
    assert store.read("shards/b.npy") == b"123" and open_store(store.address).read("a.json") == b"1"
    store.remove("a.json")
    store.remove("a.json")
    assert store.names("") == {} == store.names("claims") == store.names("no such folder")
    with pytest.raises(FileNotFoundError):
        store.read("a.json")


def test_the_first_to_create_a_file_stays(store):
    assert store.create("shards/a.json", b"first")
    assert not store.create("shards/a.json", b"second")
    assert store.read("shards/a.json") == b"first"
    store.clean()
    assert store.names("shards") == {"a.json": 5}


def test_of_many_at_a_time_one_creates_a_file(tmp_path):
    store, won = local(tmp_path), []
    store.make()
    for round in range(20):
        ready = threading.Barrier(8)

        def attempt(name: int, round: int = round, ready: threading.Barrier = ready) -> None:
            ready.wait()
            if store.create(f"shards/{round}", str(name).encode()):
                won.append((round, name))

        threads = [threading.Thread(target=attempt, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [round for round, _ in won] == list(range(20))
    assert all(store.read(f"shards/{round}") == str(name).encode() for round, name in won)
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
def test_cleaning_leaves_what_others_are_writing(tmp_path):
    store = LocalStore(tmp_path)
    store.make()
    mine = store._written(tmp_path / "shards" / "mine.npy", b"half")
    elsewhere = tmp_path / "shards" / f".theirs.npy+{Owner('b', '0' * 12, 1, '0').tag}+0.tmp"
    elsewhere.write_bytes(b"half")
    assert forked(lambda: store._written(tmp_path / "shards" / "gone.npy", b"half")) == 0
    (tmp_path / ".notes.tmp").write_text("mine")
    store.clean()
    left = {path.name for path in (tmp_path / "shards").iterdir()}
    assert left == {mine.name, elsewhere.name} and (tmp_path / ".notes.tmp").exists()
    os.utime(elsewhere, (1, 1))  # for longer than anybody writes
    store.clean()
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {mine.name}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
def test_a_process_is_gone_when_it_has_ended_and_not_before():
    me = this_process()
    assert not me.gone() and Owner.of_tag(me.tag) == Owner("", me.machine, me.pid, me.started)
    assert not Owner(me.host, "another", 2**22 + 1, "0").gone()  # of another machine nothing is known
    assert Owner(me.host, me.machine, me.pid, "1").gone() or me.started == "0"  # an earlier one of this id
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert Owner(me.host, me.machine, pid, me.started).gone()
