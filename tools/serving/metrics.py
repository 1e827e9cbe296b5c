"""What a server counts, in Prometheus's words; several processes put their counts together in a folder."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's own: where several processes keep their counts."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counts of a process."""

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        self.requests = Counter(
            "launch_requests", "Requests that were answered", ["path", "code"], registry=self._own
        )  # its name ends in _total
        self.seconds = Histogram(
            "launch_request_seconds", "Of a request to /predict, all in all", buckets=SECONDS, registry=self._own
        )
        self.batch = Histogram(
            "launch_batch_images", "Images that were computed at once", buckets=IMAGES, registry=self._own
        )
        self.queue = Gauge(
            "launch_queue_images",
            "Images that are decoded, waiting or computed",
            registry=self._own,
            multiprocess_mode="livesum",
        )

    def text(self) -> tuple[bytes, str]:
        """The counts of all processes, and what type of text they are."""
        registry = self._own
        if FOLDER_VARIABLE in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST
