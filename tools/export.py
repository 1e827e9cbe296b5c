"""Exports a run's best checkpoint, and measures each export against it before calling it accepted.

``python -m launcher.tools.export RUN`` is what ``launch export RUN`` and the post-step of training run.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine import tracking
from launcher.engine.device import num_cores
from launcher.errors import EXIT_OK, UsageError, exit_code_of
from launcher.files import write_json_atomic
from launcher.run_dir import RunDir
from launcher.tools import evaluate
from launcher.tools.quantize import quantize_onnx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.tools.evaluate import BestModel, Predictor

FILES = {"onnx": "model.onnx", "torchscript": "model.ts", "onnx_int8": "model.int8.onnx"}
MIN_AGREEMENT = 0.99
"""Of an export that computes in float32: the same network must see the same thing."""
NO_CALIBRATION = "calibration needs training images"
LARGE_BYTES = 1.9e9
"""From here on ONNX keeps weights beside the model: a protobuf holds at most 2 GB."""


def export_run(run: RunDir, data_path: str | None = None) -> None:
    """Make and measure what the recipe's ``post`` names; write ``exports/manifest.json``.

    Where the images are gone, nothing is measured, and so nothing accepted; int8 cannot be calibrated, and is not made.

    Args:
        run: the run directory.
        data_path: folder with the images; None: where the run had them.

    Raises:
        UsageError: the run has no best checkpoint, or ``data_path`` holds no such images.
        CheckpointError: it is damaged.
    """
    torch.set_num_threads(num_cores())
    best = evaluate.load_best(run, data_path)
    missing, uncalibrated = best.missing("val"), best.missing("train")
    if missing and data_path is not None:
        raise UsageError(f"data.path={data_path}: {missing}")
    if missing:
        print(f"not measured: {missing}; where they are now: launch export {run} data.path=FOLDER", flush=True)
    run.exports.mkdir(exist_ok=True)
    post = best.recipe.post
    not_made: list[str] = [*post.quantize] if uncalibrated else []
    for name in not_made:
        print(f"{FILES[name]}: not made: {NO_CALIBRATION}: {uncalibrated}", flush=True)
    formats: list[str] = [*post.export, *([] if uncalibrated else post.quantize)]
    files: dict[str, Path] = {name: run.exports / FILES[name] for name in formats}
    with tempfile.TemporaryDirectory(dir=run.exports, prefix=".export-") as folder:
        for name in formats:
            print(f"making {FILES[name]}", flush=True)
            made = Path(folder) / FILES[name]
            _make(name, made, best)
        # Only now: what lies in exports/ is whole, and all of it is of one checkpoint.
        for made in Path(folder).iterdir():
            shutil.move(made, run.exports / made.name)
    print("measuring", flush=True)
    manifest = _measure(run, best, files, missing)
    kept = _made_before(run, not_made, manifest["checkpoint"])
    manifest["not_made"] = [
        {"file": FILES[name], "format": name, "reason": f"{NO_CALIBRATION}: {uncalibrated}"}
        for name in not_made
        if name not in [row["format"] for row in kept]
    ]
    for row in manifest["exports"]:
        run.append_event("export", file=row["file"], top1=row["top1"], accepted=row["accepted"], reason=row["reason"])
        numbers = "" if missing else f"top1 {row['top1']:.4f}, agreement {row['agreement']:.4f}, "
        print(f"{row['file']}: {numbers}accepted {row['accepted']}{f' ({missing})' if missing else ''}")
    manifest["exports"] += kept
    write_json_atomic(run.export_manifest, manifest)
    tracking.log_exports(run, warn=print)


def _made_before(run: RunDir, names: Sequence[str], checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier export says of files that are not made now: of the same checkpoint they stay, others go."""
    try:
        before = json.loads(run.export_manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {"exports": [], "checkpoint": None}
    same = before["exports"] if before["checkpoint"] == checkpoint else []
    rows = [row for row in same if row["format"] in names and (run.exports / row["file"]).is_file()]
    for name in set(names) - {row["format"] for row in rows}:
        (run.exports / FILES[name]).unlink(missing_ok=True)
    return rows


def _make(name: str, target: Path, best: BestModel) -> None:
    if name == "onnx":
        export_onnx(target, best)
    elif name == "torchscript":
        export_torchscript(target, best)
    else:
        quantize_onnx(target.with_name(FILES["onnx"]), target, best)


def export_onnx(target: Path, best: BestModel) -> None:
    """Write ONNX: ``images`` (float32 N x 3 x S x S, normalised, any N) to ``logits`` (float32 N x C).

    The metadata hold ``classes`` and ``preprocessing`` as JSON.
    """
    import onnx

    example = _example(best)
    size = sum(p.numel() * p.element_size() for p in best.module.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are nothing a user can mend
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
    metadata = {"classes": best.classes, "preprocessing": _preprocessing(best)}
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, target)


def export_torchscript(target: Path, best: BestModel) -> None:
    """Write TorchScript by tracing. torch itself calls it deprecated; ONNX and torch.export are its heirs."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(best.module, _example(best)), str(target))  # type: ignore[no-untyped-call]


def _measure(run: RunDir, best: BestModel, files: dict[str, Path], missing: str | None) -> dict[str, Any]:
    """The manifest: top-1, agreement, size and latency of the checkpoint and of each file.

    Where images are ``missing``, top-1 and agreement are null, and why is said.
    """
    threads = torch.get_num_threads()
    predictors = {name: _predictor(name, path, threads) for name, path in files.items()}
    named: dict[str, Predictor] = {"pytorch": best.module, **predictors}
    predicted, true = ({}, torch.empty(0)) if missing else evaluate.predict(named, best)
    reference = predicted.get("pytorch")
    top1 = {name: _fraction_same(predicted.get(name), true) for name in named}
    rows: list[dict[str, Any]] = [
        {
            "file": path.name,
            "format": name,
            **_numbers(predictors[name], path, best, top1[name]),
            "agreement": _fraction_same(predicted.get(name), reference),
            "top1_drop": None if missing else 100 * (top1["pytorch"] - top1[name]),
        }
        for name, path in files.items()
    ]
    for row in rows:
        row["reason"] = f"not measured: {missing}" if missing else _rejection(row, best.recipe.post.max_top1_drop)
        row["accepted"] = row["reason"] is None
    weights = best.folder / "model.safetensors"
    found = best.state["early_stopping"]["best"]
    return {
        "run_id": run.run_id,
        "checkpoint": {"epoch": found["epoch"], **{key: found[key] for key in ("step", "metric", "value")}},
        "classes": best.classes,
        "preprocessing": _preprocessing(best),
        "val_samples": len(true),
        "not_measured": missing,
        "latency_threads": threads,
        "reference": {"format": "pytorch", **_numbers(best.module, weights, best, top1["pytorch"])},
        "exports": rows,
    }


def _fraction_same(found: torch.Tensor | None, expected: torch.Tensor | None) -> Any:
    """Of which part of the images two say the same; None where either says nothing."""
    return None if found is None or expected is None else (found == expected).double().mean().item()


def _numbers(predictor: Predictor, path: Path, best: BestModel, top1: float | None) -> dict[str, Any]:
    median, p95 = evaluate.latency_ms(predictor, best.preprocessing.image_size)
    return {"top1": top1, "size_mb": evaluate.size_mb(path), "latency_p50_ms": median, "latency_p95_ms": p95}


def _rejection(row: dict[str, Any], max_top1_drop: float) -> str | None:
    """Why an export is not accepted, or None."""
    if row["top1_drop"] > max_top1_drop + 1e-9:
        return f"loses {row['top1_drop']:.2f} points of top-1; post.max_top1_drop allows {max_top1_drop:g}"
    if row["format"] != "onnx_int8" and row["agreement"] < MIN_AGREEMENT:
        return f"agrees with the checkpoint on {row['agreement']:.2%} of the images; {MIN_AGREEMENT:.0%} is the least"
    return None


def _predictor(name: str, path: Path, threads: int) -> Predictor:
    if name == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Predictor = torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]
        return loaded
    return evaluate.onnx_predictor(path, threads=threads)


def _example(best: BestModel) -> torch.Tensor:
    size = best.preprocessing.image_size
    return torch.zeros(2, 3, size, size)  # two: a batch of one would be exported as just that


def _preprocessing(best: BestModel) -> dict[str, Any]:
    found = best.preprocessing
    return {
        "image_size": found.image_size,
        "resize_size": found.resize_size,
        "mean": list(found.mean),
        "std": list(found.std),
        "interpolation": found.interpolation,
        "antialias": True,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Export the run that is named."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.export", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN")
    export_run(RunDir.existing(parser.parse_args(argv).run_dir))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
