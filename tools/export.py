"""Exports a run's best checkpoint; a file gets its name in exports/ when it was measured against it and accepted.

``python -m launcher.tools.export RUN`` is what ``launch export RUN`` and the post-step of training run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
import traceback
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import torch

from launcher.engine.augmenting import sample_batch
from launcher.engine.device import cpu_name, num_cores
from launcher.errors import EXIT_OK, LaunchError, TrainingError, UsageError, exit_code_of
from launcher.runs.run_dir import RunDir
from launcher.system import console, phases
from launcher.system import cpu as host_cpu
from launcher.tools import baked, calibrate, evaluate, formats, latency, onnx_model, probe, publish, quantize
from launcher.tools.gate import REFERENCE, Answers, doubt
from launcher.tools.quantize import Ladder, first_line
from launcher.tracking import trackers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from launcher.recipe.schema import LaunchConfig
    from launcher.tools.evaluate import Predictor
    from launcher.tools.formats import Say

    Json = dict[str, Any]

FILES = {name: row.file for name, row in formats.FORMATS.items()} | quantize.FILES
"""Names in exports/, by format."""
TOLD_S = 0.5
"""The time of a phase that takes less than so many seconds is not told."""
UPLOAD_S = 600.0
"""Seconds that sending the exports to a tracking server may take."""
NO_CALIBRATION = "calibration needs training images"


def export_run(
    run: RunDir,
    data_path: str | None = None,
    names: Sequence[str] | None = None,
    *,
    qat_steps: int | None = None,
    terminal: int = 1,
) -> None:
    """Make and measure what the recipe's ``post`` names; write ``exports/manifest.json``.

    Without the images nothing is measured, so nothing is accepted, and int8, which needs calibration, is not made.

    Args:
        run: the run directory.
        data_path: folder with the images; None: where the run had them.
        names: of formats; None: those of the recipe.
        qat_steps: instead of the recipe's ``post.qat_steps``.
        terminal: descriptor by which the person who waits is told what is being done.

    Raises:
        UsageError: the run has no best checkpoint, or ``data_path`` holds no such images.
        CheckpointError: no checkpoint of it is whole.
        TrainingError: nothing could be made, or nothing that was made now was accepted.
    """
    with _noise_to(run.post_log, terminal) as say:
        phases.at("reading the best checkpoint")
        best = evaluate.load_best(run, data_path, warn=say)
        if qat_steps is not None:
            best = replace(best, recipe=replace(best.recipe, post=replace(best.recipe.post, qat_steps=qat_steps)))
        missing = best.missing("val")
        if missing and data_path is not None:
            raise UsageError(f"data.path={data_path}: {missing}")
        if missing:
            say(f"not measured: {missing}; where they are now: launch export {run} data.path=FOLDER")
        torch.set_num_threads(num_threads(best.recipe.launch))
        run.exports.mkdir(exist_ok=True)
        best, calibration = calibrate.apply(run, best, missing, say)
        publish.remove_abandoned(run)
        with publish.workplace(run) as folder:
            making = _Making(run, best, folder, Answers(best, missing), say, data_path, names)
            post = best.recipe.post
            usual = [*post.export, *[formats.BAKED] * post.bake_preprocessing, *post.quantize]
            wanted = usual if names is None else list(names)
            manifest = making.make(wanted) | {"calibration": calibration}
            made, not_made = list(manifest["exports"]), list(manifest["not_made"])
            for name in publish.publish(run, folder, manifest, list(FILES.values())):
                say(f"{name}: removed: its probabilities have another temperature than those of the new files")
        phases.at("drawing a sample batch")
        _draw_sample_batch(run, best)
        phases.end()
        trackers.send_once(run, best.recipe, say=say, timeout_s=UPLOAD_S)
        if not missing and made and not any(row["accepted"] for row in made):
            raise TrainingError(f"no export was accepted, so none was kept: {_reasons(made)}")
        if not_made and not made:
            raise TrainingError(f"no export could be made: {_reasons(not_made)}")


def _draw_sample_batch(run: RunDir, best: evaluate.BestModel) -> None:
    """For the report; what stands in the way of it costs nothing else."""
    if run.sample_batch.exists() or best.missing("train"):
        return
    try:
        sample_batch.write(run, best.recipe, best.preprocessing, best.left_out)
    except Exception:  # an image that is gone, a transform of the user's own, a full disk
        traceback.print_exc()  # to the log


def _reasons(rows: Sequence[Json]) -> str:
    return "; ".join(f"{row['file']}: {row['reason']}" for row in rows)


class _Making:
    """Makes the files of one export in a folder, and says what they measure.

    Args:
        run: the run directory.
        best: its checkpoint.
        folder: where files are made.
        answers: what models say of the validation images.
        say: tells the user a line.
        data_path: folder with the images, where one was given.
        names: of formats, where some were given: each quantized one is wanted; else the first that is accepted.
    """

    def __init__(
        self,
        run: RunDir,
        best: evaluate.BestModel,
        folder: Path,
        answers: Answers,
        say: Say,
        data_path: str | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._run = run
        self._best = best
        self._folder = folder
        self._answers = answers
        self._say = say
        self._each = names is not None
        where = [] if data_path is None else [f"data.path={data_path}"]
        self._command = ["launch", "export", str(run), *(f"--format={name}" for name in names or ()), *where]
        self._start = time.monotonic()
        self._threads = torch.get_num_threads()
        self._predictors: dict[str, Predictor] = {REFERENCE: best.module}
        self._not_made: list[Json] = []

    def make(self, names: Sequence[str]) -> Json:
        """The manifest, whose files lie in the folder."""
        quantized = [name for name in names if name in quantize.FILES]
        plain = [name for name in names if name in formats.FORMATS]
        rows = [row for name in plain if (row := self._export(name))]
        ladder = self._quantize(quantized, rows)
        accepted = [row for row in ladder if row["accepted"]]
        judged = {row["format"]: row for row in ladder if row["is_made"]}
        failed = {row["format"]: row["reason"] for row in ladder if row["format"] not in judged}
        self._not_made += [_not_made(name, reason) for name, reason in failed.items()]
        rows += [dict(row) for row in judged.values() if self._each or row["accepted"] or not accepted]
        return self._manifest(rows, ladder)

    def _export(self, name: str) -> Json | None:
        """What a format measures; None: it cannot be made."""
        row = formats.FORMATS[name]
        phases.at(f"making {row.file}{f' ({row.deprecated})' if row.deprecated else ''}")
        file = self._folder / row.file
        try:
            row.write(file, self._best)
            reason, measured = self._judge(name, file)
        except LaunchError:  # of the run or its images: it says what to do
            raise
        except Exception as error:  # whatever a library raises of a network that it cannot write, or of no compiler
            self._failed(name, error)
            return None
        return {"file": row.file, "format": name, "quantization": None} | measured | self._accepted(reason)

    def _accepted(self, reason: str | None) -> Json:
        why = f"not measured: {self._answers.missing}" if self._answers.missing else reason
        return {"reason": why, "accepted": why is None}

    def _judge(self, name: str, file: Path) -> tuple[str | None, Json]:
        """Why a file is not accepted (None: it is, or nothing can be measured), and what it measures."""
        self._answers.ask_checkpoint()
        phases.at(f"measuring {file.name}")
        predictor = formats.open_export(name, file, self._best, threads=self._threads, warn=self._say)
        self._predictors[name] = predictor
        if is_baked := name == formats.BAKED:  # it is asked about the images themselves
            session = onnx_model.open_session(file, threads=self._threads, warn=self._say)
            predictor = baked.OfFiles(session, self._best)
        self._answers.ask(name, predictor)
        found = self._answers.compare(name)
        if is_baked:
            found["max_logit_diff"] = None  # it has none
        is_rounded, post = is_baked or name in quantize.FILES, self._best.recipe.post
        found["doubt"] = doubt(found, post, num=self._answers.num) if is_rounded and not self._answers.missing else None
        return self._answers.verdict(found, is_quantized=is_rounded), found

    def _quantize(self, names: Sequence[str], rows: Sequence[Json]) -> list[Json]:
        """A row for each way that was tried."""
        uncalibrated = self._best.missing("train")
        without = [name for name in names if uncalibrated and name in quantize.CALIBRATED]
        for name in without:
            self._skip(name, f"{NO_CALIBRATION}: {uncalibrated}")
        names = [name for name in names if name not in without]
        source = self._folder / FILES["onnx"]
        refused = [row["reason"] for row in rows if row["format"] == "onnx" and not row["accepted"]]
        if refused and not self._answers.missing:
            for name in names:
                self._skip(name, f"it is made from {source.name}, which is not accepted: {refused[0]}")
            return []
        if not names:
            return []
        try:
            if not source.exists():
                phases.at(f"making {source.name}")
                formats.write_onnx(source, self._best)
        except Exception as error:  # as for any format
            traceback.print_exc()
            for name in names:
                self._skip(name, f"it is made from {source.name}, which cannot be made: {first_line(error)}")
            return []
        ladder = Ladder(source=source, folder=self._folder, best=self._best, threads=self._threads)
        tried = []
        for wanted in [[name] for name in names] if self._each else [names]:
            tried += ladder.climb(wanted, self._judge, self._say)[1]
        ladder.offer(tried, self._command, self._say)
        for row in tried:
            file = self._folder / row["file"]
            row["quantization"] = onnx_model.read_quantization(file) if row["accepted"] else None
            row.update(self._accepted(row["reason"]))
        return tried

    def _skip(self, name: str, reason: str) -> None:
        self._say(f"{FILES[name]}: not made: {reason}")
        self._not_made.append(_not_made(name, reason))

    def _failed(self, name: str, error: Exception) -> None:
        traceback.print_exc()  # to the log
        (self._folder / FILES[name]).unlink(missing_ok=True)
        self._skip(name, f"cannot be made: {first_line(error)}")

    def _manifest(self, rows: list[Json], ladder: list[Json]) -> Json:
        """What each file measured; times of those that are kept, and of the checkpoint."""
        files = {row["format"]: self._folder / row["file"] for row in rows}
        timed = {name: self._predictors[name] for name in (REFERENCE, *files) if name in self._predictors}
        size, channels = self._best.preprocessing.image_size, self._best.preprocessing.channels
        phases.at("timing one image at a time")
        times = latency.measure(timed, size, channels)
        phases.at("timing batches")
        rates = latency.throughput({name: found for name, found in timed.items() if name != REFERENCE}, size, channels)
        for row in rows:
            name, file = row["format"], files[row["format"]]
            row["size_mb"] = evaluate.size_mb(file) if file.exists() else None
            row.update(times.get(name, {}), **rates.get(name, {}))
            is_program = name not in formats.FORMATS or not formats.FORMATS[name].is_weights
            if file.exists() and is_program:
                phases.at(f"measuring the memory of {file.name}")
                row.update(probe.measure(file, threads=self._threads, image_size=size, channels=channels))
            self._run.append_event(
                "export", **{k: row.get(k) for k in ("file", "top1", "agreement", "accepted", "reason")}
            )
        best, state = self._best, self._best.state
        return {
            "run_id": self._run.run_id,
            "checkpoint": publish.checkpoint_of(state),
            "classes": best.classes,
            "preprocessing": best.preprocessing.describe(),
            "val_samples": self._answers.num,
            "not_measured": self._answers.missing,
            "latency_threads": self._threads,
            "cpu": {"name": cpu_name(), "saturates_int8": host_cpu.saturates_int8()},
            "reference": {
                "format": "pytorch",
                **self._answers.measured(REFERENCE),
                "size_mb": evaluate.size_mb(best.folder / "model.safetensors"),
                "throughput_images_per_s": self._answers.images_per_s(REFERENCE),
                "throughput_batch": evaluate.BATCH_SIZE,
                **times[REFERENCE],
            },
            "exports": rows,
            "ladder": ladder,
            "not_made": self._not_made,
            "seconds": time.monotonic() - self._start,
        }


def _not_made(name: str, reason: str) -> Json:
    return {"file": FILES[name], "format": name, "reason": reason}


@contextlib.contextmanager
def _noise_to(log: Path, terminal: int = 1) -> Iterator[Say]:
    """Send what libraries print, C libraries' too, to a log: the user can do nothing about it.

    Yields:
        A function that writes a line to the terminal and to the log; phases are told there, too.
    """
    log.parent.mkdir(exist_ok=True)
    _flush()
    with log.open("a", encoding="utf-8") as file, console.opened(os.dup(terminal)) as stream:
        saved = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with phases.told_by(phases.Line(stream, told_s=TOLD_S)):
                yield functools.partial(_say, stream, file)
        finally:
            _flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _say(terminal: IO[str], log: IO[str], line: str) -> None:
    for stream in (terminal, log):
        print(line, file=stream, flush=True)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def num_threads(config: LaunchConfig) -> int:
    """CPU threads of the exports: ``launch.threads``, else OMP_NUM_THREADS, else all cores."""
    if config.threads != "auto":
        return config.threads
    said = os.environ.get("OMP_NUM_THREADS", "")
    return (int(said) if said.isdigit() else 0) or num_cores()


def main(argv: Sequence[str] | None = None) -> int:
    """Export the run that is named."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.export", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN")
    export_run(RunDir.existing(parser.parse_args(argv).run_dir))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
