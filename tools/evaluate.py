"""Opens a run's best checkpoint and its images: what exports are made of and measured by."""

from __future__ import annotations

import itertools
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine import data, losses
from launcher.engine.checkpoints import checkpoint
from launcher.engine.data import Preprocessing, build_loader
from launcher.engine.device import Device
from launcher.engine.model import build_module, build_preprocessing
from launcher.engine.network.fitting import load_state
from launcher.engine.schedule import epoch_order
from launcher.errors import UsageError
from launcher.images import folder as image_folder
from launcher.recipe import load as recipes
from launcher.recipe.images import listing_of, source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from launcher.engine.loading.samples import Samples
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

    Predictor = Callable[[torch.Tensor], torch.Tensor]
    """From normalised images, float32 N x 3 x S x S, to logits, float32 N x C."""

BATCH_SIZE = 32
MAX_KEPT_BYTES = 1 << 29
"""Of decoded images in memory: 3,500 of 224 px. More are decoded each time."""


@dataclass(frozen=True, kw_only=True)
class BestModel:
    """A run's best checkpoint, ready to compute with on the CPU."""

    module: torch.nn.Module
    """In eval mode."""
    recipe: Recipe
    """The run's."""
    classes: list[str]
    """Names, in the order of the logits."""
    preprocessing: Preprocessing
    """From a file's image to the module's input."""
    state: dict[str, Any]
    """``state.json`` of the checkpoint."""
    folder: Path
    """The checkpoint."""
    left_out: frozenset[str]
    """Paths of the images that the run does without, relative to its data folder."""
    temperature: float = 1.0
    """What logits are divided by before they become probabilities (post.calibrate)."""

    @property
    def independent(self) -> bool:
        """Whether each class has a probability of its own (a sigmoid); else they add up to 1 (softmax)."""
        return self.threshold is not None or self.recipe.train.loss in losses.INDEPENDENT

    @property
    def threshold(self) -> float | None:
        """The probability from which on an image has a class, of which it has any number; None: an image has one."""
        return self.recipe.data.threshold if self.recipe.data.task == "multi_label" else None

    def dataset(self, split: str) -> Samples:
        """One split, as validation sees it."""
        return data.open_split(self.recipe, split, self.preprocessing, left_out=self.left_out, classes=self.classes)

    def missing(self, split: str) -> str | None:
        """Why there is nothing of ``split`` to measure or calibrate with; None: there is."""
        if self.recipe.data.dataset:
            return self._missing_of_own(split)
        try:
            part = listing_of(self.recipe).part(split)
        except UsageError as error:
            return str(error)
        if part is None or not part.place.exists():
            return f"no images at {source_of(self.recipe).root / split}"
        unknown = sorted(set(part.class_names) - set(self.classes))
        if unknown:
            return f"{part.place}: holds classes that the model does not know, as {unknown[0]!r}"
        return None if len(self.dataset(split)) else f"no images at {part.place}"

    def _missing_of_own(self, split: str) -> str | None:
        """The same of a data set of the user's own, whose images may be gone."""
        try:
            self.dataset(split)
        except Exception as error:  # whatever the user's code raises; the model is exported all the same
            traceback.print_exc()
            return f"data.dataset (split={split}) raised {type(error).__name__}: {error}"
        return None

    def batches(self, split: str, indices: Sequence[int] | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images (float32 N x 3 x S x S) and labels (int64 N) of a split, or of some of its indices."""
        for images, labels in self.decoded(split, indices):
            yield self.preprocessing.normalize(images), labels

    def decoded(self, split: str, indices: Sequence[int] | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same before they are normalised: mostly uint8."""
        dataset = self.dataset(split)
        yield from loaded(dataset, in_batches(range(len(dataset)) if indices is None else indices))

    def augmented(self, num: int) -> Iterator[torch.Tensor]:
        """So many batches of training images, normalised, as they would be seen in the epochs after the run's last."""
        left_out, classes = self.left_out, self.classes
        dataset = data.open_split(
            self.recipe, "train", self.preprocessing, is_train=True, left_out=left_out, classes=classes
        )
        orders = (
            (epoch, epoch_order(self.recipe.seed, epoch, len(dataset)).tolist())
            for epoch in itertools.count(self.recipe.train.epochs)
        )
        positions = ((epoch, index) for epoch, order in orders for index in order)
        for images, _ in _loaded(dataset, [list(itertools.islice(positions, BATCH_SIZE)) for _ in range(num)]):
            yield self.preprocessing.normalize(images)


def in_batches(indices: Sequence[int]) -> list[list[int]]:
    """Of at most BATCH_SIZE."""
    return [list(indices[at : at + BATCH_SIZE]) for at in range(0, len(indices), BATCH_SIZE)]


def loaded(dataset: Samples, batches: Iterable[Sequence[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """These batches of indices, decoded."""
    yield from _loaded(dataset, [[(0, index) for index in batch] for batch in batches])


def _loaded(dataset: Samples, parts: list[list[tuple[int, int]]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    threads = torch.get_num_threads()
    workers = threads - 1 if len(parts) > threads else 0
    yield from build_loader(dataset, parts, workers=workers, device=Device(type="cpu"))


class KeptBatches:
    """The batches of a split, each time it is gone through; decoded only once if they fit into MAX_KEPT_BYTES.

    Args:
        best: whose images.
        split: train or val.
        indices: of the split; None: all.
    """

    def __init__(self, best: BestModel, split: str, indices: Sequence[int] | None = None) -> None:
        self._best, self._split, self._indices = best, split, indices
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images and labels."""
        normalize = self._best.preprocessing.normalize
        if self._kept is not None:
            yield from ((normalize(images), labels) for images, labels in self._kept)
            return
        kept, size = [], 0
        for images, labels in self._best.decoded(self._split, self._indices):
            size += images.nbytes
            if size <= MAX_KEPT_BYTES:
                kept.append((images, labels))
            yield normalize(images), labels
        if size <= MAX_KEPT_BYTES:
            self._kept = kept


def _warn(line: str) -> None:
    """Beside what a command prints."""
    print(line, file=sys.stderr)


def load_best(run: RunDir, data_path: str | None = None, warn: Callable[[str], None] = _warn) -> BestModel:
    """Read and verify the best checkpoint of ``run``; where it is damaged, the newest one that is whole.

    Args:
        run: the run directory.
        data_path: folder with the images; None: where the run had them.
        warn: gets a line if it is not the best one.

    Raises:
        UsageError: there is none yet.
        CheckpointError: it is damaged, and there is no other.
    """
    folder = _best_folder(run)
    if not folder.is_dir():
        raise UsageError(
            f"{run}: no best checkpoint yet: the first validation makes one; go on with: launch resume {run}"
        )
    recipe = recipes.read_resolved(run.recipe)
    if data_path is not None:
        path = str(Path(data_path).expanduser().absolute())
        recipe = replace(recipe, data=replace(recipe.data, name="imagefolder", path=path))
    folder, loaded = _load_or_newest(run, folder, warn)
    classes = loaded.state["classes"]
    preprocessing = build_preprocessing(recipe.model, recipe.data, num_classes=len(classes))
    size, channels = preprocessing.image_size, preprocessing.channels
    module = build_module(recipe.model, num_classes=len(classes), image_size=size, channels=channels)
    load_state(module, loaded.best_weights)
    return BestModel(
        module=module.eval(),
        recipe=recipe,
        classes=classes,
        preprocessing=preprocessing,
        state=loaded.state,
        folder=folder,
        left_out=image_folder.read_quarantine(run.bad_images),
    )


def _load_or_newest(run: RunDir, folder: Path, warn: Callable[[str], None]) -> tuple[Path, checkpoint.Checkpoint]:
    try:
        return folder, checkpoint.load(folder)
    except checkpoint.CheckpointError as error:
        newest = checkpoint.load_newest(run)
        if newest is None:
            raise
        warn(f"{error}; the newest whole checkpoint is taken instead of the best one: step {newest.step}")
        return run.checkpoint(newest.step), newest


def _best_folder(run: RunDir) -> Path:
    """The checkpoint that ``best`` links to; a copy of a run directory may lack the link."""
    best = run.read_status().get("best")
    linked = run.best_checkpoint.resolve()
    return linked if linked.is_dir() or not best else run.checkpoint(best["step"])


def size_mb(path: Path) -> float:
    """Size of a file, with the weights that ONNX keeps beside a large one."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
