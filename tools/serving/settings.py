"""What a server is told: one value from the command line to each of its processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is served."""

    model: str
    """A run directory, or an ONNX file that was exported from one."""
    host: str = "127.0.0.1"
    """The name or address to listen at."""
    port: int = 8000
    """0: any that is free."""
    workers: int = 1
    """Processes, each with the model and its share of the cores."""
    max_batch: int = 4
    """Images that a core computes at once at most; 1: one by one, by all cores. More leave a core's caches."""
    max_wait_ms: float = 2.0
    """The first image of a batch waits so long for others at most."""
    max_queue: int = 256
    """Images of a process that are decoded, waiting or computed at most; further requests are refused with 503."""
    max_body_mb: float = 32.0
    """A larger body is refused with 413."""
    max_pixels: int = 64_000_000
    """Of an image; a larger one is refused with 413, before it is decoded."""
    timeout_s: float = 30.0
    """A request that takes longer is answered with 504, or with 408 if its body has not come by then."""
    drain_s: float = 0.5
    """Told to stop, a server goes on answering for so long, while /ready says 503 and balancers look elsewhere."""

    def to_json(self) -> str:
        """For a process of the server."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What :meth:`to_json` wrote."""
        return cls(**json.loads(text))
