"""``launch lr-find RECIPE``: which learning rate to begin with, by a short training at ever higher rates."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import start
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_FAILED, EXIT_OK, UsageError
from launcher.plan.request import Request
from launcher.system import phases

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from launcher.engine.optimizing.rate_range import RangeTest
    from launcher.engine.schedule import Batching

FEWEST = 10
"""Steps below which there is no curve."""
AUTO_SIZE = 32
"""Images at once where the recipe leaves that to a measurement, which would take longer than all of this."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch lr-find``; return its exit code."""
    parser = parser_of("lr-find", "Find a learning rate by the range test (Smith 2017); what it trains is thrown away.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that `launch recipes` lists")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe: batch.size=16")
    parser.add_argument("--start", type=float, metavar="A", help="the lowest rate (default: 1e-4 for sgd, else 1e-6)")
    parser.add_argument("--end", type=float, metavar="B", help="the highest rate (default: 10 for sgd, else 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps (default: 100, fewer where they take long)")
    parser.add_argument("--out", metavar="FILE", help="the SVG to write (default: NAME-lr-find.svg)")
    return run(parser.parse_intermixed_args(argv))


def run(args: argparse.Namespace) -> int:
    """Measure in a run directory that is thrown away; write the curve, and say what to write into the recipe."""
    bounds, threads = _bounds(args), os.environ.get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory(prefix="launch-lr-find-") as folder:
        place = str(Path(folder) / "run")
        request = Request(
            recipe=args.recipe,
            overrides=(*args.overrides, "data.cache=none"),  # else decoded pixels would stay in a cache
            nodes=1,
            spares=0,
            backend="torchrun",
            run_dir=place,
        )
        (reading,) = start.read(request)
        (asked,) = start.read(replace(request, nodes=None, spares=None, backend=None))
        file = Path(args.out or f"{reading.recipe.name}-lr-find.svg")
        if not file.parent.is_dir():
            raise UsageError(f"--out: there is no folder {file.parent}; make it, or name a file elsewhere")
        draft = start.plan(reading)
        (found,) = start.admit([draft], [])
        start.record(draft, found)
        batching = _batching(draft, num_nodes=asked.recipe.launch.max_nodes)
        with phases.before_answer():
            measured = _measure(draft, batching, bounds, args.steps, threads)
    if len(measured.rates) < FEWEST:
        lowest = measured.rates[0] if measured.rates else bounds[0] if bounds else "the lowest rate"
        print(f"the loss rises, or is NaN or infinite, almost from the beginning ({lowest:g}): give a lower --start")
        return EXIT_FAILED
    return _tell(reading.recipe.name, measured, file)


def _bounds(args: argparse.Namespace) -> tuple[float, float] | None:
    if args.steps is not None and args.steps < FEWEST:
        raise UsageError(f"--steps: found {args.steps}; valid: {FEWEST} or more")
    if (args.start is None) != (args.end is None):
        raise UsageError("--start and --end: give both, or neither")
    if args.start is None:
        return None
    if not 0 < args.start < args.end < float("inf"):
        raise UsageError(f"--start {args.start:g} --end {args.end:g}; valid: 0 < start < end")
    return args.start, args.end


def _measure(
    draft: start.Draft,
    batching: Batching,
    bounds: tuple[float, float] | None,
    num_steps: int | None,
    threads: str | None,
) -> RangeTest:
    import torch

    from launcher.engine.device import Device
    from launcher.engine.optimizing import rate_range
    from launcher.system.cores import num_cores

    if threads is None:  # one process has all the cores
        torch.set_num_threads(num_cores())
    return rate_range.measure(
        draft.run, Device(type=draft.plan.device, index=0), batching, bounds=bounds, num_steps=num_steps
    )


def _batching(draft: start.Draft, *, num_nodes: int) -> Batching:
    """The recipe's global batch in one process: as many parts, one after the other, as its ranks would take."""
    from launcher.engine.schedule import Batching

    config = draft.recipe.batch
    if config.size == "auto":
        config = replace(config, size=AUTO_SIZE)
    assert config.size != "auto"  # noqa: S101
    ranks = draft.plan.world_size * num_nodes
    total = config.global_size or config.size * ranks * config.accumulate
    if draft.recipe.batch.size == "auto":
        print(f"batch.size is auto, which a run measures: here {config.size} at once, {total} a step", flush=True)
    return Batching.even(config.size, world_size=1, global_size=total, accumulate=1)


def _tell(name: str, measured: RangeTest, file: Path) -> int:
    from launcher.report import rate_chart

    title = f"{name}: loss of {len(measured.rates)} steps, each at a higher learning rate"
    drawn = rate_chart.draw(title, measured.rates, measured.losses, measured.smooth, measured.suggestion)
    try:
        file.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out: {file} cannot be written: {error.strerror}") from None
    low, high = measured.rates[0], measured.rates[-1]
    print(f"{file}: the loss over learning rates from {low:.2g} to {high:.2g}")
    if measured.suggestion is None:
        print("the loss never falls by more than it varies from step to step: give more --steps or other rates")
        return EXIT_FAILED
    lowest = measured.rates[measured.smooth.index(min(measured.smooth))]
    print(f"the smoothed loss falls fastest at {measured.suggestion:g}, and is lowest at {lowest:.2g}")
    print(f"to begin with: {' '.join(measured.overrides)}")
    return EXIT_OK
