"""The engine's own part of a step: all but what the bare loop does as well. Exits with 1 where it is 1 % or more.

    python -m tests.bench.engine_cost [--model resnet18] [--px 64] [--batch 32] [--rounds 10]

Takes real steps of training (:class:`launcher.engine.train_step.TrainStep`, and the look at its numbers after it) in a
process group of one, and takes the time of what the bare loop does too off them: images to the device, forward through
DDP, loss, backward, update. What is left are the norm of the gradient, the watch for NaN, the sums of loss and hits,
the copy of BatchNorm's statistics, seeds, and Python. (The difference of two whole steps is noise: it is far less than
steps differ among themselves.) CPU milliseconds, of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.system import allocator
from tests.bench.autotune import write_photos

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.setup import Parts

MOST = 0.01


class Shared:
    """CPU seconds of what the bare loop does as well."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def count(self, owner: Any, name: str) -> None:
        """Count the time of a method from now on, unless it is within another that counts."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self._depth += 1
            start = time.process_time()
            try:
                return method(*args, **options)
            finally:
                self._depth -= 1
                self.seconds += 0.0 if self._depth else time.process_time() - start

        setattr(owner, name, timed)


def build(folder: Path, options: argparse.Namespace) -> Parts:
    """What a rank trains with, alone."""
    from launcher.engine import optim
    from launcher.engine.device import Device
    from launcher.engine.distributed import Ranks, init_process_group
    from launcher.engine.schedule import Batching
    from launcher.engine.setup import build_parts
    from launcher.recipe import load as recipes
    from launcher.runs.run_dir import RunDir

    photos = write_photos(folder / "photos", size=options.px, num=options.batch)
    recipe = {
        "model": {"arch": options.model, "weights": None},
        "data": {"path": str(photos), "image_size": options.px, "workers": 0},
        "batch": {"size": options.batch},
        "precision": "fp32",
    }
    run = RunDir(folder / "run")
    run.path.mkdir()
    run.recipe.write_text(json.dumps(recipes.to_dict(recipes.from_dict(recipe))))
    device = Device(type="cpu")
    init_process_group(device, Ranks())
    batching = Batching.even(options.batch, world_size=1, global_size=None, accumulate=1)
    parts = build_parts(run, Ranks(), device, batching=batching)
    parts.model.freeze(0)
    parts.wrap()
    optim.prepare_momentum(parts.optimizer)
    parts.model.train()
    return parts


def measure(parts: Parts, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Of each step, CPU seconds of it all, and of the engine's own part."""
    import torch

    from launcher.engine.schedule import Step
    from launcher.engine.state import TrainingState
    from launcher.engine.train_step import TrainStep

    state, indices = TrainingState(parts), tuple(range(options.batch))
    step = Step(epoch=0, offset=0, end=0, num_samples=options.batch, micro_batches=(indices,), lone=False)
    images = torch.randint(0, 256, (options.batch, 3, options.px, options.px), dtype=torch.uint8)
    labels = torch.randint(0, len(parts.classes), (options.batch,))
    train_step, shared = TrainStep(parts, state), Shared()
    for owner, name in (
        *((parts, "to_device"), (parts.ddp, "forward"), (parts.loss, "sum"), (torch.Tensor, "backward")),
        *((parts.optimizer, "step"), (parts.optimizer, "zero_grad")),
    ):
        shared.count(owner, name)
    found = []
    for _ in range(options.rounds + 1):
        shared.seconds, start = 0.0, time.process_time()
        train_step.run(step, iter([(images, labels)]))
        state.step += 1
        assert not [*state.numbers.read(state.step)]
        whole = time.process_time() - start
        found.append((whole, whole - shared.seconds))
    return found[1:]  # the first makes the optimizer's state


def main() -> int:
    """Print what the engine costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    os.environ |= {**allocator.HUGE_PAGES, "OMP_NUM_THREADS": "1"}
    allocator.keep_freed()
    with tempfile.TemporaryDirectory() as name:
        found = measure(build(Path(name), options), options)
    whole, own = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        f"{options.model} at {options.px} px, batch {options.batch}: a step takes {1000 * whole:.1f} ms of CPU time; "
        f"of that the engine's own part is {1000 * own:.2f} ms: {own / whole:.2%}"
    )
    return int(own / whole >= MOST)


if __name__ == "__main__":
    sys.exit(main())
