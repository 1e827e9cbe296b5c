"""Statistics of pairs against published values, and against how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from launcher.tools import paired


def test_the_interval_is_the_published_one():
    """The example of 50 pairs, 12 and 2 of which differ, in Newcombe, Statistics in Medicine 17, 1998, 2635-2650."""
    assert paired.difference_interval(12, 2, 50) == pytest.approx((0.0611, 0.3447), abs=1e-4)


@pytest.mark.parametrize(("lost", "gained", "total"), [(0, 0, 5), (3, 1, 218), (40, 0, 40), (0, 1, 1)])
def test_it_is_turned_around_with_the_models_and_holds_the_estimate(lost, gained, total):
    low, high = paired.difference_interval(lost, gained, total)
    assert -1 <= low <= (lost - gained) / total <= high <= 1
    assert paired.difference_interval(gained, lost, total) == pytest.approx((-high, -low))


def test_where_no_answer_differs_few_images_still_prove_little():
    z = paired.Z_95
    assert paired.difference_interval(0, 0, 218)[1] == pytest.approx(z * z / (218 + z * z))


def test_it_holds_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(0)
    lost, gained, total, held, tries = 0.06, 0.03, 120, 0, 600
    for _ in range(tries):
        b, c, _ = rng.multinomial(total, [lost, gained, 1 - lost - gained]).tolist()
        low, high = paired.difference_interval(b, c, total)
        held += low <= lost - gained <= high
    assert 0.92 < held / tries < 0.985


def test_mcnemar_of_many_images_is_as_exact_and_quick():
    exact = 2 * sum(math.comb(1000, k) for k in range(461)) / 2**1000
    assert paired.mcnemar_p(460, 540) == pytest.approx(exact, rel=1e-9)
    z = 400 / math.sqrt(100_000)  # of the normal distribution, with its correction by one
    assert paired.mcnemar_p(49_800, 50_200) == pytest.approx(
        math.erfc((z - 1 / math.sqrt(1e5)) / math.sqrt(2)), rel=0.01
    )
    assert paired.mcnemar_p(0, 50_000) == 0


def test_mcnemar_is_exact():
    assert paired.mcnemar_p(0, 0) == 1
    assert paired.mcnemar_p(5, 5) == 1
    assert paired.mcnemar_p(5, 0) == pytest.approx(2 / 32)
    assert paired.mcnemar_p(1, 7) == pytest.approx(2 * 9 / 256)
