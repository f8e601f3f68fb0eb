"""What /metrics tells, in a registry of its own: nothing of any request but how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastigpt.server.batch import Batch

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_PASSES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Counters and histograms that requests feed. batches: by the names of their models."""

    def __init__(self, batches: Callable[[], Iterable[tuple[str, Batch]]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fastigpt_requests", "Requests that were answered.", ["route", "code"], registry=registry
        )
        self.refused = Counter("fastigpt_refused", "Requests that were refused, and why.", ["why"], registry=registry)
        self.queue = Histogram(
            "fastigpt_queue_seconds", "From a request to its first slot.", registry=registry, buckets=_SECONDS
        )
        self.first_row = Histogram(
            "fastigpt_first_row_seconds", "From a request to its first row.", registry=registry, buckets=_SECONDS
        )
        self.draw = Histogram(
            "fastigpt_draw_seconds", "From the first slot to the last image.", registry=registry, buckets=_SECONDS
        )
        self.sign = Histogram("fastigpt_sign_seconds", "To sign an image.", registry=registry, buckets=_SECONDS)
        self.passes = Histogram(
            "fastigpt_passes", "Passes of the model that an image took.", registry=registry, buckets=_PASSES
        )
        registry.register(_Batches(batches))


class _Batches(Collector):
    def __init__(self, batches: Callable[[], Iterable[tuple[str, Batch]]]) -> None:
        self._batches = batches

    def collect(self) -> Iterator[Metric]:
        names = {
            "running": GaugeMetricFamily("fastigpt_images_running", "Images that are being drawn.", labels=["model"]),
            "waiting": GaugeMetricFamily("fastigpt_images_waiting", "Images that wait for a slot.", labels=["model"]),
            "slots": GaugeMetricFamily("fastigpt_slots", "Images that can be drawn side by side.", labels=["model"]),
        }
        counts = {
            "images": CounterMetricFamily("fastigpt_images", "Images that were drawn.", labels=["model"]),
            "rows": CounterMetricFamily("fastigpt_rows", "Rows of images that were drawn.", labels=["model"]),
            "cancelled": CounterMetricFamily("fastigpt_cancelled", "Images that were given up.", labels=["model"]),
            "failures": CounterMetricFamily("fastigpt_failures", "Times that an engine failed.", labels=["model"]),
        }
        for name, batch in self._batches():
            for gauge, value in (("running", batch.running), ("waiting", batch.waiting), ("slots", batch.capacity)):
                names[gauge].add_metric([name], value)
            for counter, family in counts.items():
                family.add_metric([name], getattr(batch.counts, counter))
        yield from names.values()
        yield from counts.values()
