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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher import host_cpu
from launcher.engine import tracking
from launcher.engine.device import cpu_name, num_cores
from launcher.errors import EXIT_OK, exit_code_of
from launcher.files import write_json_atomic
from launcher.run_dir import RunDir
from launcher.tools import evaluate, latency, onnx_model
from launcher.tools.quantize import quantize_onnx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.recipe import LaunchConfig, PostConfig
    from launcher.tools.evaluate import BestModel, Predictor

    Say = Callable[[str], None]
    """Tells the person at the terminal a line."""

FILES = {"onnx": "model.onnx", "torchscript": "model.ts", "onnx_int8": "model.int8.onnx"}
MIN_AGREEMENT = 0.99
"""Of an export that computes in float32, whatever post.min_agreement says: the same network must see the same thing."""
LARGE_BYTES = 1.9e9
"""From here on ONNX keeps weights beside the model: a protobuf holds at most 2 GB."""


def export_run(run: RunDir) -> None:
    """Make and measure what the recipe's ``post`` names; write ``exports/manifest.json``.

    Raises:
        UsageError: the run has no best checkpoint.
        CheckpointError: it is damaged.
    """
    with _noise_to(run.post_log) as say:
        _export_run(run, say)


def _export_run(run: RunDir, say: Say) -> None:
    best = evaluate.load_best(run)
    torch.set_num_threads(num_threads(best.recipe.launch))
    run.exports.mkdir(exist_ok=True)
    formats = [*best.recipe.post.export, *best.recipe.post.quantize]
    files: dict[str, Path] = {name: run.exports / FILES[name] for name in formats}
    with tempfile.TemporaryDirectory(dir=run.exports, prefix=".export-") as folder:
        for name in formats:
            say(f"making {FILES[name]}")
            made = Path(folder) / FILES[name]
            _make(name, made, best)
        # Only now: what lies in exports/ is whole, and all of it is of one checkpoint.
        for made in Path(folder).iterdir():
            shutil.move(made, run.exports / made.name)
    say("measuring")
    manifest = _measure(run, best, files, say)
    write_json_atomic(run.export_manifest, manifest)
    for row in manifest["exports"]:
        run.append_event("export", **{key: row[key] for key in ("file", "top1", "agreement", "accepted", "reason")})
        say(f"{row['file']}: top1 {row['top1']:.4f}, agreement {row['agreement']:.4f}, accepted {row['accepted']}")
    tracking.log_exports(run, warn=say)


@contextlib.contextmanager
def _noise_to(log: Path) -> Iterator[Say]:
    """Send what libraries print, C libraries' too, to a log: nothing in it is for the user to mend.

    Yields:
        What writes a line to where standard output went until now.
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


def _measure(run: RunDir, best: BestModel, files: dict[str, Path], say: Say) -> dict[str, Any]:
    """The manifest: top-1, agreement, size and latency of the checkpoint and of each file."""
    predictors = {"pytorch": best.module} | {name: _predictor(name, path, say) for name, path in files.items()}
    predicted, true = evaluate.predict(predictors, best)
    times = latency.measure(predictors, best.preprocessing.image_size)
    reference = predicted["pytorch"]
    top1 = {name: (found == true).double().mean().item() for name, found in predicted.items()}
    rows: list[dict[str, Any]] = [
        {
            "file": path.name,
            "format": name,
            "quantization": onnx_model.read_quantization(path) if name in best.recipe.post.quantize else None,
            "top1": top1[name],
            "size_mb": evaluate.size_mb(path),
            **times[name],
            "agreement": (predicted[name] == reference).double().mean().item(),
            "num_changed": int((predicted[name] != reference).sum()),
            "top1_drop": 100 * (top1["pytorch"] - top1[name]),
        }
        for name, path in files.items()
    ]
    for row in rows:
        row["reason"] = _rejection(row, best.recipe.post, num_images=len(true))
        row["accepted"] = row["reason"] is None
    weights = best.folder / "model.safetensors"
    found = best.state["early_stopping"]["best"]
    return {
        "run_id": run.run_id,
        "checkpoint": {"epoch": found["epoch"], **{key: found[key] for key in ("step", "metric", "value")}},
        "classes": best.classes,
        "preprocessing": _preprocessing(best),
        "val_samples": len(true),
        "latency_threads": torch.get_num_threads(),
        "cpu": {"name": cpu_name(), "saturates_int8": host_cpu.saturates_int8()},
        "reference": {
            "format": "pytorch",
            "top1": top1["pytorch"],
            "size_mb": evaluate.size_mb(weights),
            **times["pytorch"],
        },
        "exports": rows,
    }


def _rejection(row: dict[str, Any], post: PostConfig, *, num_images: int) -> str | None:
    """Why an export is not accepted, or None."""
    reasons = []
    if row["top1_drop"] > post.max_top1_drop + 1e-9:
        reasons.append(
            f"loses {row['top1_drop']:.2f} points of top-1; post.max_top1_drop allows {post.max_top1_drop:g}"
        )
    quantized = row["quantization"] is not None
    least = post.min_agreement if quantized else max(MIN_AGREEMENT, post.min_agreement)
    if row["agreement"] < least - 1e-9:
        key = "post.min_agreement" if least == post.min_agreement else "a float32 export"
        reasons.append(
            f"agrees with the checkpoint on {row['agreement']:.2%} of the images ({row['num_changed']} of {num_images} "
            f"answers changed); {key} asks for {100 * least:g}%"
        )
    return "; ".join(reasons) or None


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
