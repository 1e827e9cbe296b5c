"""The log of a device that computes while its rank goes on; a CPU that says so stands for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from launcher.engine.device import Device
from launcher.engine.non_finite import LAG


@dataclass(frozen=True, kw_only=True)
class Ahead(Device):
    """A CPU from which results are read as from a GPU."""

    copied: list = field(default_factory=list)

    @property
    def runs_ahead(self):
        return True


CHANGES = {"batch": {"size": 4}, "tracking": {"log_every": 1}, "train": {"epochs": 2}}


def ahead(parts):
    parts.device = Ahead(type="cpu")


def test_its_lines_are_those_of_a_cpu_in_the_same_order(make_run, engine, one_rank):
    at_once = engine.train(make_run("at-once", **CHANGES)).lines
    assert [line["split"] for line in at_once].count("val") == 2
    assert engine.train(make_run("later", **CHANGES), prepare=ahead).lines == at_once


@pytest.mark.parametrize("poll", [3, 6])
def test_a_stop_loses_none_and_a_resume_repeats_none(make_run, engine, one_rank, poll):
    whole, run = engine.train(make_run("whole", **CHANGES)).lines, make_run("stopped", **CHANGES)
    first = engine.train(run, stop=engine.at_poll(poll), prepare=ahead)
    assert 0 < first.step < whole[-1]["step"]
    assert [line["step"] for line in first.lines if line["split"] == "train"] == [*range(1, first.step + 1)]
    assert first.lines + engine.train(run, prepare=ahead).lines == whole


def test_a_window_is_not_read_before_the_device_has_had_time_for_it(make_run, engine, one_rank):
    steps, read = [0], []

    class Slow(Ahead):
        def to_host_later(self, tensor):
            began, copied = steps[0], tensor.clone()

            def wait():
                read.append((began, steps[0]))
                return copied

            return wait

    def prepare(parts):
        parts.device = Slow(type="cpu")
        forward = parts.model.module.forward

        def count(images):
            steps[0] += parts.model.module.training
            return forward(images)

        parts.model.module.forward = count

    engine.train(make_run(**CHANGES), prepare=prepare)
    ends = (steps[0] // 2, steps[0])  # before a validation and a checkpoint all is read
    assert read
    assert all(at - began >= LAG - 1 or at in ends for began, at in read)
    assert any(at - began >= LAG - 1 and at not in ends for began, at in read)
