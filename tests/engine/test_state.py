"""That a checkpoint holds all that changes in training: found by walking through a trainer, and by resuming from it."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints import host_copies
from launcher.engine.distributed import Ranks
from launcher.engine.schedule import epoch_order
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.errors import UsageError
from launcher.system.files import read_jsonl
from tests.nets import NET

EVERYTHING = {
    "model": NET,
    "data": {"augment": "standard"},
    "optim": {"lr": 0.01, "schedule": "cosine", "warmup_epochs": 0.5},
    "precision": "fp16",
    "train": {
        "epochs": 3,
        "label_smoothing": 0.1,
        "clip_grad_norm": 5.0,
        "early_stopping": {"metric": "val/top1", "mode": "max", "patience": 2},
    },
    "tracking": {"log_every": 3},
}

SAVED = ("state.", "parts.model.module", "parts.optimizer.state", "parts.optimizer.param_groups")
DERIVED = {
    "state._copies": "memory for the next copies",
    "parts.optimizer.found_inf": "set in each step before it is used",
    "parts.optimizer.param_groups.0.lr": "set before each step, from the recipe and the position",
    "state.scaler._init_growth_tracker": "what it was made with",
    "state.numbers._watched": "read before each checkpoint",
    "parts.optimizer._need_device_dtype_check_for_fused": "torch's own, once",
    "parts.train_set.digest": "of what does not change, once it is asked for",
    "parts._between": "loader processes",
    "parts.ddp": "made anew around the model",
    "_step._statistics": "views of the model's buffers",
    "_step._parameters": "the model's",
    "_step.gradient_norm": "told where a window of steps ends",
    "_step._micro_batch._statistics": "views of the model's buffers",
    "_step._micro_batch.progress": "within a forward and backward pass",
    "_step._micro_batch.largest_that_fits": "what becomes state.batch_limits, once all ranks know",
    "_agreement": "what is on its way between the ranks at this moment",
    "_batchnorm._told": "a line is said once an attempt",
    "_noise": "answers of the best epoch, for a line; after a resume the next best one is compared with nothing",
    "_validation._answers": "taken at the end of the epoch",
    "_best_validation": "how many images each class has, counted when it is first needed",
    "_times": "clocks of all ranks, for lines about the slowest",
    "_step.last_gradient": "a clock",
    "_pace": "clocks, for the speed since the last line",
    "_saving": "files, where the last checkpoint is, and the clock",
    "_recorder": "files",
    "_listeners": "what is not told yet",
    "_features": "computed anew by a resumed run, from frozen weights and images",
    "parts.kept": "the same",
    "_feed": "images of the steps to come, which follow from the position",
    "random.": "seeded by position before it is used",
}


def leaves(value, path, seen):
    """Everything below ``value``: pairs of a path and what can be compared."""
    if isinstance(value, torch.Tensor):
        yield path, (value.dtype, tuple(value.shape), value.detach().double().numpy().tobytes())
    elif isinstance(value, np.ndarray):
        yield path, value.tobytes()
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield path, value
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, Mapping):
            # An optimizer's state is by parameter, whose text would be all its numbers.
            keys = (str(place if isinstance(key, torch.Tensor) else key) for place, key in enumerate(value))
            items = zip(keys, value.values(), strict=True)
        elif isinstance(value, list | tuple | set | frozenset | deque):
            items = ((str(number), item) for number, item in enumerate(value))
        elif hasattr(value, "__dict__") and (
            type(value).__module__.startswith("launcher")
            or isinstance(value, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler)
        ):
            items = vars(value).items()
        else:
            yield path, type(value).__name__
            return
        for name, item in items:
            yield from leaves(item, f"{path}.{name}".lstrip("."), seen)


def snapshot(trainer):
    seen = {id(trainer)}
    found = dict(leaves(trainer.parts, "parts", seen))
    for name, value in vars(trainer).items():
        found |= dict(leaves(value, name, seen))
    found["random.torch"] = torch.get_rng_state().numpy().tobytes()
    found["random.numpy"] = repr(np.random.get_state())  # noqa: NPY002  the one that others may use
    found["random.python"] = repr(random.getstate())
    return found


def new_trainer(run, engine, stop):
    parts = build_parts(run, Ranks(), engine.from_scale(256.0))
    trainer = Trainer(parts, recorder=engine.records(run), stop_requested=lambda: stop(trainer))
    return trainer


def is_saved(path):
    return path.startswith(SAVED) and not path.startswith(tuple(DERIVED))


@pytest.mark.slow
def test_a_checkpoint_and_the_position_hold_all_that_training_changes(make_run, engine, one_rank):
    run = make_run(**EVERYTHING, batch={"size": 4, "accumulate": 2})
    seen = []

    def look(trainer):
        assert all(p.grad is None for p in trainer.parts.model.module.parameters())
        seen.append(snapshot(trainer))
        return len(seen) >= 23  # 5 steps, 9 batches of statistics, 6 of validation, 3 steps

    first = new_trainer(run, engine, look)
    assert first.run() == "preempted"
    assert (first.state.step, first.state.epoch) == (8, 1)
    changed = {
        path for before in seen for path in before.keys() | seen[-1].keys() if before.get(path) != seen[-1].get(path)
    }
    unknown = {path for path in changed if not path.startswith((*SAVED, *DERIVED))}
    assert unknown == set()
    for path in (
        "state.step",
        "state.offset",
        "parts.model.module._modules.features",
        "state.window_totals",
        "random.",
    ):
        assert any(name.startswith(path) for name in changed), path
    second = new_trainer(run, engine, lambda _: False)
    assert second._saving.restore()
    second.state.scaler.scale(torch.zeros(1))  # it makes its tensors at first use
    before, after = snapshot(first), snapshot(second)
    different = {p for p in before.keys() | after.keys() if is_saved(p) and before.get(p) != after.get(p)}
    # Whether a module is in training mode follows from the epoch, and is set before the next step.
    assert {path for path in different if not path.endswith(".training")} == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")  # more than there are cores
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 1)])
def test_a_run_stopped_anywhere_ends_with_the_bits_of_one_that_was_not(make_run, engine, in_ranks, world_size, workers):
    changes = {**EVERYTHING, "data": {"augment": "standard", "workers": workers}, "precision": "fp32"}
    # Without loader processes the mean's statistics are computed anew, else they are means too.
    changes["train"] = {**EVERYTHING["train"], "epochs": 2, "swa": 1, "batchnorm_recompute": 0 if workers else 2}
    changes["batch"] = {"size": 5, "accumulate": 3 - world_size}

    def train(run, stop=engine.never):
        return in_ranks(world_size, lambda who: engine.train(run, who, stop=stop))[0]

    undisturbed, run = make_run("whole", **changes), make_run("stopped", **changes)
    whole, lines, outcomes = train(undisturbed), [], []
    chance = random.Random(10 * world_size + workers)  # noqa: S311  where it is stopped
    while not outcomes or outcomes[-1] == "preempted":
        found = train(run, engine.at_poll(chance.randint(3 if workers < 3 else 12, 30)))
        outcomes.append(found.outcome)
        lines += found.lines
    assert len(outcomes) > 1
    assert outcomes[-1] == whole.outcome
    for part in ("state", "optimizer", "best", "step"):
        assert engine.identical(getattr(found, part), getattr(whole, part)), part
    last = {(line["split"], line["step"]): line for line in lines}
    assert list(last.values()) == whole.lines
    assert ["swa_loss" in line for line in whole.lines if line["split"] == "val"] == [False, True]
    means = [checkpoints.load(one.last_checkpoint) for one in (run, undisturbed)]
    assert engine.identical(means[0].average, means[1].average)
    assert means[0].state["averaged"] == means[1].state["averaged"] == whole.step // 2


@pytest.mark.parametrize("arch", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_a_checkpoint_has_the_numbers_of_its_step_however_long_copying_takes(
    make_run, engine, one_rank, monkeypatch, arch
):
    changes = {"model": {"arch": arch}, "batch": {"size": 12}, "train": {"checkpoint": {"every_steps": 2, "keep": 9}}}
    undisturbed, run = make_run("whole", **changes), make_run("slow", **changes)
    expected = engine.train(undisturbed)
    fill = host_copies._fill

    def slow_fill(pairs):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1)
        fill(pairs)

    monkeypatch.setattr(host_copies, "_fill", slow_fill)
    assert engine.identical(engine.train(run).state, expected.state)
    folders = sorted(run.checkpoints.glob("step-*"))
    assert len(folders) > 1
    for folder in folders:
        found, whole = checkpoints.load(folder), checkpoints.load(undisturbed.checkpoint(int(folder.name[5:])))
        assert engine.identical(found.model, whole.model)
        assert engine.identical(found.optimizer, whole.optimizer)


CRAFT = {
    "model": {"arch": "shufflenet_v2_x0_5"},
    "data": {
        "augment": "standard",
        "erase": 0.5,
        "auto_augment": "augmix",
        "mixup": 0.4,
        "cutmix": 1.0,
        "balance": "sampler",
        "workers": 2,
    },
    "optim": {"name": "adamw", "lr": 1e-3, "schedule": "one_cycle", "layer_decay": 0.9, "decay_norms": False},
    "batch": {"size": 5},
    "train": {
        "epochs": 3,
        "phases": [{"epochs": 1, "freeze": ["backbone"], "optim": {"lr": 1e-2}}, {"freeze": ["conv1"]}],
        "ema": 0.9,
        "clip_grad_value": 0.5,
        "early_stopping": {"metric": "val/top1", "mode": "max"},
    },
}


@pytest.mark.slow
def test_the_whole_craft_of_fine_tuning_is_resumed_to_the_same_bits(make_run, engine, in_ranks):
    """Two ranks of two loader processes, stopped in either phase and in the validation of either weights."""

    def train(run, stop=engine.never):
        return in_ranks(2, lambda who: engine.train(run, who, stop=stop))[0]

    undisturbed, run = make_run("whole", **CRAFT), make_run("stopped", **CRAFT)
    lines, outcomes, stops = [], [], []
    whole = train(undisturbed)
    for polls in (3, 15, 16, 10**6):
        found = train(run, engine.at_poll(polls))
        outcomes.append(found.outcome)
        lines += found.lines
        stops.append(checkpoints.load(run.last_checkpoint).state["step"])
    assert outcomes[:3] == ["preempted"] * 3
    assert 0 < stops[0] < 4 < stops[1] < 12  # in the middle of either phase's course
    assert outcomes[-1] == whole.outcome
    for part in ("state", "optimizer", "best", "step"):
        assert engine.identical(getattr(found, part), getattr(whole, part)), part
    last = {(line["split"], line["step"]): line for line in lines}
    assert list(last.values()) == whole.lines
    averages = [checkpoints.load(one.last_checkpoint).average for one in (run, undisturbed)]
    assert engine.identical(*averages)
    assert "ema_top1" in whole.lines[-1]


@pytest.mark.slow
def test_a_lone_image_on_a_rank_is_normalised_alike_in_a_resumed_run(make_run, engine, in_ranks):
    """By running statistics, of which a checkpoint has only rank 0's."""
    changes = {"model": NET, "batch": {"size": 2, "global_size": 6}}  # 2 + 1 on each rank
    undisturbed, run = make_run("whole", **changes), make_run("stopped", **changes)
    whole = in_ranks(2, lambda who: engine.train(undisturbed, who))[0]
    in_ranks(2, lambda who: engine.train(run, who, stop=engine.at_poll(4)))
    found = in_ranks(2, lambda who: engine.train(run, who))[0]
    assert found.step == whole.step
    assert engine.identical(found.state, whole.state)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_at_another_world_size_every_step_has_the_samples_that_it_would_have_had(
    make_run, engine, in_ranks, before, after
):
    changes = {"batch": {"size": 4}, "train": {"epochs": 2}}

    def train(run, world_size, stop=engine.never):
        return in_ranks(world_size, lambda who: engine.train(run, who, stop=stop, prepare=engine.without_dropout))[0]

    whole = train(make_run("whole", **changes), before)
    run = make_run("resumed", **changes)
    first = train(run, before, engine.at_poll(3))
    second = train(run, after)
    assert second.step == whole.step
    lines = [*first.lines, *second.lines]
    steps = [
        [(line["step"], line["offset"], line["samples"]) for line in of if line["split"] == "train"]
        for of in (lines, whole.lines)
    ]
    assert steps[0] == steps[1]
    assert engine.largest_difference(second.state, whole.state) < 1e-5


def test_other_images_than_the_run_began_with_are_refused(make_run, engine, one_rank, tmp_path):
    folder = engine.write_images(tmp_path / "images", train=14, val=7)
    run = make_run(data={"path": str(folder)}, batch={"size": 4})
    engine.train(run, stop=engine.at_poll(2))
    gone = next((folder / "train" / "cow").iterdir())
    gone.rename(tmp_path / gone.name)
    with pytest.raises(UsageError, match=r"are not those that the run began with.*model\.weights=.*step-00000002"):
        engine.train(run)
    (tmp_path / gone.name).rename(gone)
    assert engine.train(run).outcome == "completed"


def test_other_weights_than_the_run_began_with_are_refused(make_run, engine, one_rank, photos):
    file, row = photos.with_suffix(".csv"), "{0},{0.parent.name},{0.parent.parent.name},{1}\n"

    def write(weight, column="weight"):
        rows = [row.format(path, weight if number else 1) for number, path in enumerate(sorted(photos.glob("*/*/*")))]
        file.write_text(f"path,label,split,{column}\n" + "".join(rows))

    write(0.5)
    run = make_run(data={"path": str(file)}, batch={"size": 9})
    engine.train(run, stop=engine.at_poll(2))
    write(0.25)
    with pytest.raises(UsageError, match="or given another weight"):
        engine.train(run)
    write(0.5)
    assert engine.train(run).outcome == "completed"
    write(0.5, "of_no_use")
    older = make_run("older", data={"path": str(file)}, batch={"size": 9})
    engine.train(older, stop=engine.at_poll(2))
    write(0.5)  # as a run looks that an earlier version began
    with pytest.raises(UsageError, match=r"are those that the run began with, but.*weights.*columns={weight: none}"):
        engine.train(older)


def test_images_left_out_from_now_on_change_no_other_sample_place(make_run, engine, one_rank):
    run = make_run(batch={"size": 6})
    engine.train(run, stop=engine.at_poll(3))
    state = checkpoints.read_state(run.last_checkpoint)
    assert (state["step"], state["offset"]) == (3, 18)

    def leave_out(parts):
        parts.schedule = replace(parts.schedule, excluded=frozenset(range(37)) - left)

    order = epoch_order(0, 0, 37).tolist()
    left = frozenset([*order[:18], *order[20:36]])  # three of those to come are bad
    found = engine.train(run, prepare=leave_out)
    lines = [(line["step"], line["offset"], line["samples"]) for line in found.lines if line["split"] == "train"]
    assert lines == [(4, 26, 6), (5, 32, 6), (6, 37, 4)]
    assert found.outcome == "completed"
    assert [event["offset"] for event in read_jsonl(run.events) if event["kind"] == "resumed"] == [18]


def test_an_epoch_whose_last_images_are_left_out_ends_with_its_validation(make_run, engine, one_rank):
    run = make_run(batch={"size": 6}, train={"epochs": 2})
    engine.train(run, stop=engine.at_poll(6))
    assert checkpoints.read_state(run.last_checkpoint)["offset"] == 34
    last = epoch_order(0, 0, 37)[-3:].tolist()

    def leave_out(parts):
        parts.schedule = replace(parts.schedule, excluded=frozenset(last))

    found = engine.train(run, prepare=leave_out)
    assert found.outcome == "completed"
    assert [(line["epoch"], line["step"]) for line in found.lines if line["split"] == "val"] == [(0, 6), (1, 12)]
    trained = [line for line in found.lines if line["split"] == "train"]
    assert sum(line["samples"] for line in trained) == 34
    assert {line["epoch"] for line in trained} == {1}


def test_a_resume_has_last_and_best_lead_where_the_killed_attempt_did_not_come_to(make_run, engine, one_rank):
    run = make_run(batch={"size": 18}, train={"epochs": 2, "checkpoint": {"keep": 9}})
    whole = engine.train(run)
    expected = [run.checkpoint(step) for step in (whole.step, whole.best["step"])]
    for link in (run.last_checkpoint, run.best_checkpoint):
        link.unlink()
        link.symlink_to(checkpoints.write(run, replace(checkpoints.load(expected[0]), step=1)).name)
    engine.train(run)
    assert [link.resolve() for link in (run.last_checkpoint, run.best_checkpoint)] == expected
