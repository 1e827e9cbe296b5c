"""What the loss of power at any point leaves of checkpoints and of a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints.checkpoint import CheckpointWriter
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.faults import power_loss, records
from tests.faults.bench import RECIPE, ROOT, Bench, Outcome, step
from tests.faults.processes import begin

WRITER = """
import os, sys, torch
from launcher.engine.checkpoints.checkpoint import Checkpoint, CheckpointWriter
from launcher.runs.run_dir import RunDir

told = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
tell = lambda step, seconds, size_mb, best: os.write(told, f"{step} {best}".encode())
done = lambda checkpoint: None
fail = lambda step, problem: os.write(2, problem.encode())
writer = CheckpointWriter(RunDir(sys.argv[1]), keep=1, on_written=tell, on_failed=fail, on_done=done)
for step, best, mark in ((1, 1, 0), (2, 1, 0), (3, 3, 0), (4, 3, 0), (4, 3, 0.5), (5, 5, 0)):
    value, state = torch.full((40,), step + mark), {"step": step, "best": best}
    checkpoint = Checkpoint(step=step, model={"w": value}, optimizer={"m": value}, state=state)
    writer.save(checkpoint, best=best == step)
    writer.wait()
"""
NUM_WRITTEN = 6


def of_checkpoints(bench: Bench) -> Outcome:
    place = bench.place("power-loss")
    run, told, log = RunDir(place / "run"), place / "told", place / "calls"
    run.create()
    power_loss.record(WRITER, str(run.path), str(told), log=log)
    found = list(power_loss.calls(log, run.checkpoints, told))
    assert sum(call.name == "told" for call in found) == NUM_WRITTEN
    _check_model(found, run)
    points, seen = 0, set()
    for number, disk, words in power_loss.every_point(found, run.checkpoints):
        points += 1
        for keeps in power_loss.KEEPS:
            for seed in range(bench.chances if keeps in ("some names", "first names") else 1):
                tree = disk.after_loss(keeps, random.Random(f"{bench.seed} {number} {seed}"))  # noqa: S311  no secret
                key = (frozenset(tree.items()), *words)
                if key in seen:
                    continue
                seen.add(key)
                after = RunDir(place / "after")
                power_loss.write(tree, after.checkpoints)
                call = found[number - 1] if number else None
                where = f"{number} calls done, the last {call}; the disk kept {keeps} (chance {seed})"
                _check_checkpoints(after, words, where, go_on=len(seen) % 9 == 0)
                shutil.rmtree(after.path)
    return Outcome(
        happened=f"at {points} points of {NUM_WRITTEN} checkpoints, {len(seen)} different disks: each time the newest "
        "that was reported or a newer one was whole, best and last led to one, and after a resume to the right one"
    )


def _check_model(found: list[power_loss.Call], run: RunDir) -> None:
    """Assert that the record holds every call: replayed, it comes to what is really there."""
    disk = power_loss.Disk(run.checkpoints)
    for call in found:
        if call.name != "told":
            disk.do(call)
    real = {
        file.relative_to(run.checkpoints): str(file.readlink())
        if file.is_symlink()
        else (file.read_bytes() if file.is_file() else None)
        for file in run.checkpoints.rglob("*")
        if file.relative_to(run.checkpoints).parts[0] not in ("last", "best") or file.is_symlink()
    }
    assert disk.now() == real, "the record of system calls is not whole"


def _check_checkpoints(run: RunDir, words: list[str], where: str, *, go_on: bool) -> None:
    """Assert what holds of checkpoints when the power is back and the next attempt begins."""
    reported = [(int(step), best == "True") for step, best in (word.split() for word in words)]
    writer = CheckpointWriter(run, keep=1, on_written=_nothing, on_failed=_nothing, on_done=_nothing)
    newest = checkpoints.load_newest(run)
    at_least = max((step for step, _ in reported), default=0)
    assert (newest.step if newest else 0) >= at_least, (
        f"{where}: {newest and newest.step}, though {at_least} was written"
    )
    if newest:
        values = set(newest.model["w"].tolist()) | set(newest.optimizer["m"].tolist())
        assert len(values) == 1, f"{where}: a mixture: {values}"
        assert int(values.pop()) == newest.step == newest.state["step"], where
    best = max((step for step, is_best in reported if is_best), default=0)
    for link, least in ((run.last_checkpoint, at_least), (run.best_checkpoint, best)):
        if least:
            assert link.exists(), f"{where}: {link.name} leads nowhere"
            assert checkpoints.load(link).step >= least, f"{where}: {link.name}"
    if newest:
        writer.go_on(newest.step, best=newest.state["best"])
        found = [checkpoints.load(link).step for link in (run.last_checkpoint, run.best_checkpoint)]
        assert found == [newest.step, newest.state["best"]], f"{where}: last and best are {found}"
    if go_on and newest:
        later = checkpoints.Checkpoint(step=9, model=newest.model, optimizer=newest.optimizer, state={"step": 9})
        writer.save(later, best=True)
        writer.wait()
        left = {path.name for path in run.checkpoints.iterdir()}
        assert left == {"last", "best", "step-00000009"}, f"{where}: {left}"


def _nothing(*_: object) -> None:
    pass


def of_a_run(bench: Bench) -> Outcome:
    """The plan and the recipe of a run, from the moment that its workers start."""
    place = bench.place("power-loss-run")
    above, log = place / "runs", place / "calls"
    above.mkdir()
    run = RunDir(above / "run")
    _start_and_kill(bench, run, power_loss.recording(log))
    found = [call for call in power_loss.calls(log, above, place / "none") if "checkpoints/" not in str(call.arguments)]
    start = next(
        n for n, call in enumerate(found) if call.name == "write" and b'"attempt_started"' in call.arguments[1]
    )
    disks = 0
    for number, disk, _ in power_loss.every_point(found, above):
        if number <= start:
            continue
        for keeps in power_loss.KEEPS:
            disks += 1
            after = place / "after"
            power_loss.write(disk.after_loss(keeps, random.Random(f"{bench.seed} {number}")), after)  # noqa: S311
            again = RunDir(after / "run")
            where = f"{number} calls done, the disk kept {keeps}"
            assert again.exists, f"{where}: there is no run"
            assert again.recipe.read_bytes() == run.recipe.read_bytes(), f"{where}: the recipe is another"
            assert json.loads(again.plan.read_bytes() or b"{}").get("run_id") == run.run_id, (
                f"{where}: the plan is another"
            )
            assert again.bad_images.read_bytes() == run.bad_images.read_bytes(), f"{where}: who is left out is another"
            again.read_status()
            list(events(again, "attempt_started"))
            shutil.rmtree(after)
    lost = _files_gone(bench)
    return Outcome(
        happened=f"of {disks} disks each has recipe and plan; a run with its status and bad_images.json empty and the "
        "ends of its records zeros went on: the same bits",
        steps_lost=lost,
    )


def _start_and_kill(bench: Bench, run: RunDir, prefix: list[str]) -> None:
    """Start a run whose calls are recorded; end it when it trains."""
    arguments = [str(RECIPE), f"data.path={bench.photos}", "--run-dir", str(run.path)]
    with (run.path.parent.parent / "output").open("w") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "launcher", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=bench.folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while not events(run, "first_step"):
        assert process.poll() is None, (run.path.parent.parent / "output").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _files_gone(bench: Bench) -> int:
    """Kill a run and leave of its unsynced files what a disk may leave; it must go on."""
    launched, run = begin(bench, "power-loss-files")
    launched.signal(signal.SIGKILL)
    assert launched.leaves_nobody()
    at = step(run)
    for file in (run.status, run.bad_images):
        file.write_bytes(b"")
    for file in (run.events, run.metrics):
        content = file.read_bytes()
        file.write_bytes(content[:-50] + bytes(50))
    bench.resume(run.path).ends(0)
    assert run.read_status()["state"] == "completed"
    records.same_bits(run, bench.undisturbed())
    return max(0, at - events(run, "resumed")[-1]["step"])
