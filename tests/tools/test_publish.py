"""Which files of an export get a name in exports/, by rows and files that are made up."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from pathlib import Path

import pytest

from launcher.runs.run_dir import RunDir
from launcher.system import processes
from launcher.tools import export, publish


def row(name, content="new", *, accepted=True, measured=True):
    agreement = 1.0 if measured else None
    return {"file": export.FILES[name], "format": name, "accepted": accepted, "agreement": agreement, "of": content}


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "run")
    made.exports.mkdir(parents=True)
    return made


@pytest.fixture
def give(run, tmp_path):
    """Publish rows and files, and return what each file in exports/ then holds and whose row each has."""

    def give(rows, formats, *, content="new", ladder=(), missing=None, step=3, calibration=None):
        folder = tmp_path / content
        folder.mkdir()
        for name in formats:
            (folder / export.FILES[name]).write_text(content)
        manifest = {"checkpoint": {"step": step}, "not_measured": missing, "not_made": [], "ladder": [*ladder]}
        manifest["calibration"] = calibration
        publish.publish(run, folder, manifest | {"exports": rows}, list(export.FILES.values()))
        found = json.loads(run.export_manifest.read_text())["exports"]
        files = {file.name: file.read_text() for file in run.exports.iterdir() if file != run.export_manifest}
        return files, {one["file"]: one["of"] for one in found}

    return give


def test_what_was_made_only_to_be_quantized_does_not_replace_what_was_compared(give):
    give([row("onnx", "old"), row("int8", "old")], ["onnx", "int8"], content="old")
    files, rows = give([row("int8")], ["onnx", "int8"], ladder=[row("int8")])
    assert files == rows == {"model.onnx": "old", "model.int8.onnx": "new"}


def test_a_refused_rung_takes_the_name_from_the_earlier_file_and_gets_none(give):
    give([row("onnx", "old"), row("int8", "old")], ["onnx", "int8"], content="old")
    refused = row("int8", accepted=False)
    files, rows = give([row("fp16")], ["onnx", "int8", "fp16"], ladder=[refused, row("fp16")])
    assert files == rows == {"model.onnx": "old", "model.fp16.onnx": "new"}


def test_what_could_not_be_made_leaves_the_earlier_file(give):
    give([row("int8", "old")], ["int8"], content="old")
    files, rows = give([row("onnx")], ["onnx"], ladder=[row("int8", accepted=False, measured=False)])
    assert files == rows == {"model.onnx": "new", "model.int8.onnx": "old"}


def test_an_accepted_file_does_not_give_way_to_one_that_could_not_be_measured(give):
    give([row("onnx", "old")], ["onnx"], content="old")
    unmeasured = [row(name, accepted=False, measured=False) for name in ("onnx", "fp16")]
    files, rows = give(unmeasured, ["onnx", "fp16"], missing="no images")
    assert files == rows == {"model.onnx": "old", "model.fp16.onnx": "new"}


def test_nothing_stays_of_another_checkpoint_nor_a_row_without_its_file(give, run):
    give([row("onnx", "old"), row("int8", "old")], ["onnx", "int8"], content="old")
    (run.exports / "model.onnx").unlink()
    files, rows = give([row("fp16")], ["fp16"])
    assert files == rows == {"model.int8.onnx": "old", "model.fp16.onnx": "new"}
    files, rows = give([row("fp16", "newer")], ["fp16"], content="newer", step=4)
    assert files == rows == {"model.fp16.onnx": "newer"}


class KilledError(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("survived", range(9), ids="{} files later".format)
@pytest.mark.parametrize("look", [publish.read_manifest, publish.remove_abandoned], ids=["read", "export again"])
def test_a_kill_while_names_are_given_leaves_the_old_export_or_the_new_one(give, run, monkeypatch, survived, look):
    give([row("onnx", "old"), row("int8", "old")], ["onnx", "int8"], content="old")
    folder = run.exports / f".export-{socket.gethostname()}-{2**22 + 1}-x"  # of a process that is no more
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "model.fp16.onnx"):
        (folder / name).write_text("new")
    calls = itertools.count()

    def at_last(call):
        def counted(*arguments, **options):
            if next(calls) >= survived:  # a process that was killed does not clean up either
                raise KilledError
            return call(*arguments, **options)

        return counted

    manifest = {"checkpoint": {"step": 4}, "not_measured": None, "not_made": [], "calibration": None}
    manifest["exports"] = [row("onnx"), row("fp16")]
    with contextlib.suppress(KilledError), monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, at_last(getattr(Path, name)))
        publish.publish(run, folder, manifest, [export.FILES[name] for name in ("onnx", "int8", "fp16")])
    assert next(calls) > survived
    look(run)
    found = publish.read_manifest(run)["exports"]
    files = {file.name: file.read_text() for file in run.exports.glob("model*")}
    assert {one["file"]: one["of"] for one in found} == {k: v for k, v in files.items() if not k.endswith(".data")}
    assert sorted(files.items()) in (
        [("model.int8.onnx", "old"), ("model.onnx", "old")],
        [("model.fp16.onnx", "new"), ("model.onnx", "new"), ("model.onnx.data", "new")],
    )


@pytest.mark.parametrize(
    "error", [OSError("no space left on device"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_an_exception_while_names_are_given_loses_no_file(give, run, monkeypatch, error):
    give([row("onnx", "old")], ["onnx"], content="old")
    manifest = {"checkpoint": {"step": 4}, "not_measured": None, "not_made": [], "calibration": None}
    replace = Path.replace

    def fail_once(file, target):
        if file.name == "model.onnx":
            monkeypatch.setattr(Path, "replace", replace)
            raise error
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with contextlib.suppress(type(error)), publish.workplace(run) as folder:
        for name in ("onnx", "fp16"):
            (folder / export.FILES[name]).write_text("new")
        publish.publish(run, folder, manifest | {"exports": [row("onnx"), row("fp16")]}, list(export.FILES.values()))
    assert Path.replace is replace  # it was raised
    monkeypatch.setattr(publish, "_is_abandoned", lambda _: True)  # as it is when the process ends
    found = publish.read_manifest(run)["exports"]
    assert {one["file"]: one["of"] for one in found} == {"model.onnx": "new", "model.fp16.onnx": "new"}
    assert {file.read_text() for file in run.exports.glob("model*")} == {"new"}
    publish.remove_abandoned(run)
    assert not folder.exists()


def test_a_folder_without_a_plan_is_removed_whatever_happens(run):
    with contextlib.suppress(KilledError), publish.workplace(run) as folder:
        (folder / "model.onnx").write_text("half")
        raise KilledError
    assert not list(run.exports.iterdir())


def test_folders_of_killed_exports_are_removed_and_those_under_way_stay(run):
    here, dead = socket.gethostname(), 2**22 + 1
    stay = [f".export-{here}-{os.getpid()}-a_b", f".export-{here}-more-{dead}-x"]
    go = [f".export-{here}-{dead}-x", ".export-elsewhere-1-x", ".export-"]
    for name in (*stay, *go):
        (run.exports / name).mkdir()
    for name in go[1:]:
        os.utime(run.exports / name, (0, time.time() - 2 * publish.OLD_S))
    publish.remove_abandoned(run)
    assert sorted(file.name for file in run.exports.iterdir()) == sorted(stay)


def test_another_process_of_the_same_number_keeps_no_folder(run):
    with publish.workplace(run) as own:
        left = own.with_name(own.name.replace(f".{processes.start_time(os.getpid())}-", ".1-"))
        left.mkdir(exist_ok=True)
        publish.remove_abandoned(run)
        assert (own.exists(), left.exists()) == (True, False)


def test_the_calibration_of_files_that_stay_stays(give, run):
    give([row("onnx", "old")], ["onnx"], content="old", calibration={"temperature": 1.5})
    give([row("safetensors")], ["safetensors"])
    assert json.loads(run.export_manifest.read_text())["calibration"] == {"temperature": 1.5}
    give([row("onnx")], ["onnx"], content="other", step=4)
    assert json.loads(run.export_manifest.read_text())["calibration"] is None


def test_no_file_stays_that_has_another_temperature_than_the_manifest_says(give, run):
    old, new = ({"temperature": value} for value in (1.5, 2.5))
    give([row("onnx", "old"), row("fp16", "old")], ["onnx", "fp16"], content="old", calibration=old)
    near = {"temperature": 1.5 * (1 + 1e-6)}  # the same images on another machine
    files, _ = give([row("onnx", "newer")], ["onnx"], content="newer", calibration=near)
    assert files == {"model.onnx": "newer", "model.fp16.onnx": "old"}
    files, _ = give([row("int8", accepted=False)], ["int8"], content="refused", calibration=new)
    assert files == {"model.onnx": "newer", "model.fp16.onnx": "old"}
    assert json.loads(run.export_manifest.read_text())["calibration"] == near
    files, rows = give([row("int8")], ["int8"], calibration=new)
    assert files == rows == {"model.int8.onnx": "new"}
    assert json.loads(run.export_manifest.read_text())["calibration"] == new


def test_files_without_a_temperature_do_not_stay_beside_those_with_one(give):
    unmeasured = row("onnx", "old", accepted=False, measured=False)
    give([unmeasured], ["onnx"], content="old", missing="no images")
    files, rows = give([row("int8")], ["int8"], calibration={"temperature": 2.5})
    assert files == rows == {"model.int8.onnx": "new"}
