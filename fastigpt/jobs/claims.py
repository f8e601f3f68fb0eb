"""Who is drawing which shard: small files that keep workers out of each other's way. Nothing that is right or wrong
depends on them: a shard that two workers draw is the same bytes.

A claim is kept alive by a heartbeat that changes it. Whoever finds a claim of a process of its own machine that has
ended, or one that has not changed for a while by its own clock, takes the shard over; clocks of two machines are never
compared.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from fastigpt.jobs.store import Store
from fastigpt.owner import Owner

HEARTBEAT, STALE = 5.0, 30.0  # seconds


class Claims:
    """Of one worker. stale: a claim of another machine that has not changed for so many seconds is given up."""

    def __init__(
        self,
        store: Store,
        owner: Owner,
        *,
        heartbeat: float = HEARTBEAT,
        stale: float = STALE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._owner, self._clock = store, owner, clock
        self._heartbeat, self._stale = heartbeat, stale
        self._seen: dict[str, tuple[bytes, float]] = {}  # what claims held, and since when

    def take(self, shards: Sequence[int]) -> int | None:
        """Claims one of these shards, in the order they are given; None if others are at work on all of them."""
        taken = self._store.names("claims")
        for shard in shards:
            if _file(shard) not in taken and self._store.create(_name(shard), self._text(0)):
                return shard
        for shard in shards:
            if self._given_up(_name(shard)):
                self._store.remove(_name(shard))
                if self._store.create(_name(shard), self._text(0)):
                    return shard
        return None

    @contextmanager
    def held(self, shard: int) -> Iterator[None]:
        """Keeps a claim alive, and gives it back at the end."""
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(self._heartbeat):
                count += 1
                with suppress(OSError):  # then others think that we are gone, and draw the same bytes
                    self._store.put(_name(shard), self._text(count))

        thread = threading.Thread(target=beat, name="fastigpt.claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(OSError):
                self._store.remove(_name(shard))

    def _text(self, beat: int) -> bytes:
        o = self._owner
        return json.dumps(
            {"host": o.host, "machine": o.machine, "pid": o.pid, "started": o.started, "beat": beat}
        ).encode()

    def _given_up(self, name: str) -> bool:
        try:
            text = self._store.read(name)
        except FileNotFoundError:
            return True
        before, since = self._seen.get(name, (None, 0.0))
        if text != before:
            since = self._clock()
            self._seen[name] = text, since
        owner = claimant(text)
        return owner == self._owner or (owner is not None and owner.gone()) or self._clock() - since >= self._stale


def claimant(text: bytes) -> Owner | None:
    """Whose claim it is; None if that cannot be read."""
    try:
        data = json.loads(text)
        return Owner(str(data["host"]), str(data["machine"]), int(data["pid"]), str(data["started"]))
    except (ValueError, TypeError, KeyError):
        return None


def _file(shard: int) -> str:
    return f"{shard:06d}.json"


def _name(shard: int) -> str:
    return f"claims/{_file(shard)}"
