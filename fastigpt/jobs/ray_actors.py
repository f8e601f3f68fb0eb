"""Ray: actors with a model each, which fill the directory as every worker does. The directory is all that they share,
so an actor, a node or the driver may be lost at any time.

An actor draws one shard for each call. Ray starts lost actors anew and repeats their calls (max_restarts and
max_task_retries are unlimited); what a lost one had claimed is taken over by the others.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from fastigpt.extras import require
from fastigpt.jobs.asked import Asked, How, as_plain, from_plain
from fastigpt.jobs.store import Store, open_store


class Actor:
    """A worker in a process of Ray's. order: as for a local worker."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._worker: Any = None

    def step(self) -> str:
        """Draws a shard. "drawn", "wait": all that are missing are being drawn by others, "done": none is missing."""
        if self._worker is None:  # not in __init__: what is wrong should be told, not tried again for ever
            self._worker = self._made()
        found = self._worker.step()
        return found if isinstance(found, str) else "drawn"

    def _made(self) -> Any:
        asked, how = from_plain(self._order)
        import torch

        if how.threads is not None:
            torch.set_num_threads(how.threads)
        from fastigpt.jobs.drawing import drawer_of, draws, open_job
        from fastigpt.jobs.worker import Worker

        job, model = open_job(open_store(self._order["store"]), asked, how)
        return Worker(job, draws(job, model, how), drawer_of(model), part=how.part)


def run_actors(store: Store, asked: Asked, how: How, address: str, actors: int | None) -> None:
    """Draws with at most so many actors (None: what the cluster has room for now) until no shard is missing.

    address: "local" starts Ray on this machine, "auto" finds the cluster that this machine belongs to. Actors get a GPU
    each if the cluster has any, else the cores of a node, dealt out if several share it. Those that find no room now
    wait for it, and an autoscaling cluster makes some; the others begin at once.
    """
    require("ray", for_="--ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False if address == "local" else None,
        )
    try:
        _drive(ray, store, asked, how, actors)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    finally:
        if started:
            ray.shutdown()


def _drive(ray: Any, store: Store, asked: Asked, how: How, actors: int | None) -> None:
    count, needs, threads = share_out(ray.nodes(), actors)
    order = {"store": store.address, **as_plain(asked, How(**{**vars(how), "threads": threads, "workers": 1}))}
    made = ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(Actor)
    at_work = {}
    for _ in range(count):
        actor = made.remote(order)
        at_work[actor.step.remote()] = actor
    while at_work:
        finished, _ = ray.wait(list(at_work), num_returns=1)
        for call in finished:
            actor = at_work.pop(call)
            found = ray.get(call)
            if found == "wait":
                time.sleep(store.poll)
            if found == "done":
                return  # those that wait for room, or draw what others have committed, are not waited for
            at_work[actor.step.remote()] = actor


def share_out(nodes: list[dict[str, Any]], actors: int | None) -> tuple[int, dict[str, float], int | None]:
    """How many actors, what each asks of Ray, and the threads of each (None: torch's choice)."""
    alive = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    gpus = int(sum(node.get("GPU", 0) for node in alive))
    if gpus:
        return actors or gpus, {"num_gpus": 1}, None
    cores = [int(node.get("CPU", 0)) for node in alive if node.get("CPU", 0) >= 1]
    if not cores:  # a head without cores, of a cluster that will grow
        return actors or 1, {"num_cpus": 1}, 1
    each = min(cores) if actors is None else max(1, min(max(cores), sum(cores) // actors))
    return actors or sum(node // each for node in cores), {"num_cpus": each}, each
