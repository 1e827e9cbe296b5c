from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.system.files import append_jsonl, read_jsonl, write_json_atomic, write_text_atomic

ROOT = Path(__file__).parents[2]

WRITER = """
import sys
from pathlib import Path
from launcher.system.files import write_json_atomic

file, enough, number = Path(sys.argv[1]), Path(sys.argv[2]), 0
while number < 150 or not enough.exists():
    number += 1
    write_json_atomic(file, {"number": number, "filling": [number] * 20_000})
print(number)
"""
APPENDER = """
import sys
from pathlib import Path
from launcher.system.files import append_jsonl

path, writer = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
for number in range(int(sys.argv[3])):
    append_jsonl(path, {"writer": writer, "number": number, "filling": str(writer) * 3_000})
    while number == 0 and path.read_text().count('"number": 0,') < 4:  # all go on at once
        pass
"""


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": str(ROOT)}, **options
    )


def test_a_reader_sees_whole_files_only_while_they_are_written_again_and_again(tmp_path):
    file, enough = tmp_path / "written" / "status.json", tmp_path / "enough"
    file.parent.mkdir()
    seen = []
    with python(WRITER, file, enough, stdout=subprocess.PIPE) as writer:
        while writer.poll() is None:
            if file.exists():
                value = json.loads(file.read_text())
                assert value["filling"] == [value["number"]] * 20_000
                seen.append(value["number"])
            if len(set(seen)) > 10:  # it was read while it was written, or nothing is proved
                enough.touch()
        num = int(writer.stdout.read())
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert json.loads(file.read_text())["number"] == num
    assert [path.name for path in file.parent.iterdir()] == ["status.json"]


def test_two_that_write_one_file_at_the_same_time_do_not_meet(tmp_path, monkeypatch):
    """Threads of a process; or nodes whose containers give them the same process ids."""
    file, write_text = tmp_path / "status.json", Path.write_text

    def meanwhile(path, text, encoding):
        monkeypatch.setattr(Path, "write_text", write_text)
        write_text(path, text, encoding=encoding)
        write_text_atomic(file, "another")

    monkeypatch.setattr(Path, "write_text", meanwhile)
    write_text_atomic(file, "one")
    assert file.read_text() == "one"
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
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


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


@pytest.mark.parametrize("left", ['"kind"', "17", "1.5e3", "null", "[1]", "true", '{"a": 1'])
def test_what_is_left_of_a_line_is_no_record(tmp_path, left):
    file = tmp_path / "events.jsonl"
    file.write_text(f'{{"step": 1}}\n{left}\n{{"step": 2}}\n')
    assert list(read_jsonl(file)) == [{"step": 1}, {"step": 2}]
