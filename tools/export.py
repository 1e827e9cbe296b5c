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
from launcher.errors import EXIT_OK, exit_code_of
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
LARGE_BYTES = 1.9e9
"""From here on ONNX keeps weights beside the model: a protobuf holds at most 2 GB."""


def export_run(run: RunDir) -> None:
    """Make and measure what the recipe's ``post`` names; write ``exports/manifest.json``.

    Raises:
        UsageError: the run has no best checkpoint.
        CheckpointError: it is damaged.
    """
    torch.set_num_threads(num_cores())
    best = evaluate.load_best(run)
    run.exports.mkdir(exist_ok=True)
    formats = [*best.recipe.post.export, *best.recipe.post.quantize]
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
    manifest = _measure(run, best, files)
    write_json_atomic(run.export_manifest, manifest)
    for row in manifest["exports"]:
        run.append_event("export", file=row["file"], top1=row["top1"], accepted=row["accepted"], reason=row["reason"])
        print(f"{row['file']}: top1 {row['top1']:.4f}, agreement {row['agreement']:.4f}, accepted {row['accepted']}")
    tracking.log_exports(run, warn=print)


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
    metadata = {"classes": best.classes, "preprocessing": best.preprocessing.describe()}
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, target)


def export_torchscript(target: Path, best: BestModel) -> None:
    """Write TorchScript by tracing. torch itself calls it deprecated; ONNX and torch.export are its heirs."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(best.module, _example(best)), str(target))  # type: ignore[no-untyped-call]


def _measure(run: RunDir, best: BestModel, files: dict[str, Path]) -> dict[str, Any]:
    """The manifest: top-1, agreement, size and latency of the checkpoint and of each file."""
    threads = torch.get_num_threads()
    predictors = {name: _predictor(name, path, threads) for name, path in files.items()}
    predicted, true = evaluate.predict({"pytorch": best.module, **predictors}, best)
    reference = predicted["pytorch"]
    top1 = {name: (found == true).double().mean().item() for name, found in predicted.items()}
    rows: list[dict[str, Any]] = [
        {
            "file": path.name,
            "format": name,
            **_numbers(predictors[name], path, best, top1[name]),
            "agreement": (predicted[name] == reference).double().mean().item(),
            "top1_drop": 100 * (top1["pytorch"] - top1[name]),
        }
        for name, path in files.items()
    ]
    for row in rows:
        row["reason"] = _rejection(row, best.recipe.post.max_top1_drop)
        row["accepted"] = row["reason"] is None
    weights = best.folder / "model.safetensors"
    found = best.state["early_stopping"]["best"]
    return {
        "run_id": run.run_id,
        "checkpoint": {"epoch": found["epoch"], **{key: found[key] for key in ("step", "metric", "value")}},
        "classes": best.classes,
        "preprocessing": best.preprocessing.describe(),
        "val_samples": len(true),
        "latency_threads": threads,
        "reference": {"format": "pytorch", **_numbers(best.module, weights, best, top1["pytorch"])},
        "exports": rows,
    }


def _numbers(predictor: Predictor, path: Path, best: BestModel, top1: float) -> dict[str, float]:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Export the run that is named."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.export", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN")
    export_run(RunDir.existing(parser.parse_args(argv).run_dir))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
