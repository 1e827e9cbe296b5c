from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from launcher.engine.tuning.probe import Probe
from launcher.engine.tuning.speed_line import towards_the_line

SIZES = (32, 64, 96, 128, 160)


def on_a_line(size, *, empty_step=9.2, image=0.945):
    """Images per second where a step takes some time whatever the batch."""
    return 1000 * size / (empty_step + image * size)


def measured(speed, *, sizes=SIZES, noise=0.0, seed=0):
    """Speeds as they come from a machine on which each is off by some ``noise``."""
    chance = random.Random(seed)  # noqa: S311
    return [
        Probe(
            batch_size=size,
            images_per_s=speed(size) * chance.gauss(1, noise),
            noise=abs(chance.gauss(0, noise)),
            memory_bytes=size,
            state_bytes=1,
        )
        for size in sizes
    ]


def worst(probes, speed):
    """By how much the ratio of any speed to the last one's is wrong."""
    last = probes[-1].images_per_s / speed(probes[-1].batch_size)
    return max(abs(p.images_per_s / speed(p.batch_size) / last - 1) for p in probes[2:])


def test_noise_near_the_peak_becomes_much_less():
    before, after = [], []
    for seed in range(200):
        probes = measured(on_a_line, noise=0.03, seed=seed)
        before.append(worst(probes, on_a_line))
        after.append(worst(towards_the_line(probes), on_a_line))
    assert statistics.median(before) > 0.03
    assert statistics.median(after) < 0.01
    assert statistics.mean(after) < 0.5 * statistics.mean(before)


def test_what_lies_on_a_line_stays_where_it_is():
    probes = measured(on_a_line)
    found = towards_the_line(probes)
    assert [p.images_per_s for p in found] == pytest.approx([p.images_per_s for p in probes])
    assert [p.memory_bytes for p in found] == list(SIZES)


@pytest.mark.parametrize(("noise", "left"), [(0.0, 0.0), (0.005, 0.01), (0.02, 0.04)])
def test_a_cliff_that_is_more_than_noise_stays_a_cliff(noise, left):
    def cliff(size):
        return on_a_line(size) * (0.85 if size > 96 else 1)

    off = [
        abs(found.images_per_s / cliff(found.batch_size) - 1)
        for seed in range(100)
        for found in towards_the_line(measured(cliff, noise=noise, seed=seed))
    ]
    assert statistics.mean(off) <= left + 1e-9


def test_a_speed_that_falls_with_the_batch_is_on_no_line():
    probes = [replace(p, noise=0.05) for p in measured(lambda size: 100 * (1 + 8 / size))]
    assert towards_the_line(probes) == probes


def test_where_noise_is_not_known_nothing_changes():
    noisy = measured(on_a_line, noise=0.1)
    unknown = [replace(p, noise=0.0) for p in noisy]
    found = [p.images_per_s for p in towards_the_line(unknown)]
    assert found == pytest.approx([p.images_per_s for p in noisy])


def test_through_three_sizes_every_line_goes():
    probes = measured(on_a_line, sizes=(8, 16, 24), noise=0.2)
    assert towards_the_line(probes) == probes
