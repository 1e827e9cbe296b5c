from __future__ import annotations

import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from launcher.engine.optimizing.rates import ONE_CYCLE_START, SCHEDULES, lr_factor
from launcher.recipe.schema import OptimConfig

WARMUPS = st.one_of(st.just(0.0), st.floats(0.01, 5.0))
RATES = WARMUPS.flatmap(lambda warmup: st.tuples(st.just(warmup), st.integers(int(warmup) + 1, 50)))
SHAPES = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(list(SCHEDULES)),
        "end_factor": st.floats(0, 1),
        "power": st.floats(0.5, 4),
        "cycles": st.integers(1, 4),
        "cycle_growth": st.floats(1, 3),
        "step_factor": st.floats(0.01, 1),
        "step_epochs": st.one_of(st.just("auto"), st.floats(0.5, 60), st.lists(st.floats(5, 60), min_size=1)),
    }
)
few = settings(max_examples=40)


def test_every_schedule_of_the_schema_has_a_row():
    assert typing.get_args(typing.get_type_hints(OptimConfig)["schedule"]) == tuple(SCHEDULES)


@few
@given(rates=RATES, shape=SHAPES, fraction=st.floats(0, 1.1))
def test_a_rate_is_never_less_than_nothing_or_more_than_the_peak(rates, shape, fraction):
    warmup, epochs = rates
    config = OptimConfig(warmup_epochs=warmup, **shape)
    assert 0 <= lr_factor(fraction * epochs, config, epochs=epochs) <= 1


@few
@given(rates=RATES, shape=SHAPES)
def test_the_peak_is_reached_after_warm_up_and_the_end_where_the_recipe_says(rates, shape):
    warmup, epochs = rates
    config = OptimConfig(warmup_epochs=warmup, **shape)
    rise = warmup or (0.3 * epochs if shape["schedule"] == "one_cycle" else 0.0)
    drops = epochs / 3 if shape["step_epochs"] == "auto" else shape["step_epochs"]
    if shape["schedule"] != "step" or (min(drops) if isinstance(drops, list) else drops) > rise:
        assert lr_factor(rise, config, epochs=epochs) == pytest.approx(1)
    if shape["schedule"] not in ("step", "constant"):
        for at in (epochs, epochs + 1):
            assert lr_factor(at, config, epochs=epochs) == pytest.approx(shape["end_factor"], abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "polynomial", "one_cycle"])
@few
@given(rates=RATES, fraction=st.floats(0, 1), step=st.floats(1e-6, 1e-3))
def test_the_rate_has_no_jumps(kind, rates, fraction, step):
    warmup, epochs = rates
    config = OptimConfig(schedule=kind, warmup_epochs=warmup)
    rise = warmup or (0.3 * epochs if kind == "one_cycle" else math.inf)
    here, there = (lr_factor(fraction * epochs + more, config, epochs=epochs) for more in (0.0, step))
    steepest = math.pi / 2 / rise + 2 / (epochs - (0 if rise == math.inf else rise))
    assert abs(there - here) <= step * steepest + 1e-9


@pytest.mark.parametrize("kind", [name for name in SCHEDULES if name != "one_cycle"])
def test_warm_up_is_a_line(kind):
    config = OptimConfig(schedule=kind, warmup_epochs=4)
    assert [lr_factor(at, config, epochs=15) for at in (0, 1, 2, 3)] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 4])
def test_a_warm_up_as_long_as_training_or_longer_is_cut_off(kind, warmup):
    config = OptimConfig(schedule=kind, warmup_epochs=warmup)
    found = [lr_factor(at, config, epochs=1) for at in (0.25, 0.5, 0.99)]
    assert found == sorted(found)
    if kind != "one_cycle":
        assert found[:2] == [0.25 / warmup, 0.5 / warmup]


STEPS = 30
TORCH = {
    "cosine": ({"end_factor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1)),
    "linear": ({"end_factor": 0.2}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=STEPS)),
    "polynomial": ({"power": 3.0}, lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=3.0)),
    "constant": ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "step": ({"step_epochs": 7.0, "step_factor": 0.3}, lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
    "step at": ({"step_epochs": [3.0, 20.0]}, lambda o: lr_scheduler.MultiStepLR(o, [3, 20], 0.1)),
    "cosine_restarts": (
        {"cycles": 2, "cycle_growth": 2.0},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, STEPS // 3, T_mult=2),
    ),
    "one_cycle": (
        {"end_factor": 1e-4 / 25, "warmup_epochs": 0.4 * (STEPS + 1) - 1},
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=STEPS + 1, pct_start=0.4),
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", TORCH)
def test_values_are_those_of_torch(name):
    """torch counts in calls of step; here an epoch stands for one."""
    values, make = TORCH[name]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, config = make(optimizer), OptimConfig(schedule=name.partition(" ")[0], **values)
    for step in range(STEPS):
        expected = optimizer.param_groups[0]["lr"]
        assert lr_factor(step, config, epochs=STEPS) == pytest.approx(expected, abs=1e-9), step
        scheduler.step()


def test_one_cycle_begins_at_a_25th_of_the_peak_and_rises_for_30_percent():
    config = OptimConfig(schedule="one_cycle")
    found = [lr_factor(at, config, epochs=10) for at in (0, 1.5, 3, 6.5, 10)]
    assert found == pytest.approx([ONE_CYCLE_START, (1 + ONE_CYCLE_START) / 2, 1, 0.5, 0])
