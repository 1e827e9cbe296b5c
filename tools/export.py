"""Exports a run's best checkpoint, and measures each export against it before calling it accepted.

``python -m launcher.tools.export RUN`` is what ``launch export RUN`` and the post-step of training run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.device import cpu_name, num_cores
from launcher.errors import EXIT_OK, UsageError, exit_code_of
from launcher.runs.run_dir import RunDir
from launcher.system import cpu as host_cpu
from launcher.system.files import write_json_atomic
from launcher.tools import evaluate, latency, onnx_model
from launcher.tools.calibrate import calibrate
from launcher.tools.gate import REFERENCE, Answers
from launcher.tools.quantize import quantize_onnx
from launcher.tracking import wandb as tracking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.recipe.schema import LaunchConfig
    from launcher.tools.evaluate import BestModel, Predictor

    Say = Callable[[str], None]
    """Tells the person at the terminal a line."""

FILES = {"onnx": "model.onnx", "torchscript": "model.ts", "onnx_int8": "model.int8.onnx"}
NO_CALIBRATION = "calibration needs training images"
LARGE_BYTES = 1.9e9
"""Above this, ONNX keeps weights beside the model: a protobuf holds at most 2 GB."""


def export_run(run: RunDir, data_path: str | None = None) -> None:
    """Make and measure what the recipe's ``post`` names; write ``exports/manifest.json``.

    Without the images nothing is measured, so nothing is accepted, and int8, which needs calibration, is not made.

    Args:
        run: the run directory.
        data_path: folder with the images; None: where the run had them.

    Raises:
        UsageError: the run has no best checkpoint, or ``data_path`` holds no such images.
        CheckpointError: it is damaged.
    """
    with _noise_to(run.post_log) as say:
        _export_run(run, data_path, say)


def _export_run(run: RunDir, data_path: str | None, say: Say) -> None:
    best = evaluate.load_best(run, data_path)
    torch.set_num_threads(num_threads(best.recipe.launch))
    missing, uncalibrated = best.missing("val"), best.missing("train")
    if missing and data_path is not None:
        raise UsageError(f"data.path={data_path}: {missing}")
    if missing:
        say(f"not measured: {missing}; where they are now: launch export {run} data.path=FOLDER")
    run.exports.mkdir(exist_ok=True)
    best, calibration = _calibrate(best, missing, say)
    post = best.recipe.post
    not_made: list[str] = [*post.quantize] if uncalibrated else []
    for name in not_made:
        say(f"{FILES[name]}: not made: {NO_CALIBRATION}: {uncalibrated}")
    formats: list[str] = [*post.export, *([] if uncalibrated else post.quantize)]
    files: dict[str, Path] = {name: run.exports / FILES[name] for name in formats}
    answers = Answers(best, missing)
    with tempfile.TemporaryDirectory(dir=run.exports, prefix=".export-") as folder:
        for name in formats:
            say(f"making {FILES[name]}")
            made = Path(folder) / FILES[name]
            _make(name, made, best, answers, say)
        # all at once: every file in exports/ is then whole and of one checkpoint
        for made in Path(folder).iterdir():
            shutil.move(made, run.exports / made.name)
    say("measuring")
    manifest = _measure(run, best, files, answers, say)
    kept = _made_before(run, not_made, manifest["checkpoint"])
    manifest["not_made"] = [
        {"file": FILES[name], "format": name, "reason": f"{NO_CALIBRATION}: {uncalibrated}"}
        for name in not_made
        if name not in [row["format"] for row in kept]
    ]
    for row in manifest["exports"]:
        run.append_event("export", **{key: row[key] for key in ("file", "top1", "agreement", "accepted", "reason")})
        numbers = "" if missing else f"top1 {row['top1']:.4f}, agreement {row['agreement']:.4f}, "
        say(f"{row['file']}: {numbers}accepted {row['accepted']}{f' ({missing})' if missing else ''}")
    manifest["exports"] += kept
    manifest["calibration"] = calibration
    write_json_atomic(run.export_manifest, manifest)
    tracking.log_exports(run, warn=say)


def _calibrate(best: BestModel, missing: str | None, say: Say) -> tuple[BestModel, dict[str, Any] | None]:
    """The model with the temperature that ``post.calibrate`` asks for, and what there is to say of it."""
    if best.recipe.post.calibrate == "none" or missing:
        return best, None
    found = calibrate(best)
    say(
        f"temperature {found['temperature']:.3f}: calibration error {found['ece_before']:.4f} before and "
        f"{found['ece_after']:.4f} after, on the {found['images']} validation images that it was fitted on"
    )
    return replace(best, temperature=found["temperature"]), found


@contextlib.contextmanager
def _noise_to(log: Path) -> Iterator[Say]:
    """Send what libraries print, C libraries' too, to a log: the user can do nothing about it.

    Yields:
        A function that writes a line to the former standard output.
    """
    log.parent.mkdir(exist_ok=True)
    _flush()
    with log.open("a", encoding="utf-8") as file, os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        saved = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda line: print(line, file=terminal, flush=True)
        finally:
            _flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def num_threads(config: LaunchConfig) -> int:
    """CPU threads of the exports: ``launch.threads``, else OMP_NUM_THREADS, else all cores."""
    if config.threads != "auto":
        return config.threads
    said = os.environ.get("OMP_NUM_THREADS", "")
    return (int(said) if said.isdigit() else 0) or num_cores()


def _made_before(run: RunDir, names: Sequence[str], checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """An earlier export's rows for files that are not made now; files of another checkpoint are removed."""
    try:
        before = json.loads(run.export_manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {"exports": [], "checkpoint": None}
    same = before["exports"] if before["checkpoint"] == checkpoint else []
    rows = [row for row in same if row["format"] in names and (run.exports / row["file"]).is_file()]
    for name in set(names) - {row["format"] for row in rows}:
        (run.exports / FILES[name]).unlink(missing_ok=True)
    return rows


def _make(name: str, target: Path, best: BestModel, answers: Answers, say: Say) -> None:
    if name == "onnx":
        export_onnx(target, best)
    elif name == "torchscript":
        export_torchscript(target, best)
    else:
        quantize_onnx(
            target.with_name(FILES["onnx"]),
            target,
            best,
            lambda path: answers.try_out(name, _predictor(name, path, say), is_quantized=True),
        )


def export_onnx(target: Path, best: BestModel) -> None:
    """Write ONNX: ``images`` (float32 N x 3 x S x S, normalised, any N) to ``logits`` (float32 N x C).

    The metadata hold ``classes``, ``preprocessing`` and ``independent`` as JSON.
    """
    import onnx

    example = _example(best)
    size = sum(p.numel() * p.element_size() for p in best.module.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations: the user can do nothing about them
        torch.onnx.export(
            best.module,
            (example,),
            target,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=size > LARGE_BYTES,
            verbose=False,
        )
    model = onnx.load(target, load_external_data=False)
    metadata = {
        "classes": best.classes,
        "preprocessing": best.preprocessing.describe(),
        onnx_model.INDEPENDENT: best.independent,
    }
    if best.threshold is not None:
        metadata[onnx_model.THRESHOLD] = best.threshold
    if best.temperature != 1.0:
        metadata[onnx_model.TEMPERATURE] = best.temperature
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, target)


def export_torchscript(target: Path, best: BestModel) -> None:
    """Write TorchScript by tracing. torch itself calls it deprecated; ONNX and torch.export are its heirs."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(best.module, _example(best)), str(target))  # type: ignore[no-untyped-call]


def _measure(run: RunDir, best: BestModel, files: dict[str, Path], answers: Answers, say: Say) -> dict[str, Any]:
    """The manifest: top-1, agreement, size and latency of the checkpoint and of each file.

    If there are no images, top-1 and agreement are null, with the reason.
    """
    predictors = {REFERENCE: best.module} | {name: _predictor(name, path, say) for name, path in files.items()}
    answers.ask(predictors)
    times = latency.measure(predictors, best.preprocessing.image_size)
    rows: list[dict[str, Any]] = []
    for name, path in files.items():
        is_quantized = name in best.recipe.post.quantize
        reason = answers.verdict(name, is_quantized=is_quantized)
        row = {
            "file": path.name,
            "format": name,
            "quantization": onnx_model.read_quantization(path) if is_quantized else None,
            "size_mb": evaluate.size_mb(path),
            **times[name],
            **answers.compare(name),
            "reason": f"not measured: {answers.missing}" if answers.missing else reason,
        }
        rows.append(row | {"accepted": row["reason"] is None})
    weights = best.folder / "model.safetensors"
    found = best.state["early_stopping"]["best"]
    return {
        "run_id": run.run_id,
        "checkpoint": {"epoch": found["epoch"], **{key: found[key] for key in ("step", "metric", "value")}},
        "classes": best.classes,
        "preprocessing": best.preprocessing.describe(),
        "val_samples": len(answers.true),
        "not_measured": answers.missing,
        "latency_threads": torch.get_num_threads(),
        "cpu": {"name": cpu_name(), "saturates_int8": host_cpu.saturates_int8()},
        "reference": {
            "format": "pytorch",
            "top1": answers.top1(REFERENCE),
            "size_mb": evaluate.size_mb(weights),
            **times[REFERENCE],
        },
        "exports": rows,
    }


def _predictor(name: str, path: Path, say: Say) -> Predictor:
    if name == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Predictor = torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]
        return loaded
    return onnx_model.onnx_predictor(path, threads=torch.get_num_threads(), warn=say)


def _example(best: BestModel) -> torch.Tensor:
    size = best.preprocessing.image_size
    return torch.zeros(2, 3, size, size)  # two: a batch of one would be exported as just that


def main(argv: Sequence[str] | None = None) -> int:
    """Export the run that is named."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.export", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN")
    export_run(RunDir.existing(parser.parse_args(argv).run_dir))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
