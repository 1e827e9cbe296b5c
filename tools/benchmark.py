"""Times a run's exported files beside its checkpoint in eager PyTorch, or one file alone, on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.device import cpu_name
from launcher.errors import UsageError
from launcher.runs.run_dir import RunDir
from launcher.system import phases
from launcher.tools import evaluate, formats, latency, onnx_model, probe, publish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.tools.evaluate import Predictor

EAGER = "eager PyTorch"


def benchmark(place: Path, *, threads: int, warn: Callable[[str], None]) -> dict[str, Any]:
    """Measure on the CPU what the manifest of exports has of times and memory.

    Args:
        place: a run directory, or an ONNX file that was exported from one.
        threads: of the CPU.
        warn: gets a line if a file was made for other CPUs than this one.

    Raises:
        UsageError: there is nothing to measure.
    """
    torch.set_num_threads(threads)
    phases.at("opening the models")
    predictors: dict[str, Predictor] = {}
    if place.is_file():
        files = {place.name: place}
        predictors[place.name] = onnx_model.onnx_predictor(place, threads=threads, warn=warn)
        size, channels = _input_of(place)
    else:
        run = RunDir.existing(place)
        best = evaluate.load_best(run, warn=warn)
        size, channels = best.preprocessing.image_size, best.preprocessing.channels
        predictors[EAGER] = best.module
        files = _programs(run)
        for name, file in files.items():
            predictors[name] = formats.open_export(name, file, best, threads=threads, warn=warn)
    phases.at("timing one image at a time")
    times = latency.measure(predictors, size, channels)
    phases.at("timing batches")
    rates = latency.throughput(predictors, size, channels)
    phases.at("measuring the memory of each file")
    rows = [
        {
            "model": name,
            "size_mb": evaluate.size_mb(files[name]) if name in files else None,
            **times[name],
            **rates[name],
            **(
                probe.measure(files[name], threads=threads, image_size=size, channels=channels) if name in files else {}
            ),
        }
        for name in predictors
    ]
    return {"cpu": cpu_name(), "threads": threads, "image_size": size, "models": rows}


def _programs(run: RunDir) -> dict[str, Path]:
    """The exported files that compute by themselves, by format."""
    rows = (publish.read_manifest(run) or {"exports": []})["exports"]
    files = {row["format"]: run.exports / row["file"] for row in rows}
    weights = {name for name, row in formats.FORMATS.items() if row.is_weights}
    return {name: file for name, file in files.items() if file.is_file() and name not in weights}


def _input_of(file: Path) -> tuple[int, int]:
    """Height and width, and the channels."""
    import onnx

    said = onnx_model.read_metadata(onnx.load(file, load_external_data=False))
    if "preprocessing" not in said:
        raise UsageError(f"{file}: lacks the metadata of an export of `launch`: its image size is not known")
    facts = json.loads(said["preprocessing"])
    return int(facts["image_size"]), len(facts["mean"])
