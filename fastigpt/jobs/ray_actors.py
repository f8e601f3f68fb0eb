"""Ray: actors with a model each, which fill the directory as every worker does. The directory is all that they share,
so an actor, a node or the driver may be lost at any time.

An actor draws one shard for each call. Ray starts lost actors anew and repeats their calls (max_restarts and
max_task_retries are unlimited); what a lost one had claimed is taken over by the others.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import threading
import time
from dataclasses import replace
from typing import Any

from fastigpt.extras import require
from fastigpt.jobs.asked import Asked, How, as_plain, from_plain
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.parameters import FILE
from fastigpt.jobs.store import Store, open_store


class Actor:
    """A worker in a process of Ray's. order: as for a local worker; "job", once it is known, the text of job.json."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._worker: Any = None

    def open(self) -> str:
        """Makes the job, or finds it; the text of job.json."""
        self._made()
        return open_store(self._order["store"]).read(FILE).decode()

    def step(self) -> str:
        """Draws a shard. "drawn", "wait": all that are missing are being drawn by others, "done": none is missing."""
        found = self._made().step()
        return found if isinstance(found, str) else "drawn"

    def _made(self) -> Any:
        if self._worker is None:  # not in __init__: what is wrong should be told, not tried again for ever
            if "job" in self._order:
                check_seen(open_store(self._order["store"]), self._order["job"], f"the node {platform.node()}")
            self._worker = self._make()
        return self._worker

    def _make(self) -> Any:
        asked, how = from_plain(self._order)
        import torch

        if how.threads is not None:
            torch.set_num_threads(how.threads)
        from fastigpt.jobs.drawing import drawer_of, draws, open_job
        from fastigpt.jobs.worker import Worker

        job, model = open_job(open_store(self._order["store"]), asked, how)
        return Worker(job, draws(job, model, how), drawer_of(model), part=how.part)


def check_seen(store: Store, job: str, who: str) -> None:
    """Raises OSError if a machine does not see the job that the others are drawing."""
    found = JobDirectory.find(store)
    if found is None or store.read(FILE).decode() != job:
        raise OSError(f"{who} does not see the job in {store.name}: use a file system that all nodes share, or a URL")


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
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False if address == "local" else None,
        )
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has put its own in their place
                signal.signal(number, handler)
    try:
        _drive(ray, store, asked, how, actors)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    finally:
        if started:
            ray.shutdown()


def _drive(ray: Any, store: Store, asked: Asked, how: How, actors: int | None) -> None:
    nodes = ray.nodes()
    count, needs, threads = share_out(nodes, actors)
    cores = [node["Resources"].get("CPU", 0) for node in nodes if node.get("Alive")]
    on_a_node = 1 if threads is None else max(1, int(max(cores)) // threads)
    order = {"store": store.address, **as_plain(asked, replace(how, threads=threads, workers=on_a_node))}
    made = ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(Actor)
    first = made.remote(order)  # alone, so that there is one job, and all see it
    text = ray.get(first.open.remote())
    check_seen(store, text, "this machine")
    actors_at_work = [first, *(made.remote({**order, "job": text}) for _ in range(count - 1))]
    at_work = {actor.step.remote(): actor for actor in actors_at_work}
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
