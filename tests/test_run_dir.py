from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import run_dir
from launcher.errors import UsageError
from launcher.run_dir import RunDir, append_jsonl, new_run_id, read_jsonl, write_json_atomic, write_text_atomic

ROOT = Path(__file__).parents[1]

WRITER = """
import sys
from pathlib import Path
from launcher.run_dir import write_json_atomic

for number in range(1, int(sys.argv[2]) + 1):
    write_json_atomic(Path(sys.argv[1]), {"number": number, "filling": [number] * 20_000})
"""
APPENDER = """
import sys
from pathlib import Path
from launcher.run_dir import append_jsonl

path, writer = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()  # all begin at once
for number in range(int(sys.argv[3])):
    append_jsonl(path, {"writer": writer, "number": number, "filling": str(writer) * 3_000})
"""


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": str(ROOT)}, **options
    )


@pytest.fixture
def run(tmp_path):
    found = RunDir(tmp_path / "run")
    found.create()
    return found


def test_a_reader_sees_whole_files_only_while_they_are_written_again_and_again(tmp_path):
    file, num = tmp_path / "status.json", 150
    seen = []
    with python(WRITER, file, num) as writer:
        while writer.poll() is None:
            if file.exists():
                value = json.loads(file.read_text())
                assert value["filling"] == [value["number"]] * 20_000
                seen.append(value["number"])
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 3  # it was read while it was written, or nothing is proved
    assert json.loads(file.read_text())["number"] == num
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    write_text_atomic(file, "old")

    def disk_full(path, text, encoding):
        with path.open("w", encoding=encoding) as opened:
            opened.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(file, "new and longer")
    assert file.read_text() == "old"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused_before_anything_is_written(value, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"loss": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        append_jsonl(tmp_path / "a.jsonl", {"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_lines_of_four_processes_do_not_mix(tmp_path):
    file, num = tmp_path / "events.jsonl", 1_000
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(python(APPENDER, file, writer, num, **pipes)) for writer in range(4)]
        assert [writer.stdout.readline() for writer in writers] == [b"ready\n"] * 4
        for writer in writers:
            writer.stdin.close()
    assert [writer.returncode for writer in writers] == [0] * 4
    lines = filter(None, file.read_text().splitlines())
    records = [json.loads(line) for line in lines]  # not read_jsonl, which would pass over a line that is broken
    assert len(records) == 4 * num
    order = [record["writer"] for record in records]
    assert order != sorted(order)  # they did write at the same time, or nothing is proved
    for writer in range(4):
        own = [record for record in records if record["writer"] == writer]
        assert [record["number"] for record in own] == list(range(num))
        assert {record["filling"] for record in own} == {str(writer) * 3_000}


@pytest.mark.parametrize("cut", [1, 10, 35])
def test_a_last_line_cut_off_by_a_crash_is_passed_over(cut, tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_jsonl(file, {"step": step, "note": "line\u2028separator"})
    file.write_bytes(file.read_bytes()[:-cut])
    # Without its newline only, the record is whole.
    assert [record["step"] for record in read_jsonl(file)] == ([1, 2, 3] if cut == 1 else [1, 2])


def test_what_is_appended_after_a_line_was_cut_off_is_read(tmp_path):
    """A killed run that is resumed goes on in the same file: its first new line must not end in the old one."""
    file = tmp_path / "events.jsonl"
    append_jsonl(file, {"kind": "attempt_started", "attempt": 1})
    append_jsonl(file, {"kind": "checkpoint", "step": 5})
    file.write_bytes(file.read_bytes()[:-8])
    append_jsonl(file, {"kind": "attempt_started", "attempt": 2})
    append_jsonl(file, {"kind": "resumed", "step": 5})
    assert [(r["kind"], r.get("attempt")) for r in read_jsonl(file)] == [
        ("attempt_started", 1),
        ("attempt_started", 2),
        ("resumed", None),
    ]


def test_a_missing_jsonl_file_is_empty(tmp_path):
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_a_run_id_is_the_name_the_time_and_four_hex_digits(monkeypatch):
    ids = {new_run_id("photos") for _ in range(200)}
    assert all(re.fullmatch(r"photos-\d{8}-\d{6}-[0-9a-f]{4}", found) for found in ids)
    assert len(ids) > 150


def test_no_run_at_a_path_is_the_users_error(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: not a run directory \(found nothing\)") as caught:
        RunDir.existing(tmp_path / "nowhere")
    assert caught.value.exit_code == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"folder: not a run directory \(found a folder without recipe.yaml\)"):
        RunDir.existing(tmp_path / "folder")


def test_a_folder_with_somebodys_recipe_yaml_is_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    with pytest.raises(UsageError, match=r"not a run directory.*plan\.json"):
        RunDir.existing(tmp_path)


def test_an_existing_run_is_opened_and_knows_its_id(run):
    write_json_atomic(run.plan, {"run_id": "a-20260101-000000-beef"})
    write_text_atomic(run.recipe, "name: a\n")
    assert RunDir.existing(str(run.path)).run_id == "a-20260101-000000-beef"


def test_creating_twice_keeps_what_is_there(run):
    (run.logs / "old.log").write_text("kept")
    run.create()
    assert (run.logs / "old.log").read_text() == "kept"
    assert run.checkpoints.is_dir()


def test_status_is_pending_until_written_and_changes_field_by_field(run, monkeypatch):
    assert run.read_status() == {"state": "pending"}
    monkeypatch.setattr(run_dir.time, "time", lambda: 7.0)
    run.update_status(state="running", epoch=0)
    run.update_status(epoch=3)
    assert run.read_status() == {"state": "running", "epoch": 3, "updated": 7.0}


def test_events_and_metrics_carry_time_and_events_the_host(run, monkeypatch):
    monkeypatch.setattr(run_dir.time, "time", lambda: 7.0)
    monkeypatch.setattr(run_dir.socket, "gethostname", lambda: "node7")
    run.append_event("checkpoint", step=5)
    run.append_metrics(split="val", top1=0.5)
    assert list(read_jsonl(run.events)) == [{"time": 7.0, "kind": "checkpoint", "host": "node7", "step": 5}]
    assert list(read_jsonl(run.metrics)) == [{"time": 7.0, "split": "val", "top1": 0.5}]


def test_a_run_is_shown_by_its_shorter_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunDir("runs/a")) == "runs/a"
    assert str(RunDir("/a")) == "/a"


def test_file_names_are_those_of_the_contract(tmp_path):
    run = RunDir(tmp_path)
    names = {
        "recipe.yaml": run.recipe,
        "plan.json": run.plan,
        "status.json": run.status,
        "events.jsonl": run.events,
        "metrics.jsonl": run.metrics,
        "logs/attempt-2/rank-3.log": run.rank_log(2, 3),
        "errors/attempt-2/rank-3.json": run.rank_error(2, 3),
        "checkpoints/step-00000042": run.checkpoint(42),
        "checkpoints/last": run.last_checkpoint,
        "checkpoints/best": run.best_checkpoint,
        "exports": run.exports,
        "exports/manifest.json": run.export_manifest,
        "report.html": run.report_html,
        "report.json": run.report_json,
        "model_card.md": run.model_card,
        "wandb": run.wandb,
    }
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in names.items()} == {n: n for n in names}
