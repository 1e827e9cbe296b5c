"""How fast a rank trains, and which part of the time it waits for images."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.engine.device import Device
    from launcher.recipe.schema_data import DataConfig

LARGE_SHARE, LEAST_S = 0.2, 10.0
"""An epoch in which a rank has waited for this fraction of the time, and for so many seconds, is worth a line."""


class Pace:
    """Clocks of a rank.

    Args:
        device: where it computes. A wait counts where that has nothing left to do, for else it costs nothing.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._window_since = self._epoch_since = time.monotonic()
        self._window_samples = self._epoch_samples = self._window_steps = 0
        self.window_waited = self._epoch_waited = 0.0
        """Seconds that this rank waited since the last window."""
        self.last_window = (0.0, 0.0)
        """Means over the steps of the last window: seconds of a step, and those of them that this rank waited."""
        self._paused_at: float | None = None
        self._told = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Get a batch within it."""
        began = time.monotonic()
        yield
        if self._device.is_idle():
            waited = time.monotonic() - began
            self.window_waited += waited
            self._epoch_waited += waited

    def pause(self) -> None:
        """What follows is no training, until :meth:`begin`."""
        self._paused_at = time.monotonic()

    def begin(self) -> None:
        """Count an epoch, or what is left of it, from now on; the first wait, for loaders that start, is no part."""
        now = time.monotonic()
        if self._paused_at is not None:
            self._window_since += now - self._paused_at
        self._paused_at, self._epoch_since, self._epoch_samples, self._epoch_waited = None, now, 0, 0.0

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens within it is no part of training."""
        began = time.monotonic()
        yield
        self._window_since += time.monotonic() - began

    def took(self, num_samples: int) -> None:
        """A step of so many samples of all ranks is taken."""
        self._window_samples += num_samples
        self._window_steps += 1
        self._epoch_samples += num_samples

    def window(self) -> dict[str, float]:
        """Since the last time: images per second of all ranks, and the fraction of the time that this rank waited."""
        seconds = max(1e-9, time.monotonic() - self._window_since)
        found = {
            "images_per_s": self._window_samples / seconds,
            "data_wait": round(min(1.0, self.window_waited / seconds), 4),
        }
        steps = max(1, self._window_steps)
        self.last_window = (seconds / steps, self.window_waited / steps)
        self._window_since, self._window_samples, self._window_steps = time.monotonic(), 0, 0
        self.window_waited = 0.0
        return found

    @property
    def epoch_speed(self) -> float:
        """Images per second of all ranks in the epoch, or in what of it was trained without a stop, until its end."""
        now = time.monotonic() if self._paused_at is None else self._paused_at
        return self._epoch_samples / max(1e-9, now - self._epoch_since)

    def explain_wait(self, config: DataConfig) -> str | None:
        """At the end of an epoch: that the model waited for images, and what to do; None: it did not, or it is told."""
        seconds, waited = time.monotonic() - self._epoch_since, self._epoch_waited
        if self._told or waited < LEAST_S or waited < LARGE_SHARE * seconds:
            return None
        self._told = True
        gives, takes = self._epoch_samples / seconds, self._epoch_samples / max(1e-9, seconds - waited)
        return (
            f"{waited / seconds:.0%} of the time was spent waiting for images: the loader gives {gives:.0f} of the "
            f"{takes:.0f} images/s that the model takes: {_cure(config)}"
        )


def _cure(config: DataConfig) -> str:
    """What would make the loader faster, first what helps most."""
    if config.dataset or config.transform:
        return "make data.dataset or data.transform faster, or give more cores (data.workers)"
    if config.cache == "none":
        return "data.cache=disk (or ram) would decode each image only once"
    return "give more cores (data.workers), or augment less"
