"""``launch check DATA``: finds bad and unusual files in an image folder before training."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, EXIT_PREFLIGHT, UsageError
from launcher.images import datasets, known_layouts
from launcher.images import listing as listings
from launcher.images import scan as image_scan
from launcher.images.candidates import VAL_FRACTION
from launcher.images.folder import printable
from launcher.images.listing import Listing
from launcher.images.source import Source
from launcher.recipe import given
from launcher.recipe import images as recipe_images
from launcher.runs.findings import FEW_IMAGES, IMBALANCE
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.images.scan import Scan

NUM_SHOWN = 20
NUM_PAIRS_SHOWN = 5
UNDIVIDED = (
    f"note     nothing says which images are for validation: here {VAL_FRACTION:.0%} of each class are; to train on "
    f"them takes data.val_fraction={VAL_FRACTION:g}, which `launch new` writes into a recipe"
)


def main(argv: Sequence[str]) -> int:
    """Run ``launch check``; return its exit code."""
    parser = parser_of("check", "Look through an image folder: bad files, classes, images that are there twice.")
    parser.add_argument("data", metavar="DATA", help="a folder of images, or a list of them")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as the recipe has it: data.background=black")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs; lists every file")
    args = parser.parse_intermixed_args(argv)
    return run(args.data, args.overrides, as_json=args.as_json)


def run(path: str, overrides: Sequence[str] = (), *, as_json: bool) -> int:
    """Scan an image folder and print what was found.

    Args:
        path: a folder or a list.
        overrides: keys of the recipe's ``data``, as in ``data.grey_range=[0, 4095]``.
        as_json: print :func:`describe` instead of lines for people.

    Returns:
        ``EXIT_OK``, or ``EXIT_PREFLIGHT`` where training on it would be refused; warnings do not count.

    Raises:
        UsageError: there is no such folder, or an override is wrong.
    """
    source, config = Source(path=str(datasets.prepare("imagefolder", path)), named=path), None
    if overrides:
        recipe = given.recipe_of([*overrides, f"data.path={path}"])
        source, config = recipe_images.source_of(recipe), recipe.data
    allowed = config.missing_val_classes if config else "error"
    found_wrong = listings.find_problems(source, missing_val_classes=allowed, explained=False)
    divided = replace(source, val_fraction=VAL_FRACTION)
    may_divide = bool(found_wrong) and source.val_fraction is None
    is_divided = may_divide and not _has_split(source) and _is_laid_out(divided)
    if is_divided:
        source = divided
        if not as_json:
            print(UNDIVIDED)
    if found_wrong:
        found_wrong = listings.find_problems(source, missing_val_classes=allowed)
    problems = [known_layouts.CURE.sub(r"launch check \1\2", text) for text in found_wrong]
    if not source.place.exists():
        raise UsageError(problems[0])
    try:
        listing = Listing(source)
    except UsageError:  # a list that cannot be read
        raise UsageError("\n".join(problems)) from None
    grey_range = config.grey_limits if config else None
    found = image_scan.scan(listing, grey_range=grey_range, progress=image_scan.show_progress())
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(describe(found, problems, VAL_FRACTION if is_divided else None), indent=2))
    else:
        _print(found, problems)
    return EXIT_PREFLIGHT if problems or found.bad else EXIT_OK


def _has_split(source: Source) -> bool:
    """Whether anything in a folder or list is said to be for training or validation."""
    try:
        listing = Listing(source)
    except UsageError:
        return False
    return any(listing.part(split) for split in listing.splits)


def _is_laid_out(divided: Source) -> bool:
    """Whether classes can be divided, whatever else is wrong with them."""
    try:
        listing = Listing(divided)
        return not listing.layout.problems and len(listing.classes) > 1
    except UsageError:
        return False


def describe(found: Scan, problems: list[str], val_fraction: float | None) -> dict[str, Any]:
    """All that was found, for programs; paths are relative to the folder.

    Args:
        found: by the scan.
        problems: for which training would be refused.
        val_fraction: by which the images were divided, as nothing says which are for validation; else None.
    """
    return {
        "folder": str(found.place),
        "ok": not (problems or found.bad),
        "problems": problems,
        "val_fraction": val_fraction,
        "classes": {split: dict(found.class_counts(split)) for split in _splits(found)},
        "bad": [
            {"path": image.path, "split": image.split, "kind": image.kind, "message": image.message, "cure": image.cure}
            for image in found.bad
        ],
        "notes": found.noted(),
        "left_out": found.left_out,
        "levels": {kind: list(ends) for kind, ends in found.levels.items()},
        "leaks": [{"train": train, "val": val} for train, val in found.leaks()],
        "contradictions": found.contradictions(),
    }


def _splits(found: Scan) -> list[str]:
    return [split for split in found.listing.splits if found.listing.part(split)] if found.listing else []


def _print(found: Scan, problems: list[str]) -> None:
    for split in _splits(found):
        _print_split(split, found)
    for note, paths in found.noted().items():
        print(f"note     {len(paths):,} {image_scan.NOTES[note]}, as {printable(paths[0])}")
    for kind, (low, high) in found.levels.items():
        print(f"note     images of {kind} have values from {low:g} to {high:g}")
    for line in found.left_out:
        print(f"warning  {printable(line)}")
    leaks, contradictions = found.leaks(), found.contradictions()
    if leaks:
        num = plural(len(leaks), "image")
        where = "val/ or test/" if "test" in _splits(found) else "val/"
        print(f"warning  {num} of {where} also in train/, byte for byte; what is measured will flatter:")
        _print_some([f"{printable(val)} is {printable(train)}" for train, val in leaks], NUM_PAIRS_SHOWN)
    if contradictions:
        print(f"warning  {plural(len(contradictions), 'image')} of train/ in more than one class, byte for byte:")
        _print_some([printable(", ".join(paths)) for paths in contradictions], NUM_PAIRS_SHOWN)
    for problem in problems:
        print(f"problem  {printable(problem)}")
    if found.bad:
        num = plural(len(found.bad), "image")
        print(f"problem  {num} that cannot be {_done(found)}; data.on_bad_image=quarantine would leave out:")
        _print_some([f"{image}; {image.cure}" for image in found.bad], NUM_SHOWN)
    if not found.images:
        print(f"\nno image in {printable(str(found.place))} was looked at")
        return
    known = len(found.images) - found.num_read
    seen = f"{found.num_read:,} were read, {known:,} have not changed since they were"
    print(f"\n{plural(len(found.images), 'image')} in {printable(str(found.place))}: {seen}")


def _print_split(split: str, found: Scan) -> None:
    counts = found.class_counts(split)
    total = f"{split + '/':<8} {plural(counts.total(), 'image')} in {plural(len(counts), 'class')}"
    if not counts:
        print(total)
        return
    fewest, most = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    if counts[fewest] == counts[most]:
        print(f"{total}: {counts[most]:,} in each")
    else:
        ends = [f"{counts[name]:,} ({printable(name)})" for name in (fewest, most)]
        print(f"{total}: {' to '.join(ends)}, the median is {statistics.median(counts.values()):,.0f}")
    few = [f"{printable(name)} ({count})" for name, count in counts.items() if count < FEW_IMAGES]
    if few:
        print(f"warning  fewer than {FEW_IMAGES} images in {len(few)} of them:")
        _print_some(few, NUM_PAIRS_SHOWN)
    elif counts[most] > IMBALANCE * counts[fewest]:
        times = counts[most] / counts[fewest]
        print(f"warning  {printable(most)} has {times:.0f} times the images of {printable(fewest)}")


def _done(found: Scan) -> str:
    return "used with the values they have" if any(image.kind == "grey_range" for image in found.bad) else "decoded"


def _print_some(lines: Sequence[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"           {line}")
    if len(lines) > limit:
        print(f"           and {len(lines) - limit:,} more (--json has all)")
