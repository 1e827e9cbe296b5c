"""Decides what a run does about images that cannot be decoded, before the workers share out the samples.

``bad_images.json`` of the run directory lists them. It is written, perhaps empty, before any worker starts, and all
ranks leave out the images that it lists.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import Problem, RecipeError, TrainingError
from launcher.images import datasets
from launcher.images import folder as image_folder
from launcher.images import scan as image_scan
from launcher.images.folder import printable
from launcher.recipe import images as recipe_images
from launcher.runs import states
from launcher.system import phases
from launcher.system.files import write_json_atomic
from launcher.system.waiting import is_listed, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.images.scan import Scan
    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_data import DataConfig
    from launcher.runs.run_dir import RunDir

VERSION = 1
NUM_NAMED = 10
WAIT_S = 7200


def scan(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Look through a recipe's images, but not through those that the launcher or the user's own code has made."""
    config = recipe.data
    if config.dataset or datasets.DATASETS[config.name].write:
        return image_scan.Scan(folder=Path(config.path or "."), images=[], num_read=0, warnings=[])
    listing = recipe_images.listing_of(recipe)
    found = image_scan.scan(
        listing, grey_range=config.grey_limits, progress=progress or phases.counting("checking images")
    )
    for warning in (*found.warnings, *map(printable, found.left_out)):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    leaks = found.leaks()
    if leaks:
        measured = "validation and test images" if config.test else "validation images"
        print(
            f"warning: {len(leaks)} of the {measured} are training images too, byte for byte, as "
            f"{printable(leaks[0][1])}: what is measured will flatter; all of them: {_command(listing.source.place)}",
            file=sys.stderr,
            flush=True,
        )
    return found


def is_read_by_own_code(recipe: Recipe) -> bool:
    """Whether the samples that cannot be read are known to the user's own code only: it is asked before the workers."""
    return bool(recipe.data.dataset) and recipe.data.on_bad_image == "quarantine"


def check(recipe: Recipe, where: Callable[[str], str]) -> Scan | None:
    """Look through a recipe's images before anything is written; None: that comes later.

    Args:
        recipe: checked by recipe.load already.
        where: from a key to the place in the recipe's file.

    Raises:
        RecipeError: the recipe does not allow what was found; names the images.
    """
    if is_read_by_own_code(recipe):
        return None
    found = scan(recipe)
    problem = _refusal(found, recipe.data)
    if problem:
        raise RecipeError([Problem(key="data.path", where=where("data.path"), message=problem)])
    return found


def prepare(
    run: RunDir,
    *,
    attempt: int,
    node_rank: int,
    progress: Callable[[], None],
    scan_own: Callable[[RunDir, Callable[[], None]], Scan] | None = None,
) -> None:
    """See to it that ``bad_images.json`` is there and fit for an attempt that is about to start.

    Node 0 scans the images, unless that was done for this attempt already; the other nodes wait for its result.

    Args:
        run: the run directory.
        attempt: number of the next start of the workers.
        node_rank: which node this is.
        progress: called twice a second at least; what it raises ends the work.
        scan_own: looks through a data set of the user's own.

    Raises:
        TrainingError: the recipe does not allow what was found; the run's history says so.
    """
    from launcher.recipe import load as recipes

    recipe = recipes.read_resolved(run.recipe)
    if node_rank:
        _wait(run, attempt, progress)
        if recipe.data.on_bad_image == "error" and image_folder.read_quarantine(run.bad_images):
            raise TrainingError(f"there are bad images; node 0 names them, and so does {run.bad_images}")
        return
    if _attempt(run) == attempt:
        return
    show = phases.counting("checking images")

    def watch(done: int, total: int) -> None:
        progress()
        show(done, total)

    found = scan_own(run, progress) if scan_own and is_read_by_own_code(recipe) else scan(recipe, watch)
    record(run, recipe, found, attempt=attempt)
    problem = _refusal(found, recipe.data)
    if problem:
        run.append_event("attempt_started", attempt=attempt, node=0, workers=0)
        run.append_event("attempt_ended", attempt=attempt, node=0, cause="usage", message=problem)
        states.move(run, "failed", attempt=attempt)
        raise TrainingError(f"{problem}\nmore: launch why {run}")


def record(run: RunDir, recipe: Recipe, found: Scan, *, attempt: int) -> None:
    """Write ``bad_images.json`` for an attempt.

    Under quarantine an entry stays even if the file was repaired since: the set of images must not change during a run.
    """
    quarantine = recipe.data.on_bad_image == "quarantine"
    before = image_folder.read_bad_images(run.bad_images)
    if before is None and run.bad_images.exists():
        run.append_event("bad_images_lost", message=f"{run.bad_images}: damaged, and made anew from what is bad now")
    images = before["images"] if quarantine and before else []
    known = {image["path"] for image in images}
    added = [
        {"path": i.path, "split": i.split, "kind": i.kind, "message": i.message, "since_attempt": attempt}
        for i in found.bad
        if i.path not in known
    ]
    images += added
    value = {"version": VERSION, "attempt": attempt, "scanned": len(found.images), "leaked": len(found.leaks())}
    write_json_atomic(run.bad_images, {**value, "images": images}, durable=True)
    if quarantine and added:
        run.append_event("quarantined", images=[image["path"] for image in added], since_attempt=attempt)
    if quarantine and images:
        count = "1 image is" if len(images) == 1 else f"{len(images)} images are"
        print(f"{count} left out: they cannot be decoded ({run.bad_images.name})", flush=True)


def _command(folder: Path) -> str:
    return f"launch check {printable(shlex.quote(str(folder)))}"


def _attempt(run: RunDir) -> int:
    """The attempt for which node 0 has last scanned the images."""
    found = image_folder.read_bad_images(run.bad_images)
    return int(found["attempt"]) if found else 0


def _wait(run: RunDir, attempt: int, progress: Callable[[], None]) -> None:
    """Wait until node 0 has scanned the images for this attempt."""

    def is_written() -> bool:
        return is_listed(run.bad_images) and _attempt(run) >= attempt

    if not wait_until(is_written, timeout_s=WAIT_S, heed=progress, what="node 0 to look through the images"):
        raise TrainingError(
            f"{run.bad_images}: not written for attempt {attempt} after {WAIT_S} s; node 0 does so when it has "
            "looked through the images: is it running?"
        )


def _refusal(found: Scan, config: DataConfig) -> str | None:
    """Why a run must not start with these images, with what to do; None: it may."""
    folder = printable(str(found.folder))
    if config.on_bad_image == "error":
        if not found.bad:
            return None
        count = "1 image cannot" if len(found.bad) == 1 else f"{len(found.bad)} images cannot"
        # an image whose range does not fit can be decoded
        what = (
            "be used with the values they have"
            if any(image.kind == "grey_range" for image in found.bad)
            else "be decoded"
        )
        more = len(found.bad) - NUM_NAMED
        named = "".join(f"\n    {image}" for image in found.bad[:NUM_NAMED])
        named += f"\n    and {more} more" if more > 0 else ""
        return (
            f"{count} {what} in {folder}; repair or remove what is listed, or leave it out by "
            f"data.on_bad_image=quarantine; the whole list with cures: {_command(found.place)}{named}"
        )
    lost = [name for split in dict.fromkeys(image.split for image in found.bad) for name in _lost(found, split, config)]
    return f"{folder}: no image that can be decoded is left in {', '.join(lost)}; add some" if lost else None


def _lost(found: Scan, split: str, config: DataConfig) -> list[str]:
    """What of a split has images, and none that can be decoded; a class that has none at all is no matter of these.

    Of a test set a class may be lost, as it may lack classes: nothing is chosen by it.
    """
    of_split = [image for image in found.images if image.split == split]
    good = [image for image in of_split if not image.kind]
    may_lack = config.missing_val_classes == "allow" if split == "val" else split != "train"
    if good and may_lack:
        return []
    left = {name for image in good for name in image.class_names}
    lost = [name for name in dict.fromkeys(n for image in of_split for n in image.class_names) if name not in left]
    return [f"{split}/{name}" for name in lost] if good or lost else [f"{split}/"]
