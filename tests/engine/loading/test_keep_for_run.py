"""data.cache of a run: the supervisor has the pixels kept before its workers begin, or says why not."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from launcher.engine.loading import keep_pixels, kept_pixels
from launcher.engine.loading.data_sets import open_data_sets
from launcher.errors import InterruptedRunError
from launcher.node import pixels
from launcher.system import processes
from launcher.system.files import read_jsonl


@pytest.fixture(autouse=True)
def no_margin(monkeypatch):
    """A few small images fit wherever there is any room: how full this machine's disk is shall not matter."""
    monkeypatch.setattr(keep_pixels, "MOST_MARGIN", 0)


@pytest.fixture
def run(make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(kept_pixels.FOLDER_VARIABLE, "of an earlier run")
    return make_run(data={"cache": "disk", "augment": "standard"})


def test_what_is_kept_is_used_by_all_that_open_the_runs_images(run, tmp_path, capfd):
    pixels.keep(run, lambda: None)
    assert os.environ[kept_pixels.FOLDER_VARIABLE] == str(tmp_path / "cache" / "pixels")
    sets = open_data_sets(run)
    assert all(samples._kept is not None for samples in (sets.train, sets.val))
    assert "37 images of train are decoded and kept" in capfd.readouterr().err
    events = [event for event in read_jsonl(run.events) if event["kind"] == "pixels_kept"]
    assert [(event["split"], event["images"]) for event in events] == [("train", 37), ("val", 23)]


def test_without_room_a_line_says_so_and_the_run_goes_on_without(run, tmp_path, capfd):
    """On a disk of its own, which is full."""
    disk = tmp_path / "cache"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("cannot mount")
    try:
        pixels.keep(run, lambda: None)
        assert kept_pixels.FOLDER_VARIABLE not in os.environ
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 2
        assert all(line.startswith("data.cache=disk: ") and line.endswith("goes on without") for line in lines)
        assert all(samples._kept is None for samples in (open_data_sets(run).train, open_data_sets(run).val))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_stop_ends_all_processes_that_decode(run, monkeypatch):
    monkeypatch.setattr(kept_pixels.Keeping, "make", lambda *_: time.sleep(1000))
    before, calls = {*processes.descendants(os.getpid())}, []  # what other tests keep warm

    def own():
        return {*processes.descendants(os.getpid())} - before

    def heed():
        calls.append(len(own()))
        if calls[-1] > 1:
            raise InterruptedRunError("stop")

    with pytest.raises(InterruptedRunError):
        pixels.keep(run, heed)
    deadline = time.monotonic() + 60
    while own() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert own() == set()
    assert kept_pixels.FOLDER_VARIABLE not in os.environ
