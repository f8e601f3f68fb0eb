"""Times peers in turn, several rounds in one run, and sets each figure beside the floor of that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastigpt.bench.floor import Floor, pass_floor
from fastigpt.bench.machine import Machine, measure_machine
from fastigpt.bench.peers import Peer
from fastigpt.bench.timing import repeat, typical
from fastigpt.spec import ModelSpec

SHARES = (1 / 32, 1 / 2, 31 / 32)  # of the canvas: where passes are timed


@dataclass
class Timing:
    """One peer at one n. passes[i]: seconds of single passes at positions[i], over all rounds. floors[i]: that pass's
    floor at the limits measured in the same run. window: tokens that a pass scores. tokens_per_pass: those it decides,
    measured on images; None: not measured, so nothing is known of whole images."""

    peer: str
    n: int
    dtype: str
    kv_dtype: str
    window: int
    positions: list[int]
    passes: list[list[float]] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    n_pixels: int = 0
    tokens_per_pass: float | None = 1.0

    def milliseconds(self) -> list[float]:
        return [1e3 * typical(times)[0] for times in self.passes]

    def spread(self) -> float:
        """The largest spread among the positions: half the distance between quartiles over the median."""
        return max(typical(times)[1] for times in self.passes)

    def seconds(self) -> float | None:
        """Of n whole images: passes are timed at three positions and lie on straight lines between them, since what
        grows with the position, the cache that is read, grows linearly. None if tokens_per_pass is not known."""
        return self._images([typical(times)[0] for times in self.passes])

    def floor_seconds(self) -> float | None:
        """Of as many passes at the machine's limits."""
        return self._images([floor.seconds for floor in self.floors])

    def images_per_minute(self) -> float | None:
        seconds = self.seconds()
        return None if seconds is None else 60 * self.n / seconds

    def share_of_floor(self) -> float:
        """Of the passes; 1 = at the machine's limit."""
        measured = [typical(times)[0] for times in self.passes]
        floors = [floor.seconds for floor in self.floors]
        return whole_images(self.positions, floors, self.n_pixels) / whole_images(
            self.positions, measured, self.n_pixels
        )

    def _images(self, seconds_of_pass: Sequence[float]) -> float | None:
        if self.tokens_per_pass is None:
            return None
        return whole_images(self.positions, seconds_of_pass, self.n_pixels) / self.tokens_per_pass


def timed_positions(spec: ModelSpec) -> list[int]:
    """Where passes are timed: early, in the middle and late in the image."""
    return [max(1, int(share * spec.n_positions)) for share in SHARES]


def whole_images(positions: Sequence[int], values: Sequence[float], end: int) -> float:
    """Sum over positions 0 … end − 1 of the piecewise linear function through the values at three positions, its outer
    pieces prolonged."""
    (a, b, c), (x, y, z) = positions, values
    total = 0.0
    for p in range(end):
        total += x + (y - x) * (p - a) / (b - a) if p <= b else y + (z - y) * (p - b) / (c - b)
    return total


def measure(
    spec: ModelSpec,
    peers: Sequence[Peer],
    counts: Sequence[int],
    *,
    device: torch.device,
    rounds: int = 3,
    repeats: int = 4,
    branches: int = 1,
) -> tuple[Machine, list[Timing]]:
    """Every peer at every n: `rounds` rounds, in each of which the peers take turns and the machine's limits are
    measured anew; the limits returned are the best of all rounds. branches: sequences of an image, 2 with guidance."""
    positions = timed_positions(spec)
    timings = {
        (k, n): Timing(
            peer.name,
            n,
            _name(peer.dtype),
            _name(peer.kv_dtype),
            peer.window,
            positions,
            [[] for _ in positions],
            n_pixels=spec.n_positions,
            tokens_per_pass=peer.tokens_per_pass,
        )
        for k, peer in enumerate(peers)
        for n in counts
    }
    machines = []
    for _ in range(rounds):
        machines.append(measure_machine(device))
        for n in counts:
            for i, position in enumerate(positions):
                for k, peer in enumerate(peers):
                    work = peer.prepared_pass(n=n * branches, position=position, window=peer.window)
                    timings[k, n].passes[i] += repeat(work, device, repeats)
    machine = _best(machines)
    for (k, n), timing in timings.items():
        for position in positions:
            timing.floors.append(_floor(spec, peers[k], n * branches, position, machine))
    return machine, list(timings.values())


def _floor(spec: ModelSpec, peer: Peer, n: int, position: int, machine: Machine) -> Floor:
    # int8 products run at least as fast as bfloat16 ones; torch offers no such rate, so the floor is the bf16 one.
    name = _name(torch.bfloat16 if peer.dtype == torch.int8 else peer.dtype)
    return pass_floor(
        spec,
        n=n,
        position=position,
        window=peer.window,
        dtype=peer.dtype,
        kv_dtype=peer.kv_dtype,
        bandwidth=machine.bandwidth,
        gemm=machine.gemm.get(name, max(machine.gemm.values())),
    )


def _best(machines: Sequence[Machine]) -> Machine:
    return Machine(
        machines[0].name,
        machines[0].threads,
        max(m.bandwidth for m in machines),
        {name: max(m.gemm[name] for m in machines) for name in machines[0].gemm},
        {name: min(m.spread[name] for m in machines) for name in machines[0].spread},
    )


def ratio(slow: Timing, fast: Timing) -> str:
    """How many times faster whole images are, or "within noise" where the difference is smaller than the spread of
    either; "–" where it is not known."""
    theirs, ours = slow.seconds(), fast.seconds()
    if theirs is None or ours is None:
        return "–"
    value = theirs / ours
    if abs(value - 1) <= slow.spread() + fast.spread():
        return "within noise"
    return f"{value:.2f}×"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
