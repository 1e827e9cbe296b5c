"""Loads and runs one exported file in a process of its own, to measure what a program that serves it would need.

``python -m launcher.tools.probe FILE THREADS IMAGE_SIZE`` prints ``{"load_s", "peak_memory_mb"}`` as JSON. An ONNX file
is loaded without torch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.tools import onnx_model

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 16
"""Images that are computed at once where memory is measured."""
TIMEOUT_S = 120.0
STATUS = Path("/proc/self/status")


def measure(file: Path, *, threads: int, image_size: int, channels: int = 3) -> dict[str, float | None]:
    """Seconds to open a file, and the most memory of a process that opens it and computes a batch of BATCH.

    Both are None where that process fails: what it wrote goes to standard error.
    """
    command = [sys.executable, "-m", "launcher.tools.probe", str(file), *map(str, (threads, image_size, channels))]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S)
        found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        print(f"{file}: memory and load time not measured: {error}", file=sys.stderr)
        return {"load_s": None, "peak_memory_mb": None}
    return found


def _load_and_run(file: Path, threads: int, image_size: int, channels: int) -> dict[str, Any]:
    start = time.perf_counter()
    run = _open(file, threads)
    load_s = time.perf_counter() - start
    run(np.zeros((BATCH, channels, image_size, image_size), np.float32))
    # getrusage would count what this process was forked from
    peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8")) if STATUS.exists() else None
    return {"load_s": load_s, "peak_memory_mb": int(peak[1]) / 1e3 if peak else None}


def _open(file: Path, threads: int) -> Callable[[Any], Any]:
    if file.suffix == ".onnx":
        session = onnx_model.open_session(file, threads=threads, warn=lambda line: print(line, file=sys.stderr))
        return lambda images: onnx_model.compute(session, images)
    import torch

    from launcher.tools import formats

    torch.set_num_threads(threads)
    predictor = formats.open_program(file)
    return lambda images: predictor(torch.from_numpy(images))


def main() -> None:
    """Measure the file that is named."""
    file, *numbers = sys.argv[1:5]
    print(json.dumps(_load_and_run(Path(file), *map(int, numbers))))


if __name__ == "__main__":
    main()
