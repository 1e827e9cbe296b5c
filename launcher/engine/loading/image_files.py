"""Samples whose images are files, listed however they are laid out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.engine.loading.decode import read_image
from launcher.engine.loading.kept_pixels import Keeping, KeptPixels
from launcher.engine.loading.samples import Samples
from launcher.images import folder as image_folder
from launcher.images.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class ImageDataset(Samples):
    """One split of images that are files.

    Args:
        listing: has them; or the folder that holds train/ and val/.
        split: train or val.
        transform: what ``read`` gives to uint8 3 x S x S.
        seed: the recipe's; the randomness of a sample's transform follows from (seed, epoch, index).
        left_out: keys that are no samples. Of training images the schedule leaves them out,
            so that the others keep their indices.
        classes: names in the order of the logits; None: those of the listing.
        read: from a path to what ``transform`` takes.
    """

    def __init__(
        self,
        listing: Listing | Path,
        split: str,
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        seed: int,
        left_out: frozenset[str] = frozenset(),
        classes: list[str] | None = None,
        read: Callable[[str], Any] = read_image,
    ) -> None:
        super().__init__(transform, seed=seed)
        if isinstance(listing, Path):
            listing = Listing.of_folder(listing)
        if classes is not None:
            listing = listing.with_classes(classes)
        self.classes = listing.classes
        self._folder = listing.root
        weights = listing.weights(split)
        found = listing.samples(split)
        stay = [place for place, (path, _) in enumerate(found) if listing.key(path) not in left_out]
        self.samples = [found[place] for place in stay]
        self.weights = weights and [weights[place] for place in stay]
        self._read = read
        self._kept: KeptPixels | None = None

    def key(self, index: int) -> str:
        """Its path below the folder."""
        return image_folder.relative(self.samples[index][0], self._folder)

    def load(self, index: int) -> Any:
        """The image as the transform takes it."""
        kept = self._kept.get(index) if self._kept else None
        return self._read(self.samples[index][0]) if kept is None else kept

    def use_kept(self, split: str, keeping: Keeping) -> None:
        """Take pixels that were prepared for this process, if there are any."""
        self._kept = KeptPixels.find(keeping, self._folder, split, lambda: self.digest)
