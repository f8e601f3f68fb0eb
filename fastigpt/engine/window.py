"""Chooses how many tokens a pass scores when window="auto": the width that keeps the most tokens per second.

A pass of W tokens costs more than a pass of one and keeps between 1 and W tokens. Both figures are measured while a job
runs, so nothing has to be calibrated. The choice changes the time a job takes and never its tokens.
"""

from __future__ import annotations

WIDTHS = (1, 2, 4, 8, 16, 32)
_TRIALS = 2  # passes each width gets before it is judged
_MEMORY = 0.8  # weight of the past in the running averages
_GIVE_UP = 1.5  # wider windows are not tried once one was this much slower per token than the best


class WindowTuner:
    """One job's choice. `width()` gives the next pass its width, `record()` says how that pass went."""

    def __init__(self, window: int | str) -> None:
        self._fixed = None if window == "auto" else int(window)
        self._seconds_per_token: dict[int, float] = {}
        self._trials: dict[int, int] = {}
        self._passes = 0

    def width(self) -> int:
        if self._fixed is not None:
            return self._fixed
        best = min(self._seconds_per_token.values(), default=0.0)
        for width in WIDTHS:
            if self._trials.get(width, 0) < _TRIALS:
                return width
            if self._seconds_per_token[width] > _GIVE_UP * best:
                break
        return min(self._seconds_per_token, key=self._seconds_per_token.__getitem__)

    def record(self, width: int, seconds: float, kept: float) -> None:
        """One pass of `width` took `seconds` and kept `kept` tokens per image on average."""
        cost = seconds / max(kept, 1e-9)
        trials = self._trials.get(width, 0)
        self._trials[width] = trials + 1
        if trials <= 1:  # the first pass of a shape pays for warming up
            self._seconds_per_token[width] = cost
        else:
            self._seconds_per_token[width] = _MEMORY * self._seconds_per_token[width] + (1 - _MEMORY) * cost
