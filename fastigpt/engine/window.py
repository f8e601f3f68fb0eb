"""Chooses how many tokens a pass scores when window="auto": the width that keeps the most tokens per second.

A pass of W tokens costs more than a pass of one and keeps between 1 and W tokens. Both figures are measured while
canvases are drawn, so nothing has to be calibrated, and what was found out outlives a job. The choice changes the time
a canvas takes and never its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTHS = (1, 2, 4, 8, 16, 32)
_TRIALS = 3  # records by the fastest of which a pass is judged: the first of a width pays for warming up
_PROBE_EVERY = 24  # records, of which one is of a neighbour of the best: what is true changes down the canvas
_MEMORY = 0.9  # weight of a width's past in its averages
_HOPE = 0.5  # share of what a width did not keep that one record more might, divided by the records there are


@dataclass
class _Seen:
    """Of one width: how often it was recorded, seconds of a pass, tokens a pass kept of each canvas on average."""

    trials: int = 0
    seconds: float = 0.0
    kept: float = 0.0

    @property
    def per_token(self) -> float:
        return self.seconds / max(self.kept, 1e-9)

    def hoped(self, width: int) -> float:
        """Tokens that a pass may turn out to keep: with few canvases the first records say little."""
        return self.kept + _HOPE * (width - self.kept) / self.trials

    def add(self, seconds: float, kept: float) -> None:
        self.trials += 1
        # The mean of the first records, then an average that forgets.
        weight = max(1 / self.trials, 1 - _MEMORY)
        self.kept += weight * (kept - self.kept)
        if self.trials == 1:
            self.seconds = seconds
        elif self.trials <= _TRIALS:  # the first pass of a shape pays for warming up
            self.seconds = min(self.seconds, seconds)
        else:  # a pass that took much longer was interrupted: it counts, but not in full
            self.seconds += (1 - _MEMORY) * (min(seconds, 2 * self.seconds) - self.seconds)


@dataclass
class WindowStatistics:
    """What passes of each width cost and kept. An engine keeps one for each number of canvases that are drawn side by
    side."""

    widths: dict[int, _Seen] = field(default_factory=dict)
    records: int = 0


class WindowTuner:
    """The choice of one session. `width()` gives the next pass its width, `record()` says how that pass went.

    window: a fixed width, or None or "auto". statistics: what earlier sessions found out. widths: those to choose from,
    in rising order.
    """

    def __init__(
        self,
        window: int | str | None,
        statistics: WindowStatistics | None = None,
        widths: tuple[int, ...] = WIDTHS,
    ) -> None:
        self._fixed = None if window in (None, "auto") else int(window)
        self._widths = widths
        self._statistics = WindowStatistics() if statistics is None else statistics

    def width(self) -> int:
        if self._fixed is not None:
            return self._fixed
        seen = self._statistics.widths
        tried = [width for width in self._widths if width in seen]  # the narrowest ones, without gaps
        if not tried:
            return self._widths[0]
        best = min(tried, key=lambda width: seen[width].per_token)
        rate = seen[best].per_token
        if len(tried) < len(self._widths) and self._promising(tried, self._widths[len(tried)], rate):
            return self._widths[len(tried)]
        hopeful = min(tried, key=lambda width: seen[width].seconds / seen[width].hoped(width))
        if hopeful != best and seen[hopeful].seconds / seen[hopeful].hoped(hopeful) < rate:
            return hopeful
        at = tried.index(best)
        near = [best, *tried[at + 1 : at + 2], *tried[max(0, at - 1) : at]]
        for width in near:
            if seen[width].trials < (_TRIALS if width == best else 2):
                return width
        turn, rest = divmod(self._statistics.records, _PROBE_EVERY)
        return near[1 + turn % (len(near) - 1)] if rest == 0 and len(near) > 1 else best

    def known(self, width: int) -> bool:
        """Whether there is nothing to be found out about passes of this width before the next is launched."""
        return self._fixed is not None or width in self._statistics.widths

    def _promising(self, tried: list[int], wider: int, rate: float) -> bool:
        """Whether a width that was not tried yet may beat the best one: if its passes cost what the last two widths let
        expect, and keep as many more tokens as they score. No place of a window is likelier to be kept than those
        before it."""
        last = self._statistics.widths[tried[-1]]
        if last.per_token == rate:
            return True
        seconds = last.seconds
        if len(tried) > 2:  # one row is often computed in another way than more, so its time says nothing of theirs
            before = self._statistics.widths[tried[-2]].seconds
            seconds += max(0.0, seconds - before) / (tried[-1] - tried[-2]) * (wider - tried[-1])
        return seconds / (last.hoped(tried[-1]) * wider / tried[-1]) < rate

    def record(self, width: int, seconds: float, kept: float) -> None:
        """One pass of `width` took `seconds` and kept `kept` tokens of each canvas on average."""
        seen = self._statistics.widths.get(width) or _Seen()
        seen.add(seconds, kept)
        self._statistics.widths[width] = seen  # only now: sessions in other threads choose by what is here
        self._statistics.records += 1
