"""What is told of models that are no better than chance, and of those that only look so."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest

from launcher.node import finish
from launcher.recipe import load as recipes
from launcher.recipe import schema as recipe_schema
from launcher.report import build as report
from launcher.runs import diagnose, findings
from launcher.runs.run_dir import RunDir

TEN = tuple(f"class {index}" for index in range(10))


def val_line(confusion, *, classes=None, step=500):
    """As training writes it; rows are true classes, columns predicted ones."""
    counts = np.array(confusion)
    names = classes or TEN[: len(counts)]
    rows = {name: {"recall": 0.0, "precision": 0.0, "f1": 0.0, "samples": 0} for name in names}
    numbers = {"samples": int(counts.sum()), "loss": 2.0, "top1": counts.trace() / counts.sum(), "f1": 0.1}
    return {"split": "val", "time": 0.0, "attempt": 1, "epoch": 0, "step": step, **numbers, "top5": 1.0} | {
        "per_class": rows,
        "confusion": counts.tolist(),
    }


def train_line(top1, *, step=490, samples=320):
    numbers = {"samples": samples, "loss": 1.0, "top1": top1, "top5": 1.0, "lr": 0.1, "images_per_s": 1.0}
    return {"split": "train", "time": 0.0, "attempt": 1, "epoch": 0, "step": step, **numbers}


def one_column(per_class, column=0):
    found = np.zeros((len(per_class), len(per_class)), int)
    found[:, column] = per_class
    return found


def found_in(confusion, *, train=0.5, final=None):
    best = val_line(confusion)
    lines = [] if train is None else [train_line(train)]
    return [(one.kind, one.message, one.cause) for one in findings.find(best, final or best, lines)]


def kinds(*arguments, **more):
    return [kind for kind, _, _ in found_in(*arguments, **more)]


def diagonal(per_class, right):
    """A model that is right in ``right`` of the images of each class and takes the others for the next one."""
    found = np.diag([round(n * right) for n in per_class])
    for index, n in enumerate(per_class):
        found[index, (index + 1) % len(per_class)] += n - round(n * right)
    return found


def test_one_class_for_all_after_good_training_is_blamed_on_validation():
    ((kind, message, cause),) = found_in(one_column([10] * 10, 3), train=0.975)
    assert kind == "one_class"
    assert message == (
        "100 of 100 validation images are taken for 'class 3', and 10 are (top-1 0.100), while training reached 0.975"
    )
    assert "BatchNorm's running statistics" in cause
    assert "differ from those in train/" in cause


def test_a_short_training_that_learned_half_of_it_is_no_reason_for_one_class():
    """As mobilenet_v3_small did on digits in 90 steps."""
    best = val_line(one_column([36] * 10, 3), step=90)
    (found,) = findings.find(best, best, [train_line(0.489, step=90)])
    assert "BatchNorm's running statistics" in found.cause


def test_one_class_for_all_of_a_short_training_is_blamed_on_its_shortness():
    best = val_line(one_column([10] * 10), step=12)
    (found,) = findings.find(best, best, [train_line(0.1, step=12)])
    assert found.cause.startswith("training was short, 12 steps")
    (found,) = findings.find(best, best, [])  # fewer steps than tracking.log_every
    assert "while training" not in found.message


def test_one_class_for_all_after_long_training_that_learned_nothing():
    ((_, _, cause),) = found_in(one_column([10] * 10), train=0.11)
    assert cause.startswith("it has not learned: optim.lr")


def test_answers_that_have_nothing_to_do_with_the_images_are_chance():
    spread = np.random.default_rng(0).multinomial(30, [0.1] * 10, size=10)
    ((kind, message, _),) = found_in(spread, train=0.1)
    assert kind == "chance"
    assert "no better than chance" in message


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ([[190, 0], [10, 0]], ["one_class"]),  # the greater class for all: right in 95 %, and has learned nothing
        ([[189, 1], [4, 6]], []),  # finds six of ten
        ([[190, 0], [1, 9]], []),
        ([[0, 190], [0, 10]], ["one_class"]),  # the lesser for all
        ([[95, 0, 0], [3, 0, 0], [2, 0, 0]], ["one_class"]),
        ([[50, 0], [0, 50]], []),
        ([[30, 20], [20, 30]], []),  # weak, and not chance
        ([[25, 25], [25, 25]], ["chance"]),
        (one_column([1, 1]), []),  # two images show nothing
        (one_column([4, 4]), []),
        (one_column([6, 6]), ["one_class"]),
        ([[9, 0], [1, 0]], []),  # a single image of the other class
        ([[20, 3], [0, 0]], []),  # validation has one class only: nothing to tell apart
        (diagonal([20] * 10, 0.9), []),
        (diagonal([20] * 10, 0.3), []),
    ],
)
def test_what_counts_as_no_better_than_chance(confusion, expected):
    assert kinds(confusion, train=None) == expected


def test_a_little_better_than_one_of_a_thousand_classes_is_better_than_chance():
    line = val_line([[1]]) | {"samples": 50_000, "top1": 0.02, "confusion": None}
    many = {"chance": 0.001, "most": "a", "count": 900, "true": 50, "hits": 10}
    assert findings.find(line | {"answers": many}, line, []) == []
    (found,) = findings.find(line | {"top1": 0.0011, "answers": many}, line, [])
    assert found.kind == "chance"
    (found,) = findings.find(line | {"answers": many | {"count": 49_990, "hits": 50}}, line, [])
    assert found.kind == "one_class"


def test_what_an_earlier_version_wrote_of_many_classes_says_nothing():
    line = val_line([[1]]) | {"samples": 50_000, "top1": 0.0011}
    del line["confusion"], line["per_class"]
    assert findings.find(line, line, []) == []


@pytest.mark.parametrize(
    ("train", "right", "expected"), [(0.975, 0.5, ["gap"]), (1.0, 0.65, []), (0.6, 0.5, []), (None, 0.5, [])]
)
def test_training_and_validation_that_part(train, right, expected):
    assert kinds(diagonal([20] * 10, right), train=train) == expected


def test_a_later_validation_that_does_well_is_no_gap():
    """Early stopping by the loss can keep a checkpoint whose top-1 is not the best."""
    assert kinds(diagonal([20] * 10, 0.5), train=0.95, final=val_line(diagonal([20] * 10, 0.8))) == []


def test_one_small_window_of_training_does_not_decide():
    lines = [*(train_line(0.6, step=step) for step in (10, 20)), train_line(1.0, step=30, samples=8)]
    best = val_line(diagonal([20] * 10, 0.5))
    assert findings.find(best, best, lines) == []


def test_folders_that_are_mixed_up_are_named():
    confusion = diagonal([20] * 10, 0.9)
    confusion[[2, 5]] = confusion[[5, 2]]
    ((kind, message, cause),) = found_in(confusion, train=0.95)
    assert kind == "mixed_up"
    assert "'class 2' for 'class 5', 'class 5' for 'class 2'" in message
    assert "train/ or in val/" in cause


def test_folders_in_another_order_are_mixed_up_and_not_chance():
    ((kind, message, _),) = found_in(np.roll(np.diag([20] * 10), 1, axis=1), train=0.95)
    assert kind == "mixed_up"
    assert "top-1 0.000" in message


def test_a_class_that_is_taken_for_another_is_not_mixed_up_with_it():
    confusion = np.diag([20] * 10)
    confusion[2] = 0
    confusion[2, 5] = 20
    assert kinds(confusion, train=0.95) == []


@pytest.fixture
def write_run(tmp_path):
    def write(lines, *, debug=False, events=(), step=500):
        run = RunDir(tmp_path / "run")
        run.create()
        run.recipe.write_text(recipes.to_yaml(recipe_schema.Recipe()))
        plan = {"run_id": "r-1", "name": "r", "command": [], "created": 0.0, "host": "here", "backend": "local"}
        plan |= {"device": "cpu", "nodes": 1, "procs_per_node": 1, "world_size": 1, "debug": debug}
        run.plan.write_text(json.dumps(plan))
        best = {"metric": "val/top1", "value": 0.1, "epoch": 0, "step": step}
        run.update_status(state="completed", attempt=1, epoch=1, step=step, best=best)
        for line in lines:
            run.append_metrics(**line)
        for event in events:
            run.append_event(**event)
        return run

    return write


def test_terminal_report_card_and_why_say_the_same(write_run):
    run = write_run([train_line(0.975), val_line(one_column([10] * 10))])
    (found,) = findings.of_run(run)
    assert f"WARNING: {found}" in finish.summary(run)
    report.write_report(run)
    assert json.loads(run.report_json.read_text())["findings"] == [
        {"kind": "one_class", "message": found.message, "cause": found.cause}
    ]
    card = run.model_card.read_text().replace("\\", "")
    for text in (diagnose.explain(run), html.unescape(run.report_html.read_text()), card):
        assert found.message in text
        assert found.cause in text


@pytest.mark.parametrize("debug", [False, True])
def test_a_good_model_and_a_debugged_one_are_told_nothing(write_run, debug):
    confusion = one_column([10] * 10) if debug else diagonal([10] * 10, 0.9)
    run = write_run([train_line(0.9), val_line(confusion)], debug=debug)
    assert findings.of_run(run) == []
    assert "WARNING" not in finish.summary(run)


def test_the_best_checkpoint_is_judged_by_its_own_validation(write_run):
    good, bad = val_line(diagonal([10] * 10, 0.9), step=500), val_line(one_column([10] * 10), step=600)
    assert findings.of_run(write_run([good, bad])) == []


def test_a_step_that_came_again_counts_by_its_last_line(write_run):
    good, bad = val_line(diagonal([10] * 10, 0.9)), val_line(one_column([10] * 10))
    assert findings.of_run(write_run([bad, good])) == []


def test_a_run_that_was_not_validated_is_told_nothing(tmp_path, write_run):
    run = write_run([train_line(0.9)])
    run.metrics.write_text(json.dumps(train_line(0.9)) + '\n5\n{"split": "va')
    assert findings.of_run(run) == []


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"cat": 100, "dog": 120, "fox": 5}, {"fox": 5}),
        ({"cat": 100, "dog": 0, "fox": 5}, {"dog": 0, "fox": 5}),
        ({"cat": 3000, "dog": 3000, "fox": 100}, {"fox": 100}),
        ({"cat": 100, "dog": 120, "fox": 10}, {}),
        ({"cat": 8, "dog": 8}, {"cat": 8, "dog": 8}),
        ({}, {}),
    ],
)
def test_rare_classes(counts, expected):
    assert list(findings.rare_classes(counts).items()) == list(expected.items())


def test_of_many_rare_classes_the_rarest_are_named():
    line = findings.describe_rare(findings.rare_classes({f"c{index}": index for index in range(13)} | {"x": 1000}))
    assert line == (
        "few training images of c0 (0), c1 (1), c2 (2), c3 (3), c4 (4), c5 (5), c6 (6), c7 (7), c8 (8), c9 (9): expect "
        "little where they are concerned"
    )


def test_a_rare_class_is_in_the_card(write_run):
    event = {"kind": "rare_classes", "num_classes": 3, "classes": {"fox|hound": 5, "owl": 7}}
    run = write_run([val_line(diagonal([10] * 10, 0.9))], events=[event])
    report.write_report(run)
    assert "Few training images, so expect little of these classes: fox\\|hound (5), owl (7) and 1 more classes." in (
        run.model_card.read_text()
    )


@pytest.mark.parametrize(("num", "shown"), [(3, True), (20, True), (21, False)])
def test_the_card_shows_the_confusion_matrix_of_up_to_20_classes(write_run, num, shown):
    names = tuple(f"c|{index}" for index in range(num))
    run = write_run([val_line(diagonal([10] * num, 0.9), classes=names)])
    report.write_report(run)
    card = run.model_card.read_text()
    row = f"| **c\\|1** | {' | '.join(['0', '9', '1', *['0'] * (num - 3), '10'])} |"
    assert (row in card) == shown
