"""Claims keep workers apart; without them, or with lies in them, a job is still right."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest
from killing import forked
from small_jobs import draw, drawer, expected_sha256, files, local, made_up, patient, worker

from fastigpt.jobs.claims import Claims
from fastigpt.jobs.worker import Worker
from fastigpt.owner import Owner, this_process

ELSEWHERE = Owner("elsewhere", "0" * 12, 1, "0")


def test_workers_that_begin_together_draw_every_shard_once(tmp_path):
    job = made_up(local(tmp_path / "job"), n=200, shard_size=4)
    drawn: list[int] = []

    def counting(images: range):
        drawn.append(images.start)
        return draw(images)

    def work(name: int) -> None:
        owner = Owner("elsewhere", f"{name:012d}", 1, "0")  # so that none is seen to have ended
        Worker(job, counting, drawer, claims=Claims(job.store, owner)).run()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == list(range(100, 300, 4))
    job.seal()


def test_a_claim_of_a_process_that_has_ended_is_taken_over_at_once(tmp_path):
    job = made_up(local(tmp_path / "job"))
    status = forked(lambda: Claims(job.store, this_process()).take([3]))
    assert status == 0 and files(tmp_path / "job" / "claims")
    assert Claims(job.store, this_process()).take([3]) == 3


def test_a_claim_of_another_machine_is_taken_over_when_it_has_stopped_changing(tmp_path):
    job, now = made_up(local(tmp_path / "job")), 0.0
    theirs = Claims(job.store, ELSEWHERE)
    assert theirs.take([3]) == 3
    ours = Claims(job.store, this_process(), stale=30.0, clock=lambda: now)
    assert ours.take([3]) is None
    now = 29.0
    assert ours.take([3]) is None
    job.store.put("claims/000003.json", theirs._text(1))  # its heart beats
    now = 58.0
    assert ours.take([3]) is None
    now = 89.0
    assert ours.take([3]) == 3


def test_claims_are_given_back_and_kept_alive_meanwhile(tmp_path):
    job = made_up(local(tmp_path / "job"))
    claims = Claims(job.store, this_process(), heartbeat=0.001)
    shard = claims.take([2])
    first = job.store.read("claims/000002.json")
    with pytest.raises(KeyError), claims.held(shard):
        while job.store.read("claims/000002.json") == first:
            time.sleep(0.001)
        raise KeyError
    assert not files(tmp_path / "job" / "claims")


def test_claims_that_cannot_be_read_go_stale_like_others(tmp_path):
    job, now = made_up(local(tmp_path / "job")), 0.0
    for shard, text in enumerate((b"", b"[]", b"\xff{", b'{"pid": "x"}')):
        job.store.put(f"claims/{shard:06d}.json", text)
    claims = Claims(job.store, this_process(), stale=30.0, clock=lambda: now)
    assert claims.take([0, 1, 2, 3]) is None
    now = 30.0
    assert [claims.take([shard]) for shard in range(4)] == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
def test_a_cluster_of_64_workers_with_delays_drops_and_duplicates(tmp_path):
    """A fifth of the workers drop shards (they end without a word, as if on another machine), a fifth draw whatever
    they like without asking, all take their time."""
    n = 400
    truth = expected_sha256(tmp_path / "unbroken", n=n, shard_size=4)
    job = made_up(local(tmp_path / "job"), n=n, shard_size=4)
    job.store.poll = 0.05

    def member(name: int) -> None:
        chance = random.Random(name)
        owner = Owner("elsewhere", f"{name:012d}", name, "0")

        def slow(images: range):
            time.sleep(chance.uniform(0, 0.004))
            if name % 5 == 0 and chance.random() < 0.2:
                os._exit(0)  # with its claim
            return draw(images)

        claims = Claims(job.store, owner, heartbeat=0.05, stale=0.5)
        if name % 5 == 1:
            claims.take = lambda shards: chance.choice(shards)  # type: ignore[method-assign]
        Worker(job, slow, drawer, claims=claims).run()

    members = []
    for name in range(64):
        pid = os.fork()
        if pid == 0:
            try:
                member(name)
                os._exit(0)
            except BaseException:
                os._exit(1)
        members.append(pid)
    assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in members} == {0}
    Worker(job, draw, drawer, claims=patient(job)).run()  # should all that were left have dropped theirs
    manifest = job.seal()
    assert [shard["shard"] for shard in manifest.shards] == list(range(100))
    assert manifest.tokens_sha256 == truth
    assert len(files(tmp_path / "job" / "shards")) == 200


def test_a_part_draws_its_shards_and_no_others(tmp_path):
    job = made_up(local(tmp_path / "job"), n=22, shard_size=4)
    worker(job, part=(2, 3)).run()
    assert job.committed() == {1, 4}
    for i in (1, 3):
        worker(job, part=(i, 3)).run()
    assert job.committed() == set(range(6))
