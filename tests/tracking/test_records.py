"""The reader: what of a growing run directory counts, and in what order."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launcher.recipe import load as recipes
from launcher.system.files import write_json_atomic
from launcher.tracking import loads
from launcher.tracking.follow import follow
from launcher.tracking.place import Place, is_taken
from launcher.tracking.records import FACTS, Feed
from tests.tracking.hand_made import PER_CLASS, VAL, finish, load, make_run, train


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def feed_of(run):
    return Feed(run, recipes.read_resolved(run.recipe))


def steps(records):
    return [record.step for record in records]


def append(run, text):
    with run.metrics.open("a") as file:
        file.write(text)


def test_a_file_that_is_not_there_yet_has_nothing(run):
    feed = feed_of(run)
    assert feed.new() == []
    train(run, 1)
    assert steps(feed.new()) == [1]
    assert feed.new() == []


def test_a_line_comes_when_it_is_whole(run):
    feed = feed_of(run)
    append(run, '{"split": "train", "epoch": 0, ')
    assert feed.new() == []
    append(run, '"step": 1, "loss": 0.5}')
    assert feed.new() == []  # it may go on
    append(run, '\n{"split": "tr')
    assert steps(feed.new()) == [1]
    train(run, 2)  # whose writer ends the line that nobody ended
    assert steps(feed.new()) == [2]
    append(run, '{"split": "train", "epoch": 0, "step": 3, "loss": 0.5}')
    assert steps(feed.new(final=True)) == [3]
    assert feed.new(final=True) == []


def test_what_comes_again_after_a_resume_counts_once_and_steps_grow(run):
    feed = feed_of(run)
    train(run, 1, 2, 3)
    run.append_metrics(**VAL | {"step": 3})
    first = feed.new()
    train(run, 2, 3, 4, attempt=2, loss=9.0)
    run.append_metrics(**VAL | {"step": 3, "attempt": 2})
    run.append_metrics(**VAL | {"step": 6, "attempt": 2})
    records = [*first, *feed.new()]
    assert [(record.split, record.step) for record in records] == [
        *[("train", step) for step in (1, 2, 3)],
        *[("val", 3), ("train", 4), ("val", 6)],
    ]
    assert [record.number for record in records] == list(range(6))
    afterwards = feed_of(run).new()
    assert afterwards == records  # whoever comes later sends the same


def test_of_many_nodes_the_range_is_sent(run):
    for node in range(17):
        gpus = [{"gpu": 0, "utilization": node / 16}, {"gpu": 1, "utilization": 0.5}]
        load(run, node, 1.0, cpu=1.0 if node else 0.0, gpus=gpus)
    train(run, 1, time=100.0)
    (record,) = feed_of(run).new()
    sent = {name: value for name, value in record.values.items() if name.startswith("node")}
    assert sent.keys() == {
        f"nodes/{name}_{kind}" for name in ("cpu", "gpu_utilization") for kind in ("mean", "min", "max")
    }
    assert (sent["nodes/cpu_min"], sent["nodes/cpu_mean"]) == (0.0, 16 / 17)
    assert (sent["nodes/gpu_utilization_max"], sent["nodes/gpu_utilization_mean"]) == (1.0, 0.5)


def test_what_many_nodes_do_goes_with_the_same_record_whenever_it_is_read(run, monkeypatch):
    now = 0.0
    monkeypatch.setattr(loads, "clock", SimpleNamespace(monotonic=lambda: now))
    feed, records = feed_of(run), []
    for now, step in (0.0, 1), (14.0, 2), (28.0, 3):  # the files are read the first and the last time
        for node in range(17):
            load(run, node, 100.0 + now, cpu=now / 100)
        train(run, step, time=106.0 + now)
        records += feed.new()
    assert feed_of(run).new() == records


def test_two_test_sets_that_the_same_checkpoint_measured_are_both_sent(run):
    feed = feed_of(run)
    for attempt, name in ((1, "test"), (2, "holdout"), (3, "holdout")):
        run.append_metrics(**VAL | {"split": "test", "test_set": name, "step": 3, "attempt": attempt})
    assert [(record.split, record.line["test_set"]) for record in feed.new()] == [("test", "test"), ("test", "holdout")]


@pytest.mark.parametrize("line", ['{"no": "split"}', "7", "[1]", '{"split": "train", "step": "x", "epoch": 0}', "\x00"])
def test_a_line_that_is_no_record_is_left_out(run, line):
    append(run, f"{line}\n")
    train(run, 1)
    assert steps(feed_of(run).new()) == [1]


def test_numbers_go_by_their_split_and_what_is_none_or_says_nothing_is_left_out(run):
    run.append_event(FACTS, num_classes=3, train_images=30)
    train(run, 10, loss=None)
    few = {name: PER_CLASS[name] for name in "abc"}
    run.append_metrics(**VAL | {"per_class": few})
    feed = feed_of(run)
    first, second = feed.new()
    assert first.values == {
        "train/top1": 0.25,
        "train/lr": 0.01,
        "train/lr/head": 0.1,
        "train/images_per_s": 40.0,
        "train/data_wait": 0.25,
        "train/grad_norm": 1.5,
    }
    assert second.values == {"val/loss": 2.0, "val/top1": 0.5, "val/f1": 0.4}
    assert feed.story().facts["train_images"] == 30


def test_the_best_validation_is_known_as_it_comes(run):
    for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0), (4, None)):
        run.append_metrics(**VAL | {"step": step, "loss": loss})
    assert [record.is_best for record in feed_of(run).new()] == [True, False, True, False]


def test_what_is_kept_of_the_best_validation_goes_with_its_line(run):
    run.append_metrics(**VAL)
    write_json_atomic(run.validation, {"step": 40, "wrong": [1]})
    run.append_metrics(**VAL | {"epoch": 1, "step": 40})
    run.append_metrics(**VAL | {"epoch": 2, "step": 60})
    records = feed_of(run).new()
    assert [record.validation.get("wrong") for record in records] == [None, [1], None]
    assert [record.epoch for record in records] == [1, 2, 3]  # as people count
    run.validation.write_text("{")
    assert [record.validation for record in feed_of(run).new()] == [{}, {}, {}]


def test_how_a_run_ended_is_told(run):
    run.append_event("attempt_started", attempt=2)
    run.append_event("attempt_ended", attempt=2, cause="bug", message="ValueError: x")
    finish(run, "failed")
    feed = feed_of(run)
    feed.new()
    story = feed.story()
    assert (story.state, story.attempts, story.message) == ("failed", 2, "ValueError: x")


# --- each record once


class Book:
    """A sink that keeps each tracker's records in a file of its own, and dies after so many."""

    name = "book"
    confirms = False

    def __init__(self, run, dies_after=None):
        self._folder = run.path / "book"
        self._folder.mkdir(exist_ok=True)
        self._left = dies_after
        self.closed = []

    def files(self):
        return sorted(self._folder.iterdir())

    def open(self, story, sent):
        self._file = self._folder / f"{len(self.files()):03}"
        self._file.touch()
        return sent

    def send(self, record):
        if self._left is not None:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
        with self._file.open("a") as file:
            file.write(f"{record.step}\n")

    def flush(self, story):
        pass

    def close(self, story, *, artifacts):
        self.closed.append((story.state, list(artifacts)))


def book_of(run):
    return [int(line) for file in sorted((run.path / "book").iterdir()) for line in file.read_text().split()]


def go(run, sink):
    return follow(run, recipes.read_resolved(run.recipe), sink, over=lambda _: True)


def test_what_a_killed_tracker_left_is_written_again_whole(run):
    train(run, 1, 2)
    assert go(run, Book(run)) == 2
    train(run, *range(3, 8))
    for dies_after in (0, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            go(run, Book(run, dies_after))
    assert go(run, Book(run)) == 5
    assert book_of(run) == list(range(1, 8))
    assert len(list((run.path / "book").iterdir())) == 2


def test_one_that_has_all_is_left_alone_until_there_is_more(run):
    train(run, 1)
    run.checkpoint(1).mkdir()
    run.best_checkpoint.symlink_to(run.checkpoint(1).name)
    finish(run)
    first, second, third = Book(run), Book(run), Book(run)
    assert [go(run, first), go(run, second)] == [1, 0]
    assert (first.closed, second.closed) == ([("completed", ["best"])], [])
    run.exports.mkdir()
    run.export_manifest.write_text("{}")
    assert go(run, third) == 0
    assert third.closed == [("completed", ["exports"])]
    assert book_of(run) == [1]


def test_a_second_tracker_says_who_tracks_and_ends(run):
    with Place(run, "book"):
        code = """
import sys
from launcher.runs.run_dir import RunDir
from launcher.tracking.place import Place
with Place(RunDir(sys.argv[1]), "book", wait_s=0.0): pass
"""
        done = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, check=False)
        assert f"is tracked already, by process {os.getpid()} on " in done.stderr
        assert done.returncode == 1
    assert not is_taken(run, "book")


def test_half_of_a_mark_is_no_mark(run):
    run.tracked("book").parent.mkdir()
    run.tracked("book").write_text('{"sent": 1')
    train(run, 1)
    assert go(run, Book(run)) == 1
