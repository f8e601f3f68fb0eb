"""Canvases that wait for a slot, and whose turn it is: requests take turns, a canvas at a time, so that one for ten
images does not keep those for one waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


class Waiting(Generic[Owner]):
    """Owners (any hashable) and the numbers of their canvases that wait. Not safe to share between threads."""

    def __init__(self) -> None:
        self._turns: deque[Owner] = deque()
        self._canvases: dict[Owner, deque[int]] = {}

    def __len__(self) -> int:
        return sum(len(canvases) for canvases in self._canvases.values())

    def add(self, owner: Owner, count: int) -> None:
        """Canvases 0 … count − 1 of an owner who has none yet."""
        self._turns.append(owner)
        self._canvases[owner] = deque(range(count))

    def take(self, count: int, cost: Callable[[Owner], int], budget: int) -> list[tuple[Owner, int]]:
        """At most so many canvases, one of each owner before the second of any, and at least one if any waits and
        count ≥ 1. Whoever takes canvases of an owner pays for them once; what is taken costs no more than the budget,
        or is of one owner."""
        taken: list[tuple[Owner, int]] = []
        paid: set[Owner] = set()
        while self._turns and len(taken) < count:
            owner = self._turns[0]
            if owner not in paid:
                price = cost(owner)
                if paid and price > budget:
                    break
                budget -= price
                paid.add(owner)
            self._turns.popleft()
            canvases = self._canvases[owner]
            taken.append((owner, canvases.popleft()))
            if canvases:
                self._turns.append(owner)
            else:
                del self._canvases[owner]
        return taken

    def drop(self, owner: Owner) -> int:
        """Forgets an owner; how many canvases of theirs waited."""
        canvases = self._canvases.pop(owner, None)
        if canvases is None:
            return 0
        self._turns.remove(owner)
        return len(canvases)

    def owners(self) -> list[Owner]:
        return list(self._turns)
