"""What `launch new` finds out about a data set before it chooses settings for it."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.errors import Problem, RecipeError
from launcher.images import candidates, datasets, members
from launcher.images import known_layouts as known
from launcher.images import listing as listings
from launcher.images import scan as image_scan
from launcher.images.candidates import VAL_FRACTION
from launcher.images.listing import Listing
from launcher.images.source import Source

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from launcher.images.scan import Scan

NUM_MEASURED = 200
"""Look at the size of so many images, spread over all of them: the header alone is read."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A data set, looked through."""

    source: Source
    """With the keys by which it can be read as it is."""
    lacks_classes: bool
    """Whether some classes have no validation image."""
    scan: Scan
    """Its images."""
    short_side: int
    """Median of the images' shorter sides, in pixels."""

    @property
    def train(self) -> Counter[str]:
        """Training images of each class."""
        return self.scan.class_counts("train")

    @property
    def num_val(self) -> int:
        """Validation images."""
        return self.scan.class_counts("val").total()

    @property
    def skew(self) -> float:
        """How many times more images the largest class has than the smallest."""
        counts = self.train.values()
        return max(counts) / max(1, min(counts))


def look(path: str) -> Found:
    """Find out how ``path`` holds images, and look through them.

    Raises:
        RecipeError: in no way that is known; says what a start would say.
    """
    place = datasets.prepare("imagefolder", path)
    source, lacks_classes = _readable(Source(path=str(place), named=path))
    scan = image_scan.scan(Listing(source), progress=image_scan.show_progress())
    return Found(source=source, lacks_classes=lacks_classes, scan=scan, short_side=_short_side(scan))


def _readable(source: Source) -> tuple[Source, bool]:
    """The source with what makes it readable, and whether classes lack validation images."""
    for allowed in ("error", "allow"):
        for candidate in _candidates(source):
            if not listings.find_problems(candidate, missing_val_classes=allowed, explained=False):
                return candidate, allowed == "allow"
    where = f"command line (--data {source.label})"
    found = [known.CURE.sub(r"launch new NAME --data \1", text) for text in listings.find_problems(source)]
    raise RecipeError([Problem(key="data.path", where=where, message=text) for text in found])


def _candidates(source: Source) -> Iterator[Source]:
    """The source as it is, divided here, and with the names that other tools give its parts and columns."""
    yield source
    yield replace(source, val_fraction=VAL_FRACTION)
    for found in itertools.islice(candidates.find(source), known.NUM_TRIED):  # those of the same place come first
        if found.path == source.path:
            yield replace(found, named=source.named)


def _short_side(scan: Scan) -> int:
    from PIL import Image

    good = [image.path for image in scan.images if not image.kind]
    sides = []
    for path in good[:: max(1, len(good) // NUM_MEASURED)]:
        with Image.open(members.stream(str(scan.folder / path))) as image:
            sides.append(min(image.size))
    return round(statistics.median(sides)) if sides else 0
