"""Faults of data and of numbers; and a tracker that cannot be reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.schedule import epoch_order
from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.faults import records
from tests.faults.bench import EPOCHS, NUM_TRAIN, SIZE, STEPS_PER_EPOCH, Bench, Outcome, step
from tests.faults.processes import AT
from tests.faults.slowly import SLOWLY

AT_STEP = 7
NAN_EPOCHS = "train.epochs=2"
SPOILT = f"model.factory={Path(__file__).with_name('spoilt.py')}:Spoilt"


def _photos(bench: Bench, name: str) -> tuple[RunDir, Path, Path]:
    """A run to be, images of its own, and the one that is the first of a step in the first epoch."""
    place = bench.place(name)
    photos = shutil.copytree(bench.photos, place / "photos")
    position = AT_STEP * (NUM_TRAIN // STEPS_PER_EPOCH + 1)
    images = sorted((photos / "train").rglob("*.png"))
    return RunDir(place / "run"), photos, images[epoch_order(0, 0, NUM_TRAIN)[position]]


def corrupt_before(bench: Bench) -> Outcome:
    run, photos, image = _photos(bench, "corrupt-before")
    image.write_bytes(image.read_bytes()[:100])
    output = bench.launch(run.path, photos=photos).ends(2)
    assert str(image.relative_to(photos)) in output, output
    assert not run.path.exists(), "something was written"
    return Outcome(happened="exit 2 with its path; nothing was written or started")


def corrupt_quarantined(bench: Bench) -> Outcome:
    run, photos, image = _photos(bench, "corrupt-quarantined")
    image.write_bytes(image.read_bytes()[:100])
    bench.launch(run.path, "data.on_bad_image=quarantine", photos=photos).ends(0)
    listed = json.loads(run.bad_images.read_text())["images"]
    assert [entry["path"] for entry in listed] == [str(image.relative_to(photos))]
    records.every_sample_once(run, epochs=EPOCHS, left_out=1)
    return Outcome(happened=f"left out and listed; each of the other {NUM_TRAIN - 1} used once in every epoch")


def corrupt_during(bench: Bench) -> Outcome:
    run, photos, image = _photos(bench, "corrupt-during")
    launched = bench.launch(run.path, SLOWLY, photos=photos)
    launched.until(lambda: step(run) >= AT, f"step {AT}")
    good = image.read_bytes()
    image.write_bytes(good[:100])
    output = launched.ends(1)
    assert str(image) in output, output
    assert "Traceback (most recent call last)" not in output
    assert [e["attempt"] for e in events(run, "attempt_started")] == [1], "was tried again, in vain"
    kept = checkpoints.load_newest(run)
    assert kept is not None
    assert step(run) >= kept.step
    image.write_bytes(good)
    bench.resume(run.path).ends(0)
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(
        happened="exit 1 with its path, no restart in vain; mended and resumed: the same bits", steps_lost=lost
    )


def _spoilt_photos(bench: Bench, name: str) -> tuple[RunDir, Path, Path]:
    run, photos, image = _photos(bench, name)
    Image.new("RGB", (SIZE, SIZE), "white").save(image)
    return run, photos, image


def nan_stop(bench: Bench) -> Outcome:
    run, photos, image = _spoilt_photos(bench, "nan-stop")
    output = bench.launch(run.path, NAN_EPOCHS, SPOILT, photos=photos).ends(1)
    (event,) = events(run, "non_finite")
    assert event["step"] == AT_STEP + 1
    assert f"in step {event['step']}" in output
    logs = [run.rank_log(1, rank).read_text() for rank in (0, 1)]
    assert sum(str(image) in log for log in logs) == 1, "not exactly one rank names the image"
    kept = checkpoints.load_newest(run)
    assert kept is not None
    assert kept.step <= AT_STEP
    assert all(tensor.isfinite().all() for tensor in kept.model.values())
    return Outcome(happened=f"exit 1 at step {event['step']} on both ranks; the log of one names its images")


def _nan_skipped(bench: Bench) -> tuple[RunDir, int]:
    """The run that leaves such steps out, made once, and how many it left out."""
    _, photos, _ = _spoilt_photos(bench, "nan-skip")
    run = bench.undisturbed(NAN_EPOCHS, SPOILT, "train.on_nan=skip", photos=photos)
    skipped = [e["step"] for e in events(run, "non_finite")]
    assert len(skipped) == 2, "the image comes once in each of two epochs"
    assert all(t.isfinite().all() for t in checkpoints.load(run.last_checkpoint).model.values())
    return run, len(skipped)


def nan_skip(bench: Bench) -> Outcome:
    _, num = _nan_skipped(bench)
    return Outcome(happened=f"{num} steps without effect, told with their images; exit 0, finite weights", steps_lost=0)


def nan_rollback(bench: Bench) -> Outcome:
    skipped, _ = _nan_skipped(bench)
    run, photos, _ = _spoilt_photos(bench, "nan-rollback")
    bench.launch(run.path, NAN_EPOCHS, SPOILT, "train.on_nan=rollback", photos=photos).ends(0)
    back = events(run, "rolled_back")
    assert [e["skipped"] for e in back] == [e["step"] for e in events(skipped, "non_finite")]
    for ours, theirs in (
        (run.last_checkpoint, skipped.last_checkpoint),
        (run.best_checkpoint, skipped.best_checkpoint),
    ):
        found, expected = checkpoints.load(ours), checkpoints.load(theirs)
        assert found.step == expected.step
        assert records.identical(found.model, expected.model), "the weights are others"
        assert records.identical(found.optimizer, expected.optimizer), "the optimizer's state is another"
    lost = sum(records.read(run).lost)
    return Outcome(happened=f"{len(back)} times back; the bits of a run that left the same steps out", steps_lost=lost)


def wandb_down(bench: Bench) -> Outcome:
    run = RunDir(bench.place("tracked") / "run")
    # Port 9 discards; nothing listens there. The key has the form of one.
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    output = bench.launch(run.path, "tracking.wandb.mode=online", env=env).ends(0)
    warnings = [line for line in output.splitlines() if "wandb" in line and "sending the rest" not in line]
    assert len(warnings) == 1, warnings
    assert list(run.path.glob("wandb/offline-run-*/*.wandb")), "there is no offline record"
    assert "wandb sync" in run.report_html.read_text()
    assert "0" * 40 not in "".join(f.read_text() for f in (run.plan, run.events, run.recipe))
    lost = records.went_on(run, bench.undisturbed(), epochs=EPOCHS)
    return Outcome(
        happened="a line on the terminal, an offline record, `wandb sync` in the report; exit 0, the same bits",
        steps_lost=lost,
    )
