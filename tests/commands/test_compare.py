from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.commands import compare
from launcher.errors import UsageError
from launcher.runs.run_dir import RunDir

ROOT = Path(__file__).parents[2]
START = 1_795_000_000.0
ONNX = {"file": "model.onnx", "format": "onnx", "top1": 0.75, "accepted": True, "reason": None}
INT8 = {"file": "model.int8.onnx", "format": "int8", "top1": 0.5, "accepted": False, "reason": "loses 25 points"}


def recipe(*, name="r", lr=0.1, arch="resnet18", freeze=(), groups=None, metric="val/top1", procs=1, log_every=10):
    return {
        "name": name,
        "model": {"arch": arch, "weights": None, "freeze": list(freeze)},
        "optim": {"lr": lr, "groups": groups or {}},
        "train": {"epochs": 3, "early_stopping": {"metric": metric}},
        "tracking": {"log_every": log_every},
        "launch": {"procs": procs},
    }


def train(step, rate, *, attempt=1, time=0.0):
    fields = {"split": "train", "attempt": attempt, "epoch": 0, "step": step, "loss": 1.0, "top1": 0.99}
    return {"time": START + time, **fields, "images_per_s": rate}


def val(epoch, top1, *, loss=1.0, attempt=1, time=0.0):
    fields = {"split": "val", "attempt": attempt, "epoch": epoch, "step": 4 * (epoch + 1)}
    return {"time": START + time, **fields, "loss": loss, "top1": top1, "top5": 1.0, "f1": top1 / 2}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(tmp_path):
    """Write a run directory below the working folder; None leaves a file out."""

    def _make(path, *, recipe=recipe(), metrics=(), events=(), status=None, exports=None, exported_step=4):  # noqa: B008
        run = RunDir(tmp_path / path)
        run.create()
        run.plan.write_text("{}")
        run.recipe.write_text(json.dumps(recipe))  # JSON is YAML
        write_lines(run.metrics, metrics)
        write_lines(run.events, events)
        run.status.write_text(json.dumps({"state": "completed", **(status or {})}))
        if exports is not None:
            run.exports.mkdir()
            manifest = {"checkpoint": {"step": exported_step}, "exports": exports}
            run.export_manifest.write_text(json.dumps(manifest))
        return run

    return _make


@pytest.fixture
def table(capsys):
    """Compare; return the header, the rows as ``{header: cell}``, and the lines below the table."""

    def _table(*paths, metric=None):
        compare.run(paths, metric=metric, as_json=False)
        lines, _, below = capsys.readouterr().out.partition("\n\n")
        header, *rows = lines.splitlines()
        names = header.split()
        marked = [[row[0].strip(), *re.split(" {2,}", row[1:].strip())] for row in rows]
        return names, [dict(zip(["mark", *names], cells, strict=True)) for cells in marked], below

    return _table


@pytest.fixture
def as_json(capsys):
    def _as_json(*paths, metric=None):
        compare.run(paths, metric=metric, as_json=True)
        return json.loads(capsys.readouterr().out)

    return _as_json


@pytest.fixture
def on_terminal(capsys, monkeypatch):
    """Compare on a terminal of so many columns; return the table's lines and what stands below it."""

    def _on_terminal(columns, *paths):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        compare.run(paths, metric=None, as_json=False)
        lines, _, below = capsys.readouterr().out.partition("\n\n")
        return lines.splitlines(), below

    return _on_terminal


def order(rows):
    return [row["run"] for row in rows]


# --- which runs


def test_runs_and_folders_can_be_mixed_and_a_run_named_twice_is_one_row(make, table, tmp_path):
    for path in ("runs/b", "runs/a", "deep/sweep/c"):
        make(path)
    _, rows, _ = table("deep", "runs", "runs/b")
    assert order(rows) == ["deep/sweep/c", "runs/a", "runs/b"]
    (tmp_path / "latest").symlink_to("runs/b")
    assert len(table("runs/b", "latest", "runs")[1]) == 2
    assert order(table("runs/b", "runs")[1]) == ["runs/b", "runs/a"]


def test_every_path_without_a_run_is_named_with_what_to_do(make, tmp_path):
    make("runs/a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        compare.run(["runs", "empty", "absent", "file"], metric=None, as_json=False)
    text = str(caught.value)
    assert "empty: a folder without a run" in text
    assert "absent: no such folder" in text
    assert "file: no such folder" in text
    assert "launch ps" in text
    assert "runs:" not in text


def test_no_path_at_all_is_refused():
    with pytest.raises(UsageError, match="no run to compare"):
        compare.run([], metric=None, as_json=False)


# --- which columns


def test_only_settings_that_differ_have_a_column(make, table):
    make("a", recipe=recipe(lr=0.1, freeze=["layer1", "bn1"], name="one", procs=1))
    make("b", recipe=recipe(lr=0.01, freeze=["layer1"], name="two", procs=2, log_every=5))
    header, rows, _ = table("a", "b")
    assert header == ["run", "state", "model.freeze", "optim.lr", "val/top1", "epoch", "images/s", "time"]
    assert [row["optim.lr"] for row in rows] == ["0.1", "0.01"]
    assert [row["model.freeze"] for row in rows] == ['["layer1", "bn1"]', '["layer1"]']


def test_a_setting_that_only_one_recipe_has_differs(make, as_json, table):
    make("a", recipe=recipe(groups={"head": 0.01}))
    make("b", recipe=recipe())
    _, rows, _ = table("a", "b")
    assert [row["optim.groups.head"] for row in rows] == ["0.01", "-"]
    found = as_json("a", "b")
    assert found["keys"] == ["optim.groups.head"]
    assert [run["recipe"] for run in found["runs"]] == [{"optim.groups.head": 0.01}, {}]


def test_null_differs_from_a_setting_that_is_not_there(make, as_json):
    bare = recipe()
    del bare["model"]["weights"]
    make("a")
    make("b", recipe=bare)
    assert as_json("a", "b")["keys"] == ["model.weights"]


def test_name_and_machine_are_shown_where_nothing_else_differs(make, as_json):
    make("a", recipe=recipe(name="one", procs=1))
    make("b", recipe=recipe(name="two", procs=2, log_every=5))
    assert as_json("a", "b")["keys"] == ["name", "tracking.log_every", "launch.procs"]


def test_one_run_alone_is_a_table_too(make, table):
    make("a", metrics=[val(0, 0.5)])
    header, rows, _ = table("a")
    assert header == ["run", "state", "val/top1", "epoch", "images/s", "time"]
    assert rows[0]["mark"] == "*"


# --- what came of it


def test_the_best_run_is_first_and_marked_and_its_epoch_is_that_of_the_logs(make, table, as_json):
    make("a", metrics=[val(0, 0.5), val(1, 0.625), val(2, 0.25)])
    make("none")
    make("b", metrics=[val(0, 0.75)])
    _, rows, below = table("a", "none", "b")
    assert [(row["mark"], row["run"], row["val/top1"], row["epoch"]) for row in rows] == [
        ("*", "b", "0.7500", "1"),
        ("", "a", "0.6250", "2"),
        ("", "none", "-", "-"),
    ]
    assert "* the best val/top1 (max)" in below
    assert [run["best"] for run in as_json("a", "none", "b")["runs"]] == [
        {"value": 0.75, "epoch": 0, "step": 4},
        {"value": 0.625, "epoch": 1, "step": 8},
        None,
    ]


def test_ties_keep_the_given_order_and_are_both_the_best(make, table):
    for path in ("z", "y", "x"):
        make(path, metrics=[val(0, 0.5 if path != "y" else 0.25)])
    _, rows, _ = table("z", "y", "x")
    assert [(row["mark"], row["run"]) for row in rows] == [("*", "z"), ("*", "x"), ("", "y")]
    assert order(table("x", "y", "z")[1]) == ["x", "z", "y"]


def test_of_equal_epochs_the_first_is_the_best(make, table):
    make("a", metrics=[val(0, 0.25), val(1, 0.5), val(2, 0.5)])
    assert table("a")[1][0]["epoch"] == "2"


def test_a_loss_is_best_where_it_is_smallest(make, table):
    make("a", metrics=[val(0, 0.9, loss=2.0), val(1, 0.9, loss=1.5)])
    make("b", metrics=[val(0, 0.1, loss=0.5), val(1, 0.1, loss=0.75)])
    _, rows, below = table("a", "b", metric="val/loss")
    assert [(row["run"], row["val/loss"], row["epoch"]) for row in rows] == [("b", "0.5000", "1"), ("a", "1.5000", "2")]
    assert "* the best val/loss (min)" in below


def test_the_metric_is_what_all_runs_watched(make, as_json):
    make("a", recipe=recipe(metric="val/loss"))
    make("b", recipe=recipe(metric="val/loss"))
    make("c", recipe=recipe(metric="val/f1"))
    found = as_json("a", "b")
    assert (found["metric"], found["mode"]) == ("val/loss", "min")
    found = as_json("a", "b", "c")
    assert (found["metric"], found["mode"]) == ("val/top1", "max")
    assert as_json("a", "b", metric="val/top5")["metric"] == "val/top5"
    make("d", recipe=recipe(metric="val/beauty"))
    assert as_json("d")["metric"] == "val/top1"


@pytest.mark.parametrize(("num", "value"), [(5, None), (6, 1.0)])
def test_top_5_of_five_classes_or_fewer_is_no_value(make, as_json, num, value):
    make("a", metrics=[val(0, 0.5) | {"per_class": {str(index): {} for index in range(num)}}])
    (row,) = as_json("a", metric="val/top5")["runs"]
    assert (row["best"] and row["best"]["value"]) == value


def test_an_unknown_metric_names_the_nearest(make):
    make("a")
    with pytest.raises(UsageError, match=r"valid are .*val/f1.*; did you mean .*'val/top1'"):
        compare.run(["a"], metric="val/top", as_json=False)


def test_training_loss_is_the_epochs_mean_that_early_stopping_saw(make, as_json):
    best = {"metric": "train/loss", "value": 0.25, "epoch": 1, "step": 8}
    make("a", status={"best": best}, metrics=[train(2, 5.0)])
    make("b", status={"best": {**best, "metric": "val/loss"}}, metrics=[train(2, 5.0)])
    assert [run["best"] for run in as_json("a", "b", metric="train/loss")["runs"]] == [
        {"value": 0.25, "epoch": 1, "step": 8},
        None,
    ]


def test_a_step_that_came_again_after_a_resume_counts_once_and_the_last_line_wins(make, as_json):
    make("a", metrics=[train(2, 9.0), val(0, 0.75), train(2, 3.0, attempt=2), val(0, 0.5, attempt=2)])
    run = as_json("a")["runs"][0]
    assert run["best"]["value"] == 0.5
    assert run["images_per_s"] == 3.0


def test_speed_is_the_median_of_the_training_windows(make, table):
    make("a", metrics=[train(1, 10.0), train(2, 100.0), train(3, 110.0), val(0, 0.5) | {"images_per_s": 9000.0}])
    assert table("a")[1][0]["images/s"] == "100"


def test_time_is_that_of_the_attempts_without_pauses_and_exports(make, table, as_json):
    events = [
        {"time": START, "kind": "attempt_started", "attempt": 1},
        {"time": START + 60, "kind": "attempt_ended", "attempt": 1},
        {"time": START + 500, "kind": "attempt_started", "attempt": 2},
        {"time": START + 90_000, "kind": "export", "attempt": 2},
        {"time": START + 95_000, "kind": "completed"},
    ]
    make("a", events=events, metrics=[val(0, 0.5, attempt=2, time=500 + 3605)])
    assert as_json("a")["runs"][0]["training_s"] == 3665.0
    assert table("a")[1][0]["time"] == "1:01:05"


def test_accepted_exports_have_a_column_each(make, table, as_json):
    make("a", exports=[ONNX, INT8], status={"best": {"step": 4}})
    make("b", recipe=recipe(lr=1.0))
    header, rows, below = table("a", "b")
    assert header[-1] == "onnx"
    assert [row["onnx"] for row in rows] == ["0.7500", "-"]
    assert "exports: top-1 of those that were accepted" in below
    assert [run["exports"] for run in as_json("a", "b")["runs"]] == [{"onnx": 0.75}, {}]


def test_exports_of_an_earlier_checkpoint_are_said_to_be(make, capsys, as_json):
    make("a", exports=[ONNX], exported_step=4, status={"best": {"step": 8}})
    compare.run(["a"], metric=None, as_json=False)
    assert "0.7500 (old)\n" in capsys.readouterr().out
    assert as_json("a")["runs"][0]["exports_of_best"] is False


# --- damage


def test_a_run_that_has_not_begun_is_a_row_of_dashes(make, table):
    run = make("a")
    for path in (run.metrics, run.events, run.status):
        path.unlink()
    _, rows, below = table("a")
    assert list(rows[0].values()) == ["", "a", "pending", "-", "-", "-", "-"]
    assert "no run has a val/top1 yet" in below


DAMAGE = [b"", b"{", b'{"half": ', b"[1, 2]", b"3", b"null", b'"text"', b"\x00\x00\n", b"\t: [", b"\xff\xfe\xff"]


@pytest.mark.parametrize("damage", DAMAGE, ids=repr)
def test_a_damaged_run_is_a_row_and_the_whole_ones_keep_theirs(damage, make, table):
    make("whole", metrics=[val(0, 0.5)], recipe=recipe(metric="val/f1"))
    bad = make("bad", metrics=[val(0, 0.9)], exports=[ONNX])
    for path in (bad.recipe, bad.plan, bad.status, bad.metrics, bad.events, bad.export_manifest):
        path.write_bytes(damage)
    header, rows, _ = table("bad", "whole")
    assert header == ["run", "state", "val/f1", "epoch", "images/s", "time"]
    assert order(rows) == ["whole", "bad"]
    assert list(rows[1].values()) == ["", "bad", "-", "-", "-", "-", "-"]


def test_values_that_are_none_are_passed_over(make, as_json):
    odd = [
        {"time": "noon", "split": "train", "attempt": 1, "step": {}, "images_per_s": "fast"},
        {"time": START, "attempt": [1]},
        {"split": "train", "step": 1, "images_per_s": float("nan")},
        {"split": "train", "step": 2, "images_per_s": 7.0},
        {"split": "val", "step": None, "top1": 1.0, "epoch": 0},
        {"split": "val", "step": 1, "top1": float("inf"), "epoch": 0},
        {"split": "val", "step": 2, "top1": True, "epoch": 0},
        {"split": "val", "step": 3, "top1": 0.25},
    ]
    make(
        "a",
        metrics=[*odd, val(1, 0.125)],
        exports=[3, {"accepted": True}, ONNX | {"top1": "high"}],
        events=[[], odd[0]],
    )
    run = as_json("a")["runs"][0]
    assert run["best"] == {"value": 0.125, "epoch": 1, "step": 8}
    assert run["images_per_s"] == 7.0
    assert run["exports"] == {}


def test_a_last_line_cut_short_leaves_the_others(make, as_json):
    run = make("a", metrics=[val(0, 0.5)])
    with run.metrics.open("a") as file:
        file.write('{"split": "val", "top1": 0.9')
    assert as_json("a")["runs"][0]["best"]["value"] == 0.5


@pytest.mark.parametrize("missing", ["plan.json", "recipe.yaml"])
def test_half_a_run_that_is_named_is_a_row(missing, make, as_json):
    run = make("a", metrics=[val(0, 0.5)])
    (run.path / missing).unlink()
    assert as_json("a")["runs"][0]["best"]["value"] == 0.5


# --- how it fits


LONG = ["/data/collection-of-january/jpeg", "/data/collection-of-february/jpeg"]


def test_wide_values_are_cut_in_the_middle_so_that_the_table_fits(make, on_terminal):
    for path, folder in zip(["a", "b"], LONG, strict=True):
        make(path, recipe=recipe(arch=folder, lr=len(folder)), metrics=[val(0, 0.5)])
    lines, below = on_terminal(90, "a", "b")
    assert max(map(len, lines)) <= 90
    assert "optim.lr" in lines[0]
    assert "no room" not in below
    cells = [line.split()[3] for line in lines[1:]]
    for cell, whole in zip(cells, LONG, strict=True):
        head, tail = cell.split("…")
        assert min(len(head), len(tail)) >= 4
        assert whole.startswith(head)
        assert whole.endswith(tail)


def test_what_fits_is_not_cut(make, on_terminal):
    make("a", recipe=recipe(arch=LONG[0]))
    make("b", recipe=recipe(arch=LONG[1]))
    assert LONG[0] in "\n".join(on_terminal(200, "a", "b")[0])


def test_different_values_stay_different_when_they_are_cut(make, on_terminal):
    for index in range(3):
        make(f"r{index}", recipe=recipe(arch=f"/data/collection/{index}/some/folders/further/down/jpeg"))
    lines, _ = on_terminal(76, "r0", "r1", "r2")
    cells = {line.split()[2] for line in lines[1:]}
    assert all("…" in cell for cell in cells)
    assert len(cells) == 3


def test_values_that_no_cut_tells_apart_are_cut_in_the_middle(make, on_terminal):
    for index in range(2):
        make(f"r{index}", recipe=recipe(arch="a" * 40 + str(index) + "z" * 40))
    lines, _ = on_terminal(76, "r0", "r1")
    assert {line.split()[2] for line in lines[1:]} == {"a" * 12 + "…" + "z" * 12}


def test_settings_without_room_are_named(make, on_terminal):
    make("a", recipe=recipe(arch=LONG[0], lr=0.1, freeze=["x"]), exports=[ONNX])
    make("b", recipe=recipe(arch=LONG[1], lr=0.2, freeze=["y"]))
    lines, below = on_terminal(80, "a", "b")
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[2:4] == ["model.arch", "val/top1"]
    assert "no room for model.freeze, optim.lr: " in below


def test_what_is_piped_and_what_is_json_is_whole(make, capsys, as_json, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for path, folder in zip(["a", "b"], LONG, strict=True):
        make(path, recipe=recipe(arch=folder, freeze=[folder]))
    compare.run(["a", "b"], metric=None, as_json=False)
    out = capsys.readouterr().out
    assert all(folder in out for folder in LONG)
    assert "…" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert [run["recipe"]["model.freeze"] for run in as_json("a", "b")["runs"]] == [[folder] for folder in LONG]


def test_it_imports_neither_torch_nor_omegaconf_nor_rich(make):
    make("a", metrics=[val(0, 0.5)])
    code = (
        "import sys; from launcher.commands import compare; compare.run(['a'], metric=None, as_json=False);"
        "print(sorted({'torch', 'omegaconf', 'rich', 'submitit', 'wandb', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
