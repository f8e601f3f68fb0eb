"""The width of a window comes close to the best fixed one, whatever passes cost and keep."""

import random

import pytest

from fastigpt.engine.window import WIDTHS, WindowStatistics, WindowTuner

TOKENS = 1024  # of a canvas

# Seconds of a pass by width, and the chance that a guess is right after right ones.
TABLES = {
    "nothing is guessed, cost grows": ([1, 1.6, 2.8, 5, 9, 17], 0.0),
    "nothing is guessed, width is nearly free": ([1, 1.05, 1.1, 1.2, 1.4, 1.8], 0.0),
    "everything is guessed, width is free": ([1, 1, 1, 1, 1, 1], 1.0),
    "width 2 beats 1, wider ones beat it": ([1, 1.1, 1.2, 1.4, 1.8, 2.6], 0.8),
    "a jump from one row to a matrix product": ([1, 1.9, 1.9, 2.0, 2.1, 2.6], 0.85),
    "the middle is best": ([1, 1.1, 1.3, 1.9, 4, 8], 0.75),
    "width 2 is slightly worse, 8 is better": ([1, 1.8, 1.9, 2.0, 2.4, 4.0], 0.75),
    "one row is best": ([1, 2.4, 2.5, 2.6, 3.0, 4.0], 0.5),
}


def draw(tuner, costs, odds, chance, n):
    """Seconds that n canvases side by side take."""
    done, seconds = 0.0, 0.0
    while done < TOKENS:
        width = tuner.width()
        cost = costs[WIDTHS.index(width)]
        kept = 0.0
        for _ in range(n):
            right = 1
            while right < width and chance.random() < odds:
                right += 1
            kept += right / n
        tuner.record(width, cost, kept)
        done, seconds = done + kept, seconds + cost
    return seconds


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("name", TABLES)
def test_a_job_takes_at_most_1_2_times_the_best_fixed_width(name, n):
    costs, odds = TABLES[name]
    chance = random.Random(7)
    per_token = [cost / (width if odds == 1 else (1 - odds**width) / (1 - odds)) for width, cost in zip(WIDTHS, costs)]
    best = TOKENS * min(per_token)
    statistics = WindowStatistics()
    jobs = [draw(WindowTuner(None, statistics), costs, odds, chance, n) for _ in range(8)]
    if n == 16:  # one canvas alone says little at first
        assert jobs[0] < 1.2 * best
    assert sum(jobs) / len(jobs) < 1.2 * best
    assert sum(jobs[1:]) / 7 < 1.1 * best  # what was found out outlives a job


def test_a_slow_first_pass_does_not_end_the_search():
    """A width that was slow once, because its kernels were being compiled, gets another chance."""
    tuner, slow = WindowTuner("auto"), set(WIDTHS)
    for _ in range(60):
        width = tuner.width()
        tuner.record(width, 50.0 if width in slow else 1.0, width * 0.9)
        slow.discard(width)
    assert tuner.width() == 32


def test_a_fixed_width_stays_as_it_is():
    tuner = WindowTuner(5)
    for seconds in (1.0, 9.0):
        assert tuner.width() == 5
        tuner.record(5, seconds, 1.0)
    assert tuner.width() == 5


def test_statistics_outlive_a_job():
    statistics = WindowStatistics()
    tuner = WindowTuner("auto", statistics)
    for _ in range(40):
        width = tuner.width()
        assert tuner.known(width) == (width in statistics.widths)
        tuner.record(width, 1.0, float(width))
    again = WindowTuner("auto", statistics)
    assert again.width() == 32 and again.known(32)


def test_only_widths_that_were_offered_are_chosen():
    tuner, found = WindowTuner("auto", widths=(2, 4)), set()
    for _ in range(30):
        width = tuner.width()
        found.add(width)
        tuner.record(width, 1.0, 1.0)
    assert found == {2, 4}
