"""Time that a rank spends waiting for images: measured, and told where it is much."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from launcher.engine.device import Device
from launcher.engine.loading import pace
from launcher.engine.loading.pace import Pace
from launcher.recipe.schema_data import DataConfig


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])

    def go(seconds):
        now[0] += seconds

    return go


@dataclass(frozen=True, kw_only=True)
class Busy(Device):
    """A device that still computes when its next batch comes."""

    def is_idle(self):
        return False


def train(found, clock, *, wait, compute, steps=10):
    for _ in range(steps):
        with found.waiting():
            clock(wait)
        clock(compute)
        found.took(32)


def test_a_window_has_its_speed_and_the_fraction_that_was_waited(clock):
    found = Pace(Device(type="cpu"))
    train(found, clock, wait=1, compute=3)
    assert found.window() == {"images_per_s": pytest.approx(8), "data_wait": 0.25}
    found.pause()
    clock(1000)
    found.begin()
    train(found, clock, wait=0, compute=4)
    assert found.window() == {"images_per_s": pytest.approx(8), "data_wait": 0.0}


def test_where_the_model_waits_for_images_an_epoch_ends_with_what_would_help_once(clock):
    found = Pace(Device(type="cpu"))
    train(found, clock, wait=50, compute=1, steps=1)  # loaders start
    found.begin()
    train(found, clock, wait=2, compute=2)
    text = found.explain_wait(DataConfig())
    assert text.startswith("50% of the time was spent waiting for images: the loader gives 8 of the 16 images/s")
    assert "data.cache=disk" in text
    train(found, clock, wait=2, compute=2)
    assert found.explain_wait(DataConfig()) is None


@pytest.mark.parametrize(("config", "cure"), [({"cache": "ram"}, "data.workers"), ({"transform": "a.py:b"}, "faster")])
def test_the_cure_is_one_that_is_not_taken_yet(clock, config, cure):
    found = Pace(Device(type="cpu"))
    train(found, clock, wait=2, compute=2)
    text = found.explain_wait(DataConfig(**config))
    assert cure in text
    assert "data.cache" not in text


@pytest.mark.parametrize(("wait", "compute", "device"), [(0.1, 3, Device), (0.5, 0.5, Device), (2, 2, Busy)])
def test_a_little_and_what_a_busy_device_does_not_notice_is_not_worth_a_line(clock, wait, compute, device):
    found = Pace(device(type="cpu"))
    train(found, clock, wait=wait, compute=compute)
    assert found.explain_wait(DataConfig()) is None
