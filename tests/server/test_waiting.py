"""Requests take turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastigpt.server.waiting import Waiting


def free(_: str) -> int:
    return 0


def test_a_request_for_ten_images_does_not_keep_others_waiting():
    waiting: Waiting[str] = Waiting()
    waiting.add("many", 10)
    waiting.add("one", 1)
    waiting.add("two", 2)
    assert waiting.take(4, free, 0) == [("many", 0), ("one", 0), ("two", 0), ("many", 1)]
    waiting.add("late", 1)
    assert waiting.take(3, free, 0) == [("two", 1), ("many", 2), ("late", 0)]
    assert len(waiting) == 7 and waiting.owners() == ["many"]


def test_who_leaves_is_forgotten():
    waiting: Waiting[str] = Waiting()
    waiting.add("a", 3)
    waiting.add("b", 1)
    waiting.take(1, free, 0)
    assert waiting.drop("a") == 2 and waiting.drop("a") == 0 and waiting.drop("nobody") == 0
    assert waiting.take(9, free, 0) == [("b", 0)] and not len(waiting)


def test_what_is_read_first_is_paid_once_for_a_request_and_limits_how_many_come_in():
    waiting: Waiting[str] = Waiting()
    for name, count in (("dear", 2), ("cheap", 2), ("dearer", 1)):
        waiting.add(name, count)
    prices = {"dear": 100, "cheap": 10, "dearer": 200}
    assert waiting.take(9, prices.__getitem__, 50) == [("dear", 0)]
    assert waiting.take(9, prices.__getitem__, 50) == [("cheap", 0)]
    assert waiting.take(9, prices.__getitem__, 300) == [("dearer", 0), ("dear", 1)]
    assert waiting.take(9, prices.__getitem__, 10) == [("cheap", 1)]


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    takes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=60),
)
def test_everything_comes_once_and_in_order(counts, takes):
    waiting: Waiting[int] = Waiting()
    for owner, count in enumerate(counts):
        waiting.add(owner, count)
    taken: list[tuple[int, int]] = []
    for count, budget in [*takes, (100, 10**6)]:
        before = len(waiting)
        some = waiting.take(count, lambda owner: 10 * owner, budget)
        assert len(waiting) == before - len(some) and len(some) <= count
        assert bool(some) or not before or not count
        taken += some
    assert sorted(taken) == [(owner, image) for owner, count in enumerate(counts) for image in range(count)]
    for owner in range(len(counts)):
        assert [image for who, image in taken if who == owner] == list(range(counts[owner]))
