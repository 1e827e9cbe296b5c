"""``launch augment RECIPE``: a picture of training images as the model sees them, before any training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import start
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError
from launcher.plan.request import Request
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from launcher.recipe.schema import Recipe


def main(argv: Sequence[str]) -> int:
    """Run ``launch augment``; return its exit code."""
    parser = parser_of("augment", "Draw sixteen training images before and after augmentation; nothing is trained.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that `launch recipes` lists")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe: data.augment=light")
    parser.add_argument("--out", metavar="FILE", help="the PNG to write (default: NAME-augment.png)")
    parser.add_argument("--epoch", type=int, default=1, metavar="N", help="whose images and randomness (1)")
    return run(parser.parse_intermixed_args(argv))


def run(args: argparse.Namespace) -> int:
    """Write the picture; say where it is."""
    if args.epoch < 1:
        raise UsageError(f"--epoch: found {args.epoch}; valid: a whole number >= 1")
    (reading,) = start.read(Request(recipe=args.recipe, overrides=tuple(args.overrides)))
    file = Path(args.out or f"{reading.recipe.name}-augment.png")
    if not file.parent.is_dir():
        raise UsageError(f"--out: there is no folder {file.parent}; make it, or name a file elsewhere")
    with tempfile.TemporaryDirectory(prefix="launch-augment-") as folder:
        recipe = _with_own_code(reading, RunDir(Path(folder) / "run"))
        from launcher.engine.augmenting import picture

        drawn = picture.draw(recipe, epoch=args.epoch - 1)
    try:
        file.write_bytes(drawn)
    except OSError as error:
        raise UsageError(f"--out: {file} cannot be written: {error.strerror}") from None
    print(f"{file}: on the left training images as validation sees them, on the right as the model sees them")
    return EXIT_OK


def _with_own_code(reading: start.Reading, run: RunDir) -> Recipe:
    """The recipe with its references to the user's code leading to copies of it, as in a run."""
    from launcher.recipe import user_code
    from launcher.runs import user_copies

    recipe, code = user_copies.gather(reading.recipe, reading.source, run, renew=False)
    run.create()
    code.write(run.code)
    return user_code.placed(recipe, run.path)
