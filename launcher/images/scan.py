"""Scans the images of a data folder: which cannot be decoded, which are unusual, which are there twice."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.images import cache as image_scan_cache
from launcher.images import folder as image_folder
from launcher.images import left_out as image_left_out
from launcher.images import levels as image_levels
from launcher.images import members
from launcher.images import walk as image_walk
from launcher.images.folder import printable
from launcher.images.listing import Listing, each_of
from launcher.images.pool import ProbePool
from launcher.system import cores as host_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from launcher.images.cache import Entries, Stamp
    from launcher.images.probe import Answer

CURES = {
    "unreadable": "correct its permissions, its name or the disk",
    "empty": "copy it again, or remove it",
    "not_an_image": "remove it, or give it the ending that it should have",
    "truncated": "copy it again, or remove it",
    "damaged": "copy or save it again, or remove it",
    "bomb": "scale it down, or remove it",
    "raises": "correct the data set's code, or the sample",
    "crashes_decoder": "save it again by another program, or remove it",
    "not_finite": "replace its NaN and infinite values, or remove it",
    "grey_range": "say what is black and white: data.grey_range=[0, 4095] where 12 bits were used, [0, 65535] where "
    "images of 16 bits are that dark",
}
"""The kinds of bad files, each with what to do."""
NOTES = {
    "cmyk": "CMYK, turned into RGB",
    "16_bit": "more than 8 bits per channel, scaled to 8",
    "palette": "with a palette, turned into RGB",
    "floats": "of floats, scaled to 8 bits",
    "rgba": "with transparency, composited on data.background",
    "invisible": "wholly transparent, so that only data.background is seen",
    "narrow": "more than 8 times as long as wide, of which only the centre is seen",
    "exif_rotated": "turned or mirrored as their EXIF data say",
    "animated": "with several frames or pages, of which the first counts",
}
"""Notes on files that are unusual but good, each with what the engine does."""
NOT_CACHED = ("unreadable", "crashes_decoder")
"""Faults that may go away without a change of the file: do not remember them."""
FILES_PER_WORKER = 100
PROGRESS_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedImage:
    """One file, as it was found."""

    path: str
    """Relative to the data folder."""
    split: str
    """train or val."""
    class_name: str
    """Its class folder; of several classes their names, joined."""
    digest: str
    """Hash of its content; empty where it cannot be read."""
    kind: str | None
    """What is bad about it, a key of CURES; None: nothing."""
    message: str
    """The same in words."""
    notes: tuple[str, ...]
    """What is unusual about it, keys of NOTES."""
    several: tuple[str, ...] | None = None
    """Its classes, where an image may have several or none."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its class, or each of its classes."""
        return (self.class_name,) if self.several is None else self.several

    @property
    def cure(self) -> str:
        """What to do about a bad one."""
        return CURES[str(self.kind)]

    def __str__(self) -> str:
        return f"{printable(self.path)}: {str(self.kind).replace('_', ' ')}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A data folder, looked through."""

    folder: Path
    """It holds train/ and val/."""
    images: list[ScannedImage]
    """All of them, in the order in which they are listed."""
    num_read: int
    """How many were read; the cache had the rest."""
    warnings: list[str]
    """Problems other than bad images."""
    left_out: list[str] = field(default_factory=list)
    """What lies in the folder and is not trained on, a sentence each."""
    levels: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Kinds of images with more than 8 bits, each with the lowest and the highest value of them all."""
    listing: Listing | None = None
    """What was looked through; None: a data set of the user's own."""
    classes: list[str] = field(default_factory=list)
    """Of a data set of the user's own."""

    @property
    def place(self) -> Path:
        """The folder or the list that was named."""
        return self.listing.source.place if self.listing else self.folder

    @property
    def bad(self) -> list[ScannedImage]:
        """Images that cannot be trained on."""
        return [image for image in self.images if image.kind]

    def class_counts(self, split: str) -> Counter[str]:
        """Good images of each class, 0 too, in the order of the classes."""
        names = self.listing.class_names(split) if self.listing else self.classes
        counts = Counter(dict.fromkeys(names, 0))
        good = (image for image in self.images if image.split == split and not image.kind)
        counts.update(name for image in good for name in image.class_names)
        return counts

    def noted(self) -> dict[str, list[str]]:
        """Paths of the images, by note; notes without images are left out."""
        found = {
            note: [image.path for image in self.images if note in image.notes]
            for note in {note for image in self.images for note in image.notes}
        }
        return {note: found[note] for note in NOTES if note in found}

    def leaks(self) -> list[tuple[str, str]]:
        """Images to measure with whose very bytes are a training image too: (training path, their path)."""
        train = {image.digest: image.path for image in self.images if image.split == "train" and not image.kind}
        val = (image for image in self.images if image.split != "train" and not image.kind)
        return [(train[image.digest], image.path) for image in val if image.digest in train]

    def contradictions(self) -> list[list[str]]:
        """Training images with the same bytes in different classes."""
        same: dict[str, list[ScannedImage]] = {}
        for image in self.images:
            if image.split == "train" and not image.kind:
                same.setdefault(image.digest, []).append(image)
        return [[i.path for i in group] for group in same.values() if len({i.class_name for i in group}) > 1]


def scan(
    data: Path | Listing,
    *,
    grey_range: Sequence[float] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Scan both splits; a file that was read before and has not changed is not read again.

    Args:
        data: a listing, or the folder that holds train/ and val/; a split that is missing has no images.
        grey_range: the recipe's ``data.grey_range``; None: auto.
        workers: processes that decode; None: one a core, fewer where there is little to do.
        progress: called at least twice a second with the number of files read and of all. If it raises, the scan ends
            and remembers what it has found.
    """
    listing = Listing.of_folder(data) if isinstance(data, Path) else data
    listed, left_out = _list(listing)
    folder = listing.root
    entries = image_scan_cache.load(folder)
    files = {path: file for path, file, _, _ in listed}
    stamps = {path: _stamp(file) for path, file in files.items()}
    new = [path for path, stamp in stamps.items() if path not in entries or entries[path][0] != stamp]
    warnings: list[str] = []
    try:
        with contextlib.closing(_read({files[path]: path for path in new}, workers, progress)) as found:
            for path, answer in found:
                entries[path] = stamps[path], answer
    finally:
        if new:
            warnings += _save(folder, {path: entries[path] for path in stamps if path in entries})
    levels = {path: entries[path][1][4] for path in files}
    problem = image_levels.judge(levels.values(), grey_range)
    images = []
    for path, _, split, names in listed:
        digest, kind, message, notes, _ = entries[path][1]
        if unfit := problem(levels[path]):
            kind, message = "grey_range", unfit
        image = ScannedImage(
            path=path,
            split=split,
            class_name=";".join(names),
            digest=digest,
            kind=kind,
            message=message,
            notes=notes,
            several=names if listing.source.several else None,
        )
        images.append(image)
    return Scan(
        folder=folder,
        images=images,
        num_read=len(new),
        warnings=warnings,
        left_out=left_out,
        listing=listing,
        levels=image_levels.span(levels.values()),
    )


def show_progress() -> Callable[[int, int], None]:
    """Progress for people: a line every few seconds, on standard error."""
    next_line = time.monotonic() + PROGRESS_S

    def show(done: int, total: int) -> None:
        nonlocal next_line
        if time.monotonic() > next_line:
            next_line += PROGRESS_S
            print(f"checking the images: {done:,} of {total:,} are read", file=sys.stderr, flush=True)

    return show


def _list(listing: Listing) -> tuple[list[tuple[str, str, str, tuple[str, ...]]], list[str]]:
    """Relative path, path, split and classes of every image; and what was left out, in words."""
    images: list[tuple[str, str, str, tuple[str, ...]]] = []
    left_out = [*image_left_out.describe_spellings(listing.root), *listing.left_out()]
    for split in listing.splits:
        if listing.part(split):
            names = listing.class_names(split)
            found = listing.with_classes(names).samples(split)
            of_each = ((path, tuple(names[place] for place in each_of(label))) for path, label in found)
            images += [(listing.key(path), path, split, own) for path, own in of_each]
    seen = {
        split: {image_walk.composed(name) for _, _, s, names in images if s == split for name in names}
        for split in image_folder.SPLITS
    }
    if unmeasured := sorted(seen["train"] - seen["val"]) if seen["val"] else []:
        left_out.append(f"val/: no image of {image_folder.few(unmeasured)}; what is learned of them is not measured")
    if unlearned := sorted(seen["val"] - seen["train"]) if seen["train"] else []:
        left_out.append(f"train/: no image of {image_folder.few(unlearned)}, which are seen in validation only")
    named = listing.classes if listing.source.classes else []
    if absent := [name for name in named if name not in seen["train"] | seen["val"]]:
        left_out.append(f"{listing.source.classes}: no image of {image_folder.few(absent)} anywhere")
    return images, left_out


def _stamp(file: str) -> Stamp:
    with contextlib.suppress(OSError):
        return members.stamp(file)
    return -1, -1


def _read(
    files: dict[str, str], workers: int | None, progress: Callable[[int, int], None] | None
) -> Generator[tuple[str, Answer]]:
    """Have processes read files; yield the relative path of each and its answer in the order in which they come."""
    if not files:
        return
    num = workers or max(1, min(host_cores.num_cores(), len(files) // FILES_PER_WORKER))
    done = 0
    with ProbePool(files, workers=num) as pool:
        for answers in pool.answers():
            yield from ((files[path], answer) for path, answer in answers)
            done += len(answers)
            if progress:
                progress(done, len(files))


def _save(folder: Path, entries: Entries) -> list[str]:
    """Remember the answers; return warnings if they cannot be written."""
    lasting = {path: entry for path, entry in entries.items() if entry[1][1] not in NOT_CACHED}
    try:
        image_scan_cache.save(folder, lasting)
    except OSError as error:
        what = f"{image_scan_cache.file_of(folder)}: cannot be written ({error.strerror})"
        return [f"{what}, so all images are read again next time; FINETUNE_LAUNCHER_CACHE names another folder"]
    return []
