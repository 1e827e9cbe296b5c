"""Every sample once: in training, across a stop and a resume, and in validation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from launcher.engine.data import read_image
from launcher.engine.device import Device
from launcher.engine.distributed import Ranks
from launcher.engine.setup import build_parts
from launcher.engine.trainer import Trainer
from tests.engine.trained import MEAN, STD, sound_weights


class Watched(torch.utils.data.Dataset):
    def __init__(self, dataset, seen):
        self.dataset, self.classes, self.digest, self.seen = dataset, dataset.classes, dataset.digest, seen
        self.labels = dataset.labels

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        self.seen.append(position)
        return self.dataset[position]


def watching(engine, run, **options):
    """A function of Ranks that trains and also says which (epoch, index) its rank has loaded."""

    def work(ranks):
        seen = []

        def prepare(parts):
            engine.without_dropout(parts)
            parts.train_set = Watched(parts.train_set, seen)

        result = engine.train(run, ranks, prepare=prepare, **options)
        result.seen = seen
        return result

    return work


EVERY_SAMPLE_ONCE = {(epoch, i): 1 for epoch in range(2) for i in range(37)}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size", "accumulate"), [(1, 4, 1), (2, 3, 2), (3, 5, 1)])
def test_an_epoch_trains_on_every_image_once(make_run, engine, in_ranks, world_size, size, accumulate):
    run = make_run(batch={"size": size, "accumulate": accumulate}, train={"epochs": 2})
    ranks = in_ranks(world_size, watching(engine, run))
    assert Counter(position for rank in ranks for position in rank.seen) == EVERY_SAMPLE_ONCE


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "poll"), [(2, 3, 2), (3, 1, 4), (1, 2, 9)])
def test_also_across_a_stop_and_a_resume_at_another_world_size(make_run, engine, in_ranks, before, after, poll):
    run = make_run(batch={"size": 5}, train={"epochs": 2})
    first = in_ranks(before, watching(engine, run, stop=engine.at_poll(poll)))
    assert first[0].outcome == "preempted"
    second = in_ranks(after, watching(engine, run))
    assert second[0].outcome == "completed"
    assert Counter(position for rank in first + second for position in rank.seen) == EVERY_SAMPLE_ONCE
    epochs = Counter()
    for line in [*first[0].lines, *second[0].lines]:
        epochs[line["split"], line["epoch"]] += line["samples"]
    assert epochs == {("train", 0): 37, ("train", 1): 37, ("val", 0): 23, ("val", 1): 23}


# Validation


def validating(engine, run):
    def work(ranks):
        parts = build_parts(run, ranks, engine.cpu)
        parts.model.freeze(0)
        parts.wrap()  # hands rank 0's weights on
        parts.model.train()
        trainer = Trainer(parts, recorder=None, stop_requested=engine.never)
        values = trainer._validate()
        trainer._agreement.collect()
        return values

    return work


@dataclass(frozen=True, kw_only=True)
class HoldsSome(Device):
    """A CPU on which several batches go through the model at once in validation."""

    @property
    def batches_in_validation(self):
        return 3


def test_larger_batches_in_validation_and_halves_where_memory_runs_out_change_no_count(
    make_run, engine, one_rank, monkeypatch
):
    run, sizes, found = make_run(batch={"size": 4}), [], []
    for device, most in ((engine.cpu, 4), (HoldsSome(type="cpu"), 12), (HoldsSome(type="cpu"), 5)):
        parts = build_parts(run, Ranks(), device)
        parts.model.freeze(0)
        parts.wrap()
        forward = parts.model.module.forward

        def limited(images, forward=forward, most=most):
            if len(images) > most:
                raise torch.OutOfMemoryError("no memory")
            sizes.append(len(images))
            return forward(images)

        monkeypatch.setattr(parts.model.module, "forward", limited)
        trainer = Trainer(parts, recorder=None, stop_requested=engine.never)
        found.append(trainer._validate())
        trainer._agreement.collect()
    assert sizes == [4, 4, 4, 4, 4, 3, 12, 11, 3, 3, 3, 3, 3, 3, 3, 2]
    for one in found:
        drop_confidences(one)
    loss = found[0].pop("loss")
    assert [one.pop("loss") for one in found[1:]] == pytest.approx([loss, loss], rel=1e-6)
    assert found[0] == found[1] == found[2]


def drop_confidences(found):
    """Of the images that are shown: they are rounded by the size of a batch, as losses are."""
    for row in found["examples"]:
        assert 0 < row.pop("confidence") <= 1


def counted_by_hand(module, folder):
    confusion, top5 = torch.zeros(7, 7, dtype=torch.int64), 0
    for label, name in enumerate(sorted(child.name for child in (folder / "val").iterdir())):
        for file in (folder / "val" / name).iterdir():
            with torch.no_grad():
                ranked = module((read_image(str(file)) / 255 - MEAN)[None] / STD)[0].argsort(descending=True)
            confusion[label, ranked[0]] += 1
            top5 += label in ranked[:5].tolist()
    return confusion, top5


@pytest.mark.slow
def test_validation_counts_are_the_same_for_any_world_size_and_batch_size(make_run, engine, in_ranks, photos, tmp_path):
    weights = tmp_path / "weights.safetensors"
    confusion, top5 = counted_by_hand(sound_weights(photos, weights), photos)
    assert len(confusion.sum(0).nonzero()) > 2  # more than two classes are predicted, some of them rightly
    assert 0 < confusion.trace() < top5 < 23
    for number, (world_size, size) in enumerate([(1, 23), (1, 4), (2, 5), (3, 2), (3, 32)]):
        model = {"arch": "shufflenet_v2_x0_5", "weights": str(weights)}
        run = make_run(f"run-{number}", model=model, batch={"size": size})
        for found in in_ranks(world_size, validating(engine, run)):
            drop_confidences(found)
            assert found["confusion"] == confusion.tolist()
            assert found["samples"] == 23
            assert found["top1"] == confusion.trace().item() / 23
            assert found["top5"] == pytest.approx(top5 / 23, abs=1e-7)
            if number == 0:
                first = found
            rounded = ("loss", "ece")  # sums of what a network gives, which is rounded by the size of its batch
            assert all(found[name] == pytest.approx(first[name], rel=1e-5) for name in rounded)
            assert {k: v for k, v in found.items() if k not in rounded} == {
                k: v for k, v in first.items() if k not in rounded
            }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_rank_without_validation_images_takes_part(make_run, engine, in_ranks, tmp_path):
    folder = engine.write_images(tmp_path / "two", train=6, val=2, classes=["a", "b"])
    run = make_run(data={"path": str(folder)})
    for found in in_ranks(3, validating(engine, run)):
        assert found["samples"] == 2
        assert sum(map(sum, found["confusion"])) == 2
