"""The engine on a GPU: what a CPU cannot show."""

from __future__ import annotations

import statistics

import pytest
import torch

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.device import Device
from launcher.runs import history

pytestmark = pytest.mark.gpu

EPOCH = 6
"""Steps of an epoch of few images: their losses differ more than what is learned in one."""
CLOSE = 2e-3
"""Weights after an epoch: convolutions on a GPU add up in another order each time."""


def exactly(trainer):
    """Nothing random in the model, and whole float32: batches can then be dealt in another way."""
    torch.backends.cudnn.allow_tf32 = False
    for module in trainer.parts.model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def at_poll(number):
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= number


def test_a_checkpoint_has_the_bits_of_its_step_though_steps_go_on(make_run, engine, on_devices):
    """Weights and optimizer are copied by a stream of their own, beside the next step's forward and backward pass."""
    run = make_run(
        model={"arch": "shufflenet_v2_x0_5"},
        batch={"size": 8},
        train={"epochs": 2, "checkpoint": {"every_steps": 1, "keep": 99}},
    )

    def prepare(trainer):
        capture = trainer.state.capture

        def watched():
            weights = trainer.parts.model.module.state_dict()
            torch.save({name: value.cpu().clone() for name, value in weights.items()}, run.path / trainer_step())
            return capture()

        def trainer_step():
            return f"expected-{trainer.state.step}.pt"

        trainer.state.capture = watched

    on_devices(1, lambda who, device: engine.train(run, who, device, prepare=prepare).outcome)
    folders = sorted(run.checkpoints.glob("step-*"))
    assert len(folders) > 6
    for folder in folders:
        expected = torch.load(run.path / f"expected-{int(folder.name[5:])}.pt")
        assert engine.identical(checkpoints.load(folder).model, expected), folder.name


def test_memory_that_runs_out_is_met_with_smaller_batches_and_the_weights_are_the_same(
    make_run, engine, on_devices, cuda
):
    quiet, run = (make_run(name, data={"image_size": 224}, batch={"size": 32}) for name in ("quiet", "full"))

    def train(who, device):
        expected = engine.train(quiet, who, device, prepare=exactly)
        total, most = device.total_memory(), torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.6 * most / total)
        return expected.state, engine.train(run, who, device, prepare=exactly).state

    ((expected, found),) = on_devices(1, train)
    assert history.events(run, "out_of_memory")
    assert engine.largest_difference(expected, found) < CLOSE


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_learns_in_half_precision_as_in_fp32(make_run, engine, on_devices, precision):
    def losses(name, **changes):
        run = make_run(name, batch={"size": 9}, optim={"lr": 0.002}, train={"epochs": 6}, **changes)
        (lines,) = on_devices(1, lambda who, device: engine.train(run, who, device, prepare=exactly).lines)
        return [line["loss"] for line in lines]

    whole, half = losses("fp32"), losses(precision, precision=precision)
    assert half[-1] == pytest.approx(whole[-1], rel=0.05)  # of fp16 the first steps may be left out
    assert statistics.mean(half[-EPOCH:]) < statistics.mean(half[:EPOCH])


def test_precision_is_what_the_device_has_and_a_checkpoint_keeps_it(make_run, engine, on_devices, where):
    run = make_run(precision="auto", batch={"size": 9})

    def train(who, device):
        return engine.train(run, who, device).precision, device.precision("auto")

    found = on_devices(where.num, train)
    assert len({taken for taken, _ in found}) == 1
    assert found[0][0] in {own for _, own in found}
    assert checkpoints.read_state(run.last_checkpoint)["precision"] == found[0][0]


@pytest.mark.parametrize("changes", [{}, {"precision": "fp16"}, {"optim": {"name": "adamw"}}], ids=str)
def test_nothing_in_a_step_waits_for_the_gpu(make_run, engine, on_devices, where, changes):
    """CUDA itself raises where something does; what is logged every so often may."""
    run = make_run(
        batch={"size": 8}, tracking={"log_every": 1000}, train={"epochs": 4, "clip_grad_norm": 1.0}, **changes
    )

    def prepare(trainer):
        take, taken = trainer._step.run, []

        def watched(step, batches):
            taken.append(step)
            if where.type == "cuda" and len(taken) > 2:  # the first ones make constants, state and communicators
                torch.cuda.set_sync_debug_mode("error")
            try:
                take(step, batches)
            finally:
                if where.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")

        trainer._step.run = watched

        trainer.taken = taken

    def train(who, device):
        kept = []
        engine.train(run, who, device, prepare=lambda trainer: (prepare(trainer), kept.append(trainer)))
        return len(kept[0].taken)

    assert min(on_devices(where.num, train)) > 3


def test_a_run_of_a_cpu_goes_on_here(make_run, engine, on_devices):
    run = make_run(precision="auto", batch={"size": 9}, train={"epochs": 2})
    cpu = Device(type="cpu")
    on_devices(1, lambda who, device: engine.train(run, who, cpu, stop=at_poll(3)).outcome)
    before = checkpoints.read_state(run.last_checkpoint)["step"]

    def go_on(who, device):
        return engine.train(run, who, device).lines, device.channels_last

    ((lines, channels_last),) = on_devices(1, go_on)
    assert lines[0]["step"] == before + 1
    assert lines[-1]["step"] > before + 2
    changed = history.events(run, "numerics_changed")
    assert [event["channels_last"] for event in changed] == ([[False, True]] if channels_last else [])


def test_several_come_to_the_weights_of_one(make_run, engine, on_devices, several):
    size = 36 // several * several
    one, run = make_run("one", batch={"size": size}), make_run("run", batch={"size": size // several})

    def train(of):
        return lambda who, device: engine.train(of, who, device, prepare=exactly)

    (alone,), together = on_devices(1, train(one)), on_devices(several, train(run))
    assert all(engine.identical(found.state, together[0].state) for found in together)
    assert engine.largest_difference(alone.state, together[0].state) < CLOSE
    assert [found.lines[-1]["samples"] for found in (alone, together[0])] == [23, 23]
