"""Faults of disks: full, and what is damaged on them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints.checkpoint import CheckpointWriter
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.faults import records
from tests.faults.bench import EPOCHS, STEPS_PER_EPOCH, Bench, Launched, NotHereError, Outcome, step
from tests.faults.processes import AT, begin
from tests.faults.slowly import SLOWLY

if TYPE_CHECKING:
    from pathlib import Path

DISK_MB = 32
FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of a few MiB on a folder."""
    if os.geteuid() != 0:
        raise NotHereError("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise NotHereError(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free; return the file that takes them."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 12))
    return file


def _fill_for_good(folder: Path) -> Path:
    """Until also what was being written meanwhile has failed and given its bytes back."""
    filler = fill(folder)
    with filler.open("ab", buffering=0) as stream:
        for _ in range(30):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(1 << 12))
            time.sleep(0.01)
    return filler


def _last_said(launched: Launched) -> int:
    """The step of the last line on the terminal."""
    said = [line.split() for line in launched.output.splitlines() if "  step " in line]
    return int(said[-1][3].partition("/")[0]) if said else 0


def full_then_freed(bench: Bench) -> Outcome:
    with small_disk(bench.place("full-freed")) as disk:
        run = RunDir(disk / "run")
        launched = bench.launch(run.path, SLOWLY, f"train.epochs={2 * EPOCHS}")
        launched.until(lambda: step(run) >= AT, f"step {AT}")
        filler = _fill_for_good(disk)
        launched.until(lambda: "could not be written" in launched.output, "the disk was missed")
        launched.until(lambda: _last_said(launched) > step(run) + 3, "records had to wait")
        kept = checkpoints.load(run.last_checkpoint).step
        filler.unlink()
        output = launched.ends(0)
        assert "No space left on device" in output
        assert "training goes on" in output
        assert events(run, "checkpoint_failed"), "no checkpoint_failed event"
        later = [e["step"] for e in events(run, "checkpoint") if e["step"] > kept]
        assert later, "no checkpoint after the disk was freed"
        lost = records.went_on(run, bench.undisturbed(f"train.epochs={2 * EPOCHS}"), epochs=2 * EPOCHS)
        assert lost == 0
    return Outcome(
        happened=f"training went on; step {kept} stayed whole, the next was written when there was room; exit 0, the "
        "same bits, no line of metrics missing",
        steps_lost=lost,
    )


def full_to_the_end(bench: Bench) -> Outcome:
    with small_disk(bench.place("full")) as disk:
        run = RunDir(disk / "run")
        launched = bench.launch(run.path, SLOWLY)
        launched.until(lambda: step(run) >= AT, f"step {AT}")
        filler = _fill_for_good(disk)
        output = launched.ends(1)
        _honest(output)
        kept = checkpoints.load(run.last_checkpoint).step
        filler.unlink()
        bench.resume(run.path).ends(0)
        records.same_bits(run, bench.undisturbed())
    return Outcome(
        happened=f"exit 1 and why; step {kept} stayed whole; room made and resumed: the same bits",
        steps_lost=EPOCHS * STEPS_PER_EPOCH - kept,
    )


def full_when_stopped(bench: Bench) -> Outcome:
    with small_disk(bench.place("full-stopped")) as disk:
        run = RunDir(disk / "run")
        launched = bench.launch(run.path, SLOWLY)
        launched.until(lambda: step(run) >= AT, f"step {AT}")
        filler = _fill_for_good(disk)
        launched.process.terminate()
        output = launched.ends(75)
        _honest(output)
        kept = checkpoints.load(run.last_checkpoint).step
        done = _last_said(launched)
        filler.unlink()
        bench.resume(run.path).ends(0)
        records.same_bits(run, bench.undisturbed())
    return Outcome(
        happened=f"exit 75 and that step {kept} is what is kept; room made and resumed: the same bits",
        steps_lost=done - kept,
    )


def full_from_the_start(bench: Bench) -> Outcome:
    with small_disk(bench.place("full-start")) as disk:
        filler = fill(disk)
        launched = bench.launch(disk / "run")
        launched.process.wait(timeout=100)
        output = launched.output
        assert launched.process.returncode in (1, 2), output
        _honest(output)
        filler.unlink()
    return Outcome(happened=f"exit {launched.process.returncode} and why; nobody left")


def _honest(output: str) -> None:
    assert "No space left on device" in output, output
    assert "Traceback (most recent call last)" not in output, output


def damaged(bench: Bench) -> Outcome:
    """The newest checkpoint of a real run, damaged; the one before it is whole."""
    whole = bench.undisturbed()
    newest, before = sorted((int(f.name[5:]) for f in whole.checkpoints.glob("step-*")), reverse=True)[:2]
    chance = random.Random(bench.seed)  # noqa: S311  no secret
    passed = 0
    for how in (_truncate, _flip):
        for _ in range(bench.places):
            name = chance.choice(FILES)
            run = _copy(whole, bench.place("damaged") / "run")
            file = run.checkpoint(newest) / name
            data = file.read_bytes()
            file.unlink()  # it is the undisturbed run's, too
            file.write_bytes(data)
            size = len(data)
            at = chance.randrange(size)
            how(file, at)
            CheckpointWriter(run, keep=2, on_written=_nothing, on_failed=_nothing, on_done=_nothing)  # as a start does
            found = checkpoints.load_newest(run)
            where = f"{how.__name__} {name} at {at} of {size}"
            rejected = events(run, "checkpoint_rejected")[-1:]
            if name == "manifest.json" and not rejected:  # the changed byte was one that means nothing
                assert records.identical(found.model, checkpoints.load(whole.checkpoint(newest)).model), where
            else:
                assert found.step == before, where
                assert str(run.checkpoint(newest)) in rejected[0]["message"], where
                passed += 1
            shutil.rmtree(run.path.parent)
    lost = _resume_damaged(bench, chance)
    return Outcome(
        happened=f"{passed} of {2 * bench.places} times passed over with an event that says which file, the others did "
        "no harm; a run went on from the one before: the same bits",
        steps_lost=lost,
    )


def _resume_damaged(bench: Bench, chance: random.Random) -> int:
    launched, run = begin(bench, "damaged-resumed")
    launched.process.terminate()
    launched.ends(75)
    file = run.last_checkpoint / "model.safetensors"
    _flip(file, chance.randrange(file.stat().st_size))
    output = bench.resume(run.path).ends(0)
    assert events(run, "checkpoint_rejected"), output
    records.same_bits(run, bench.undisturbed())
    (lost,) = records.every_sample_once(run, epochs=EPOCHS).lost
    assert 0 < lost <= 3
    return lost


def _copy(whole: RunDir, to: Path) -> RunDir:
    run = RunDir(to)
    run.create()
    shutil.copytree(whole.checkpoints, run.checkpoints, symlinks=True, dirs_exist_ok=True, copy_function=os.link)
    return run


def _nothing(*_: object) -> None:
    pass


def _truncate(file: Path, at: int) -> None:
    os.truncate(file, at)


def _flip(file: Path, at: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 0xFF]))
