"""Steps whose loss or gradient is NaN or infinite: found on all ranks at the same step, never let into the weights."""

from __future__ import annotations

import pytest
import torch

from launcher.engine import non_finite
from launcher.engine.distributed import Ranks
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from launcher.errors import TrainingError
from launcher.system.files import read_jsonl
from tests.nets import NET

MODEL = NET  # with BatchNorm, whose statistics a bad batch would spoil


def events(run, kind):
    return [event for event in read_jsonl(run.events) if event["kind"] == kind]


def spoiling(steps, rank=0, how="loss"):
    """Make what a rank computes in some steps NaN or infinite: its outputs, its inputs, or one gradient."""

    def prepare(parts):
        module, calls = parts.model.module, iter(range(10**6))

        def spoilt(value, by):
            training = (module.training and torch.is_grad_enabled()) or how == "gradient"
            return value * float(by) if training and next(calls) in steps else value

        if parts.ranks.rank != rank:
            return
        if how == "loss":
            module.register_forward_hook(lambda _, __, outputs: spoilt(outputs, "nan"))
        elif how == "input":
            module.register_forward_pre_hook(lambda _, inputs: (spoilt(inputs[0], "inf"),))
        else:
            next(module.parameters()).register_hook(lambda gradient: spoilt(gradient, "inf"))

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loss", "input", "gradient"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_ends_all_ranks_with_the_step_and_its_images(make_run, engine, in_ranks, world_size, how, capfd):
    run = make_run(model=MODEL, batch={"size": 6 // world_size}, train={"on_nan": "stop"})

    def work(ranks):
        try:
            engine.train(run, ranks, prepare=spoiling({2}, rank=world_size - 1, how=how))
        except TrainingError as error:
            return str(error)

    for message in in_ranks(world_size, work):
        assert "NaN or infinite in step 3" in message
        assert "train.on_nan=skip" in message
    (event,) = events(run, "non_finite")
    assert (event["step"], event["policy"]) == (3, "stop")
    printed = capfd.readouterr().out
    assert printed.count("step 3: loss or gradient is NaN or infinite") == (world_size if how == "gradient" else 1)
    # A loss that is not finite tells whose images they are; a gradient does not, after the ranks have averaged it.
    assert printed.count(".png") == (6 if how == "gradient" else 6 // world_size)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("how", ["input", "gradient"])
def test_a_skipped_step_leaves_no_trace_in_weights_statistics_and_optimizer(make_run, engine, one_rank, how, optimizer):
    run = make_run(model=MODEL, batch={"size": 6}, train={"on_nan": "skip"}, optim={"name": optimizer, "lr": 1e-3})
    parts, states = build_parts(run, Ranks(), engine.cpu), []
    spoiling({2}, how=how)(parts)

    def look():
        optimizer = parts.optimizer.state_dict()["state"]
        values = {f"{i} {name}": value for i, state in optimizer.items() for name, value in state.items()}
        states.append({name: value.clone() for name, value in (values | parts.model.module.state_dict()).items()})
        return False

    records = engine.records(run)
    trainer = Trainer(parts, recorder=records, stop_requested=look)
    assert trainer.run() == "completed"
    assert engine.identical(states[2], states[3])  # before and after the third step
    assert not engine.identical(states[1], states[2])
    assert not engine.identical(states[3], states[4])
    assert all(value.isfinite().all() for value in states[-1].values())
    assert [event["step"] for event in events(run, "non_finite")] == [3]
    assert [line["step"] for line in records.lines if line["split"] == "train"] == (
        [1, 2, 4, 5, 6, 7] if how == "input" else [1, 2, 3, 4, 5, 6, 7]
    )
    assert trainer.state.step == 7


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_rollback_goes_back_to_the_checkpoint_and_does_without_the_step(make_run, engine, in_ranks, world_size):
    changes = {"model": MODEL, "batch": {"size": 6 // world_size}, "optim": {"lr": 1e-3}}
    kept = {"every_steps": 2, "every_minutes": None, "keep": 9}
    run = make_run("rolled", **changes, train={"on_nan": "rollback", "checkpoint": kept})
    ranks = in_ranks(world_size, lambda who: engine.train(run, who, prepare=spoiling({3}, rank=world_size - 1)))
    # What it comes to is what one that leaves the same step out comes to, without ever going back.
    skipping = make_run("skipped", **changes, train={"on_nan": "skip"})
    expected = in_ranks(world_size, lambda who: engine.train(skipping, who, prepare=spoiling({3}, rank=world_size - 1)))
    assert {rank.outcome for rank in ranks} == {"completed"}
    assert engine.identical(ranks[0].state, expected[0].state)
    (event,) = events(run, "rolled_back")
    assert event["skipped"] == 4
    assert event["step"] <= 4
    assert [event["step"] for event in events(run, "non_finite")] == [4]


@pytest.mark.slow
def test_three_rollbacks_and_no_more_also_without_a_checkpoint_of_its_own(make_run, engine, one_rank):
    run = make_run(model=MODEL, batch={"size": 6}, train={"on_nan": "rollback"})
    with pytest.raises(TrainingError, match="went back 3 times already"):
        engine.train(run, prepare=spoiling(range(100)))
    rolled = events(run, "rolled_back")
    assert [event["step"] for event in rolled] == [0, 0, 0]  # what is saved before the first step
    assert [event["skipped"] for event in rolled] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_that_only_skips_is_ended(make_run, engine, one_rank):
    run = make_run(batch={"size": 3}, train={"on_nan": "skip"})
    with pytest.raises(TrainingError, match="10 steps in a row up to 10"):
        engine.train(run, prepare=spoiling(range(100)))


@pytest.mark.slow
def test_an_overflow_under_loss_scaling_is_no_event_but_a_loss_that_is_no_number_is(make_run, engine, in_ranks):
    changes = {"precision": "fp16", "batch": {"size": 3}, "train": {"on_nan": "skip"}}

    def train(run, scale, steps):
        def prepare(parts):
            parts.device = engine.from_scale(scale)
            spoiling(steps, rank=1)(parts)

        return in_ranks(2, lambda who: engine.train(run, who, prepare=prepare))[0]

    run = make_run("overflow", **changes)
    assert train(run, 2.0**60, ()).outcome == "completed"
    assert events(run, "non_finite") == []
    run = make_run("spoiled", **changes)
    assert train(run, 256.0, {2}).outcome == "completed"
    assert [event["step"] for event in events(run, "non_finite")] == [3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "message"),
    [("stop", "NaN or infinite in step 5"), ("skip", "10 steps in a row up to 14"), ("rollback", "went back 3 times")],
)
def test_gradients_that_overflow_without_end_are_no_matter_of_the_scale(
    make_run, engine, one_rank, monkeypatch, policy, message
):
    monkeypatch.setattr(non_finite, "MAX_OVERFLOWS", 5)
    run = make_run(precision="fp16", batch={"size": 2}, train={"on_nan": policy})
    with pytest.raises(TrainingError, match=message):
        engine.train(run, prepare=spoiling(range(100), how="gradient"))
    assert events(run, "non_finite")[0]["step"] == 5


@pytest.mark.slow
def test_overflows_in_a_row_are_counted_over_a_resume(make_run, engine, one_rank, monkeypatch):
    monkeypatch.setattr(non_finite, "MAX_OVERFLOWS", 5)
    run = make_run(precision="fp16", batch={"size": 2})
    spoilt = spoiling(range(100), how="gradient")
    assert engine.train(run, prepare=spoilt, stop=engine.at_poll(3)).outcome == "preempted"
    with pytest.raises(TrainingError, match=r"NaN or infinite in step 5"):
        engine.train(run, prepare=spoilt)
