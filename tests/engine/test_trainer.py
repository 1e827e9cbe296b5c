from __future__ import annotations

import io
import json
import os
import signal
from itertools import pairwise

import pytest
import torch
from torch import nn

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.distributed import Ranks
from launcher.engine.listeners.recorder import Recorder
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.errors import TrainingError
from launcher.system import processes
from tests.engine.trained import moved, sound_weights
from tests.nets import MATRICES, NET, ONE_PIXEL


def events(run, kind):
    return [event for line in run.events.read_text().splitlines() if (event := json.loads(line))["kind"] == kind]


@pytest.fixture
def on_the_disk_at_once(monkeypatch):
    """Training waits for each checkpoint, so that none gives way to the next one."""
    save = checkpoints.CheckpointWriter.save

    def save_and_wait(self, checkpoint, *, best):
        save(self, checkpoint, best=best)
        self.wait()

    monkeypatch.setattr(checkpoints.CheckpointWriter, "save", save_and_wait)


def saved_steps(run):
    return sorted(int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*"))


# Batches of one image


@pytest.mark.parametrize("arch", ["shufflenet_v2_x0_5", "mobilenet_v2"])
def test_one_image_more_than_the_steps_hold_does_not_explode_in_batch_norm(
    make_run, engine, one_rank, photos, tmp_path, arch
):
    """At 32 px the last layers see one pixel, and its variance over one image, or over two copies of it, is nothing."""
    weights = tmp_path / "weights.safetensors"
    sound_weights(photos, weights, arch)
    largest = {}
    for size in (12, 37):  # 12, 12, 12 and 1 over; or one step of all images
        model = {"arch": arch, "weights": str(weights)}
        run = make_run(f"run-{size}", model=model, batch={"size": size}, optim={"lr": 1e-3})
        found = engine.train(run)
        largest[size] = max((found.state[name] - found.initial[name]).abs().max() for name in parameters(found.state))
    assert largest[12] < 100 * largest[37]


@pytest.mark.slow
def test_one_image_more_than_the_steps_hold_does_not_make_training_diverge(make_run, engine, one_rank, tmp_path):
    folder = engine.write_images(tmp_path / "images", train=41, val=14, classes=["bee", "cat"])
    for seed in range(3):
        changes = {"model": ONE_PIXEL, "optim": {"lr": 0.5}, "data": {"path": str(folder)}}
        run = make_run(f"run-{seed}", **changes, seed=seed, batch={"size": 8}, train={"epochs": 2})
        found = engine.train(run)  # one that diverges ends with a TrainingError
        assert found.outcome == "completed"
        assert max(line["loss"] for line in found.lines) < 100, seed  # thousands after a step of a lone image


# What learns


FREEZING = {"arch": "shufflenet_v2_x0_5", "freeze": ["conv1", "stage2"]}
SLOW = {"lr": 1e-4, "weight_decay": 0.1}


def parameters(state):
    return state.keys() - statistics(state).keys()


def statistics(state):
    return {
        name: v for name, v in state.items() if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_frozen_does_not_move_and_neither_do_its_batch_norm_statistics(make_run, engine, in_ranks, world_size):
    run = make_run(model=FREEZING, batch={"size": 8 // world_size}, optim=SLOW, train={"epochs": 2})
    found = in_ranks(world_size, lambda who: engine.train(run, who))[0]
    for layer in ("conv1.", "stage2."):
        assert len([name for name in statistics(found.state) if name.startswith(layer)]) >= 3
        assert moved(found.initial, found.state, layer) == set()
    for layer in ("stage3.", "stage4.", "conv5.", "fc."):
        assert moved(found.initial, found.state, layer) == {name for name in found.state if name.startswith(layer)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_unfrozen_begins_to_learn_in_its_epoch_with_its_statistics(make_run, engine, in_ranks, world_size):
    model = {**FREEZING, "unfreeze": {1: "stage2", 2: ["conv1"]}}
    train = {"epochs": 3, "checkpoint": {"keep": 5}}
    run = make_run(model=model, batch={"size": 8 // world_size}, optim=SLOW, train=train)
    found = in_ranks(world_size, lambda who: engine.train(run, who))[0]
    states = [found.initial, *(checkpoints.load(run.checkpoint(step)).model for step in (5, 10, 15))]
    for epoch, (before, after) in enumerate(pairwise(states)):
        for layer, start in (("conv1.", 2), ("stage2.", 1), ("stage3.", 0)):
            expected = {name for name in after if name.startswith(layer)} if epoch >= start else set()
            assert moved(before, after, layer) == expected, (epoch, layer)


def test_layers_learn_at_the_rates_of_their_groups(make_run, engine, one_rank):
    def change(name, **optim):
        run = make_run(name, batch={"size": 37}, optim={"momentum": 0.0, "weight_decay": 0.0, **optim})
        found = engine.train(run, prepare=engine.without_dropout)
        return {key: found.state[key] - found.initial[key] for key in found.state}

    same = change("same", lr=0.01)
    grouped = change("grouped", lr=0.01, groups={"head": 0.1, "features.12": 0.02, "features": 0.0})
    for name in same:
        times = 10 if name.startswith("classifier") else 2 if name.startswith("features.12.") else 0
        torch.testing.assert_close(grouped[name], times * same[name], rtol=1e-3, atol=1e-7)
        assert same[name].abs().max() > 0


# Bits


LEARNING = {
    "model": NET,
    "data": {"augment": "standard"},
    "optim": {"lr": 0.01, "schedule": "cosine", "warmup_epochs": 0.5},
    "train": {"epochs": 2, "early_stopping": {"metric": "val/top1", "mode": "max", "patience": 5}},
}


def merged(*line_lists):
    """The last line of each (split, step), as a reader takes them."""
    return list({(line["split"], line["step"]): line for lines in line_lists for line in lines}.values())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stopped_at_any_poll_and_resumed_one_rank_ends_with_the_very_same_bits(make_run, engine, one_rank, optimizer):
    changes = {**LEARNING, "optim": {**LEARNING["optim"], "name": optimizer}, "batch": {"size": 4, "accumulate": 2}}
    whole = engine.train(make_run("whole", **changes))
    assert whole.outcome == "completed"
    steps = set()
    for poll in range(1, 22, 3 if optimizer == "sgd" else 5):  # in training and in validation, of both epochs
        run = make_run(f"stopped-{poll}", **changes)
        first = engine.train(run, stop=engine.at_poll(poll))
        assert first.outcome == "preempted"
        assert saved_steps(run)[-1] == first.step
        second = engine.train(run)
        assert (second.outcome, second.step) == ("completed", whole.step)
        assert engine.identical(second.state, whole.state), poll
        assert engine.identical(second.optimizer, whole.optimizer), poll
        assert second.best == whole.best
        assert merged(first.lines, second.lines) == whole.lines
        (event,) = events(run, "resumed")
        assert event["step"] == first.step
        steps.add(first.step)
    assert len(steps) > 2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["nadam", "radam", "rmsprop", "adafactor", "muon"])
def test_every_optimizer_is_resumed_in_the_middle_of_a_cycle(make_run, engine, one_rank, optimizer):
    optim = {"name": optimizer, "lr": 1e-4, "schedule": "one_cycle", "layer_decay": 0.9, "decay_norms": False}
    changes = {"optim": optim, "train": {"epochs": 2}} | ({"model": MATRICES} if optimizer == "muon" else {})
    whole, run = engine.train(make_run("whole", **changes)), make_run("stopped", **changes)
    assert engine.train(run, stop=engine.at_poll(3)).step in (2, 3)
    found = engine.train(run)
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)
    assert len({name for line in found.lines for name in line if name.startswith("lr/")}) > 5
    assert all(line["grad_norm"] > 0 for line in whole.lines if line["split"] == "train")


@pytest.mark.slow
def test_three_stopped_and_resumed_ranks_end_with_the_very_same_bits(make_run, engine, in_ranks):
    world_size, changes = 3, {**LEARNING, "batch": {"size": 4}}
    undisturbed = make_run("whole", **changes)
    whole = in_ranks(world_size, lambda who: engine.train(undisturbed, who))
    for poll in (2, 8):
        run = make_run(f"stopped-{poll}", **changes)
        first = in_ranks(world_size, lambda who, run=run, poll=poll: engine.train(run, who, stop=engine.at_poll(poll)))
        assert {rank.outcome for rank in first} == {"preempted"}
        assert len({rank.step for rank in first}) == 1
        second = in_ranks(world_size, lambda who, run=run: engine.train(run, who))
        for rank in range(world_size):
            found, expected = second[rank].state, whole[rank].state
            assert all(torch.equal(found[name], expected[name]) for name in parameters(found)), poll
        assert engine.identical(second[0].state, whole[0].state)
        assert engine.identical(second[0].optimizer, whole[0].optimizer)
        assert second[0].best == whole[0].best


def test_a_model_that_asks_for_the_version_of_its_state_is_resumed_too(make_run, engine, one_rank):
    changes = {"model": {"arch": "mnasnet0_5"}, "batch": {"size": 12}, "optim": {"lr": 1e-4}}
    whole = engine.train(make_run("whole", **changes))
    run = make_run("stopped", **changes)
    assert engine.train(run, stop=engine.at_poll(1)).outcome == "preempted"
    assert engine.identical(engine.train(run).state, whole.state)


@pytest.mark.slow
def test_the_wish_of_one_rank_stops_all(make_run, engine, in_ranks):
    run = make_run(batch={"size": 4})
    ranks = in_ranks(3, lambda who: engine.train(run, who, stop=engine.at_poll(2) if who.rank == 2 else engine.never))
    assert [(rank.outcome, rank.step) for rank in ranks] == [("preempted", 2)] * 3
    assert saved_steps(run) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("polls", [3, 6])
def test_killed_and_resumed_ranks_end_with_the_very_same_bits(make_run, engine, in_ranks, polls, on_the_disk_at_once):
    changes = {**LEARNING, "batch": {"size": 4}}
    changes["train"] = {**changes["train"], "checkpoint": {"every_steps": 1, "every_minutes": None}}
    undisturbed = make_run("whole", **changes)
    whole = in_ranks(2, lambda who: engine.train(undisturbed, who))[0]
    run = make_run("killed", **changes)
    asked = engine.at_poll(polls)

    def die():
        if asked():
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    codes = in_ranks(2, lambda who: engine.train(run, who, stop=die if who.rank == 1 else engine.never), failing=True)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert saved_steps(run)
    found = in_ranks(2, lambda who: engine.train(run, who))[0]
    assert events(run, "resumed")[0]["step"] >= 1
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(make_run, engine, one_rank, on_the_disk_at_once):
    changes = {**LEARNING, "batch": {"size": 8}}
    changes["train"] = {**changes["train"], "checkpoint": {"every_steps": 1, "every_minutes": None, "keep": 3}}
    whole = engine.train(make_run("whole", **changes))
    run = make_run("damaged", **changes)
    first = engine.train(run, stop=engine.at_poll(4))
    newest = run.checkpoint(first.step) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    found = engine.train(run)
    assert [event["path"] for event in events(run, "checkpoint_rejected")] == [str(newest.parent)]
    assert events(run, "resumed")[0]["step"] == first.step - 1
    assert engine.identical(found.state, whole.state)
    assert engine.identical(found.optimizer, whole.optimizer)


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(make_run, engine, one_rank):
    run = make_run(batch={"size": 37}, train={"epochs": 2})
    whole = engine.train(run)
    again = engine.train(run)
    assert (again.outcome, again.step, again.lines) == ("completed", 2, [])
    assert engine.identical(again.state, whole.state)


@pytest.mark.slow
def test_the_number_of_loader_processes_changes_nothing(make_run, engine, one_rank):
    found = []
    for workers in (0, 1, 2):
        changes = {
            **LEARNING,
            "data": {"augment": "standard", "workers": workers},
            "batch": {"size": 6, "accumulate": 2},
        }
        found.append(engine.train(make_run(f"run-{workers}", **changes)))
    assert engine.identical(found[1].state, found[2].state)
    assert engine.identical(
        found[0].state, found[1].state
    )  # dropout has to be the same in a process that loads and trains


def test_two_ranks_and_two_steps_drop_other_units(make_run, engine, in_ranks):
    """The model's randomness is a function of (seed, step, rank)."""
    run = make_run(batch={"size": 4}, data={"workers": 1})

    def work(ranks):
        masks = []

        def prepare(parts):
            layer = next(m for m in parts.model.module.modules() if isinstance(m, nn.Dropout))
            layer.register_forward_hook(
                lambda _, __, out: masks.append(torch.dropout(torch.ones(500), 0.5, train=True))
            )
            return layer

        engine.train(run, ranks, prepare=prepare)
        return masks

    masks = [mask for rank in in_ranks(2, work) for mask in rank[:5]]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 10


def test_a_stop_leaves_no_loader_process(make_run, engine, one_rank):
    before = set(processes.children(os.getpid()))
    run = make_run(data={"workers": 2}, batch={"size": 4}, train={"epochs": 3})
    assert engine.train(run, stop=engine.at_poll(3)).outcome == "preempted"
    assert set(processes.children(os.getpid())) <= before


# When it stops and what it saves


@pytest.mark.parametrize(
    ("stopping", "epochs_done"),
    [
        ({"metric": "val/loss", "mode": "min", "patience": 2}, 3),
        ({"metric": "val/top1", "mode": "max", "patience": 1}, 2),
        ({"metric": "train/loss", "mode": "min", "patience": 3}, 4),
        ({"metric": "val/loss", "mode": "min", "patience": None}, 6),
    ],
)
def test_training_stops_after_as_many_epochs_without_a_better_value(make_run, engine, one_rank, stopping, epochs_done):
    stopping = {**stopping, "min_delta": 0.01}
    run = make_run(batch={"size": 37}, optim={"lr": 1e-12}, train={"epochs": 6, "early_stopping": stopping})
    found = engine.train(run, prepare=engine.without_dropout)
    early = epochs_done < 6
    assert found.outcome == ("early_stopped" if early else "completed")
    assert found.step == epochs_done
    assert (found.best["metric"], found.best["epoch"], found.best["step"]) == (stopping["metric"], 0, 1)
    assert [line["best"] for line in found.lines if line["split"] == "val"] == [True] + [False] * (epochs_done - 1)
    assert run.best_checkpoint.resolve() == run.checkpoint(1)
    assert run.last_checkpoint.resolve() == run.checkpoint(epochs_done)
    if early:
        (event,) = events(run, "early_stopped")
        assert event["step"] == epochs_done
        again = engine.train(run, prepare=engine.without_dropout)
        assert (again.outcome, again.step, again.lines) == ("early_stopped", epochs_done, [])


def test_a_patience_is_counted_across_a_resume(make_run, engine, one_rank):
    stopping = {"patience": 3, "min_delta": 0.01}
    run = make_run(batch={"size": 18}, optim={"lr": 1e-12}, train={"epochs": 9, "early_stopping": stopping})
    assert engine.train(run, stop=engine.at_poll(12)).outcome == "preempted"
    found = engine.train(run)
    assert (found.outcome, found.step) == ("early_stopped", 4 * 3)


def test_checkpoints_are_written_at_the_recipes_steps_and_after_each_epoch(
    make_run, engine, one_rank, on_the_disk_at_once
):
    kept = {"every_steps": 2, "every_minutes": None, "keep": 20}
    run = make_run(batch={"size": 8}, train={"epochs": 2, "checkpoint": kept})
    engine.train(run)
    assert saved_steps(run) == [2, 4, 5, 6, 8, 10]
    written = events(run, "checkpoint")
    assert [event["step"] for event in written] == [
        2,
        4,
        5,
        6,
        8,
        10,
        10,
    ]  # the last is a second step and an epoch's end
    for step, position in ((4, (0, 32)), (5, (1, 0)), (6, (1, 8)), (10, (2, 0))):
        state = checkpoints.read_state(run.checkpoint(step))
        assert (state["epoch"], state["offset"], state["step"]) == (*position, step)


@pytest.mark.slow
def test_checkpoints_by_the_clock_are_agreed_upon(make_run, engine, in_ranks, on_the_disk_at_once):
    run = make_run(batch={"size": 4}, train={"checkpoint": {"every_minutes": 1e-9, "keep": 20}})
    ranks = in_ranks(2, lambda who: engine.train(run, who))
    assert {rank.outcome for rank in ranks} == {"completed"}
    assert saved_steps(run) == [1, 2, 3, 4, 5]


def test_debugging_is_a_handful_of_steps_in_this_process(make_run, engine, one_rank):
    run = make_run(data={"workers": 2}, batch={"size": 2}, train={"epochs": 3})
    parts = build_parts(run, Ranks(), engine.cpu, debug=True)
    before, children = set(processes.children(os.getpid())), set()

    def look():
        children.update(processes.children(os.getpid()))
        return False

    trainer = Trainer(parts, recorder=engine.records(run), stop_requested=look)
    assert trainer.run() == "completed"
    assert trainer.state.step == parts.num_steps == 5
    assert children <= before


# Precision


def dtypes_of_convolutions(parts):
    """The set of types that convolutions give, filled while it trains."""
    seen = set()
    for module in parts.model.module.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_half_precision_trains_like_single(make_run, engine, one_rank, precision, dtype, clip):
    changes = {"batch": {"size": 6, "accumulate": 2}, "optim": {"lr": 0.005}, "train": {"clip_grad_norm": clip}}
    single = engine.train(make_run("single", **changes), prepare=engine.without_dropout)
    run, seen = make_run("half", precision=precision, **changes), []

    def prepare(parts):
        engine.without_dropout(parts)
        parts.device = engine.from_scale(256.0)
        seen.append(dtypes_of_convolutions(parts))

    half = engine.train(run, prepare=prepare)
    assert seen == [{dtype}]  # in training and in validation
    assert {tensor.dtype for tensor in half.state.values()} == {torch.float32}
    step = {name: single.state[name] - single.initial[name] for name in single.state}
    error = {name: half.state[name] - single.state[name] for name in single.state}
    length = {
        kind: sum(v.square().sum() for v in values.values()).sqrt() for kind, values in (("s", step), ("e", error))
    }
    assert 0 < length["e"] < 0.2 * length["s"]
    scaler = checkpoints.load(run.last_checkpoint).optimizer["scaler"]
    assert (scaler["scale"] == 256) if precision == "fp16" else (scaler == {})


def test_a_step_that_overflows_in_fp16_is_left_out_and_the_scale_halved(make_run, engine, one_rank):
    run = make_run(batch={"size": 37}, precision="fp16", train={"clip_grad_norm": 1.0})
    parts = build_parts(run, Ranks(), engine.cpu)
    before = {k: v.clone() for k, v in parts.model.module.state_dict().items()}
    parts.device = engine.from_scale(2.0**60)
    trainer = Trainer(parts, recorder=engine.records(run), stop_requested=engine.never)
    assert trainer.run() == "completed"
    assert engine.identical(parts.model.module.state_dict(), before)
    assert trainer.state.scaler.get_scale() == 2.0**59


@pytest.mark.slow
def test_the_scale_is_resumed_too(make_run, engine, one_rank):
    changes = {"batch": {"size": 8}, "precision": "fp16", "optim": {"lr": 0.005}}

    def at_scale(scale):
        return lambda parts: setattr(parts, "device", engine.from_scale(scale))

    def scaler(run):
        state = checkpoints.load(run.last_checkpoint).optimizer["scaler"]
        return state["scale"], state["_growth_tracker"]

    whole = engine.train(make_run("whole", **changes), prepare=at_scale(256.0))
    run = make_run("stopped", **changes)
    engine.train(run, stop=engine.at_poll(2), prepare=at_scale(256.0))
    assert scaler(run) == (256, 2)
    assert engine.identical(engine.train(run, prepare=at_scale(1024.0)).state, whole.state)
    assert scaler(run) == (256, 5)


# What it records


def recorded(make_run, engine, **changes):
    run = make_run(batch={"size": 4}, **changes)
    parts, console = build_parts(run, Ranks(), engine.cpu), io.StringIO()
    recorder = Recorder(run, parts.recipe, attempt=1, console=console, num_steps=parts.num_steps)
    try:
        trainer = Trainer(parts, recorder=recorder, stop_requested=engine.never)
        trainer.run()
    finally:
        recorder.close()
    return run, console.getvalue()


def test_windows_of_steps_are_recorded_with_what_lies_in_them(make_run, engine, one_rank):
    run, console = recorded(make_run, engine, tracking={"log_every": 4}, train={"epochs": 2})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    found = [(line["split"], line["step"], line["epoch"], line["samples"]) for line in lines]
    assert found == [
        ("train", 4, 0, 16),
        ("train", 8, 0, 16),
        ("val", 10, 0, 23),
        ("train", 12, 1, 4 + 1 + 8),
        ("train", 16, 1, 16),
        ("train", 20, 1, 13),
        ("val", 20, 1, 23),
    ]
    for line in lines:
        assert {"time", "attempt", "loss", "top1", "top5"} < line.keys()
        assert 0 <= line["top1"] <= line["top5"] <= 1
        extra = (
            {"lr", "grad_norm", "images_per_s", "data_wait", "memory_mb"}
            if line["split"] == "train"
            else {"f1", "per_class", "confusion"}
        )
        assert extra < line.keys()
    status = run.read_status()
    assert (status["state"], status["epoch"], status["step"]) == ("completed", 2, 20)
    assert status["best"]["step"] in (10, 20)
    assert "epoch 2/2  step 20/20" in console


@pytest.mark.filterwarnings("ignore:Encountered")
def test_training_that_diverges_ends_with_an_error_that_says_so(make_run, engine, one_rank):
    with pytest.raises(TrainingError, match=r"loss|finite|NaN|nan"):
        recorded(make_run, engine, optim={"lr": 1e20})
