"""The certificates of one's own: made once, private, renewed in time."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from killing import die_at, forked
from signing import encoded

from fastigpt import owner
from fastigpt.provenance import identity
from fastigpt.provenance.facts import Facts
from fastigpt.provenance.identity import data_directory, own_leaf
from fastigpt.provenance.reading import State, read
from fastigpt.provenance.signer import Signer

FILES = ["leaf.pem", "root-key.pem", "root.pem"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "c2pa"


def is_trusted(signer: Signer, folder: Path) -> bool:
    signed = signer.sign(encoded(size=4), "png", Facts("m", 1, 2))
    return read(signed, trust=(folder / "root.pem").read_text()).state is State.TRUSTED


def test_files_are_for_their_owner_alone(folder):
    before = os.umask(0)
    try:
        Signer.own(folder)
    finally:
        os.umask(before)
    assert sorted(os.listdir(folder)) == FILES and os.listdir(folder.parent) == ["c2pa"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in FILES} == {0o600}


def test_the_same_root_is_used_again(folder):
    first = Signer.own(folder)
    files = {name: (folder / name).read_bytes() for name in FILES}
    assert is_trusted(Signer.own(folder), folder) and first.root == folder / "root.pem"
    assert {name: (folder / name).read_bytes() for name in FILES} == files


def test_processes_that_begin_at_once_have_one_root(folder):
    code = "import sys, pathlib; from fastigpt.provenance.identity import own_leaf as own;"
    code += "sys.stdin.read(1); sys.stdout.buffer.write(own(pathlib.Path(sys.argv[1]))[1])"
    command = [sys.executable, "-c", code, str(folder)]
    some = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for process in some:
        assert process.stdin is not None
        process.stdin.write(b"!")
        process.stdin.flush()
    found = {process.communicate()[0] for process in some}
    assert found == {(folder / "leaf.pem").read_bytes()}
    assert os.listdir(folder.parent) == ["c2pa"]


def test_who_comes_second_takes_what_is_there(folder, monkeypatch):
    """The other process was done between the look and the rename."""
    own_leaf(folder)
    there = (folder / "leaf.pem").read_bytes()
    identity._make(folder)
    assert (folder / "leaf.pem").read_bytes() == there and os.listdir(folder.parent) == ["c2pa"]


def test_a_leaf_is_renewed_half_way_and_by_the_same_root(folder, monkeypatch):
    monkeypatch.setattr(identity, "LEAF", timedelta(days=1))
    _, old = own_leaf(folder)
    monkeypatch.undo()
    _, new = own_leaf(folder)
    assert new != old and own_leaf(folder)[1] == new
    assert is_trusted(Signer.own(folder), folder)


def test_an_expired_leaf_is_renewed(folder, monkeypatch):
    monkeypatch.setattr(identity, "LEAF", timedelta(minutes=-1))
    own_leaf(folder)
    monkeypatch.undo()
    assert is_trusted(Signer.own(folder), folder)


def test_without_the_roots_key_a_leaf_serves_until_it_expires(folder, monkeypatch):
    monkeypatch.setattr(identity, "LEAF", timedelta(days=3))
    own_leaf(folder)
    monkeypatch.undo()
    (folder / "root-key.pem").unlink()
    signer = Signer.own(folder)
    assert is_trusted(signer, folder) and "leaf.pem expires on 20" in signer.warning


@pytest.mark.parametrize("missing", ["root-key.pem", "root.pem"])
def test_what_cannot_be_renewed_says_what_to_do(folder, monkeypatch, missing):
    monkeypatch.setattr(identity, "LEAF", timedelta(minutes=-1))
    own_leaf(folder)
    monkeypatch.undo()
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"(?s)leaf.pem expired|holds no root.pem") as error:
        Signer.own(folder)
    assert "new certificates are made" in str(error.value)


@pytest.mark.parametrize("name", ["leaf.pem", "root-key.pem", "root.pem"])
def test_damaged_files_are_named(folder, monkeypatch, name):
    monkeypatch.setattr(identity, "LEAF", timedelta(days=1))
    own_leaf(folder)
    monkeypatch.undo()
    (folder / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=name):
        Signer.own(folder)


def test_they_are_in_the_users_data_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_directory() == tmp_path / "fastigpt" / "c2pa"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_directory() == tmp_path / ".local" / "share" / "fastigpt" / "c2pa"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
@pytest.mark.parametrize("renewal", [False, True])
def test_a_kill_at_any_moment_leaves_nothing_behind_that_the_next_start_does_not_remove(tmp_path, renewal):
    """Private keys are among what is written."""
    left_behind = 0
    for moment in range(1000):
        folder = tmp_path / str(moment) / "c2pa"
        root = None
        if renewal:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(identity, "LEAF", timedelta(days=1))
                own_leaf(folder)
            root = (folder / "root.pem").read_bytes()

        def work(folder: Path = folder, moment: int = moment) -> None:
            die_at(moment)
            own_leaf(folder)

        status = forked(work)
        assert status in (0, -signal.SIGKILL)
        if folder.parent.exists():
            left_behind += any(path.name.startswith(".") for path in folder.parent.rglob("*"))
        own_leaf(folder)
        assert sorted(os.listdir(folder)) == FILES and os.listdir(folder.parent) == ["c2pa"]
        assert root in (None, (folder / "root.pem").read_bytes())
        if status == 0:
            break
    assert left_behind > 0


def test_what_a_living_process_writes_is_left_alone(folder):
    own_leaf(folder)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        living = owner.Owner("", owner._machine(), process.pid, owner._started(process.pid))
        theirs = folder / f".leaf.pem.{living.tag}.x"
        theirs.touch()
        own_leaf(folder)
        assert theirs.exists()
    finally:
        process.communicate(b"\n")
    own_leaf(folder)
    assert not theirs.exists()
