"""How long training stands still for a checkpoint, against writing it in the step: both in turn, the ratio printed.

It stands still while the copy is begun, and after the next forward and backward pass until the copy is there. How much
longer that pass takes, with a thread that copies and writes beside it, is printed too.

    python -m tests.bench.checkpoint [--repeats N] [--arch ARCH]

The pass is one over 8 images. The state is that of a network and its AdamW; what is written is the same on both sides,
hashed and forced to the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torchvision import models

from launcher.engine.checkpoints import checkpoint as checkpoints
from launcher.engine.checkpoints.host_copies import HostCopies
from launcher.runs.run_dir import RunDir


def state_of(arch: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network, and its optimizer after a step."""
    module = models.get_model(arch, weights=None)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return module, optimizer


def checkpoint_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> checkpoints.Checkpoint:
    """Of the live tensors."""
    state = {"optimizer": optimizer.state_dict()}
    return checkpoints.Checkpoint(step=step, model=module.state_dict(), optimizer=state, state={"step": step})


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arch", default="resnet50")
    args = parser.parse_args()
    module, optimizer = state_of(args.arch)
    stalls, writes, alone, beside, copies = [], [], [], [], HostCopies()
    images = torch.randn(8, 3, *[getattr(module, "image_size", 64)] * 2)

    def forward_and_backward() -> float:
        start = time.perf_counter()
        module(images).sum().backward()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = RunDir(Path(folder) / "run")
        run.create()
        writer = checkpoints.CheckpointWriter(
            run,
            keep=1,
            on_written=lambda *_: None,
            on_failed=lambda *_: None,
            on_done=lambda done: copies.give_back([done.model, done.optimizer]),
        )
        for repeat in range(args.repeats):
            alone.append(forward_and_backward())
            start = time.perf_counter()
            live = checkpoint_of(module, optimizer, 2 * repeat + 1)
            (model, state), arrived = copies.copy_later([live.model, live.optimizer])
            writer.save(replace(live, model=model, optimizer=state, arrived=arrived), best=False)
            begun = time.perf_counter()
            beside.append(forward_and_backward())
            computed = time.perf_counter()
            copies.finish()
            stalls.append(begun - start + time.perf_counter() - computed)
            writer.wait()
            start = time.perf_counter()
            checkpoints.write(run, checkpoint_of(module, optimizer, 2 * repeat + 2))
            writes.append(time.perf_counter() - start)
        size_mb = sum(file.stat().st_size for file in run.last_checkpoint.iterdir()) / 1e6
    stall, write = statistics.median(stalls), statistics.median(writes)
    slower = statistics.median(beside) - statistics.median(alone)
    print(
        f"checkpoint of {args.arch} with AdamW, {size_mb:.0f} MB: training waits {stall * 1e3:.0f} ms, "
        f"writing it in the step {write * 1e3:.0f} ms, ratio {stall / write:.3f}; the pass beside it takes "
        f"{slower * 1e3:+.0f} ms"
    )


if __name__ == "__main__":
    main()
