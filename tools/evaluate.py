"""Measures a checkpoint and its exports, side by side, on the validation images.

``python -m launcher.tools.evaluate RUN`` prints the checkpoint's own top-1 once more.
"""

from __future__ import annotations

import argparse
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
from launcher.errors import EXIT_OK, UsageError, exit_code_of
from launcher.images import folder as image_folder
from launcher.recipe import load as recipes
from launcher.recipe.images import source_of
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from launcher.engine.loading.samples import Samples
    from launcher.recipe.schema import Recipe

    Predictor = Callable[[torch.Tensor], torch.Tensor]
    """From normalised images, float32 N x 3 x S x S, to logits, float32 N x C."""

BATCH_SIZE = 32


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
            part = data.listing_of(self.recipe).part(split)
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
        dataset = self.dataset(split)
        chosen = [(0, i) for i in (range(len(dataset)) if indices is None else indices)]
        parts = [chosen[i : i + BATCH_SIZE] for i in range(0, len(chosen), BATCH_SIZE)]
        threads = torch.get_num_threads()
        workers = threads - 1 if len(parts) > threads else 0
        for images, labels in build_loader(dataset, parts, workers=workers, device=Device(type="cpu")):
            yield self.preprocessing.normalize(images), labels


def load_best(run: RunDir, data_path: str | None = None) -> BestModel:
    """Read and verify the best checkpoint of ``run``.

    Args:
        run: the run directory.
        data_path: folder with the images; None: where the run had them.

    Raises:
        UsageError: there is none yet.
        CheckpointError: it is damaged.
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
    loaded = checkpoint.load(folder)
    classes = loaded.state["classes"]
    preprocessing = build_preprocessing(recipe.model, recipe.data, num_classes=len(classes))
    module = build_module(recipe.model, num_classes=len(classes), image_size=preprocessing.image_size)
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


def _best_folder(run: RunDir) -> Path:
    """The checkpoint that ``best`` links to; a copy of a run directory may lack the link."""
    best = run.read_status().get("best")
    linked = run.best_checkpoint.resolve()
    return linked if linked.is_dir() or not best else run.checkpoint(best["step"])


@torch.inference_mode()
def predict(predictors: Mapping[str, Predictor], best: BestModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run every predictor over all validation images, which are decoded once.

    Returns:
        The class each predicts, int64 N by name, and the true classes, int64 N; of several classes an image, a number
        for the set of them.
    """
    predicted: dict[str, list[torch.Tensor]] = {name: [] for name in predictors}
    true = []
    for images, labels in best.batches("val"):
        for name, predictor in predictors.items():
            predicted[name].append(answers_of(best, predictor(images)))
        true.append(set_numbers(labels > 0) if labels.dim() > 1 else labels)
    return {name: torch.cat(parts) for name, parts in predicted.items()}, torch.cat(true)


def answers_of(best: BestModel, logits: torch.Tensor) -> torch.Tensor:
    """What logits (N x C) answer, as a number an image."""
    if best.recipe.data.task == "multi_label":
        return set_numbers(logits.sigmoid() >= best.recipe.data.threshold)
    return logits.argmax(dim=1)


def set_numbers(sets: torch.Tensor) -> torch.Tensor:
    """A number for each set of classes (bool N x C), the same for the same set."""
    generator = torch.Generator().manual_seed(0)
    of_class = torch.randint(1 << 60, (sets.shape[1],), generator=generator)
    return (sets.long() * of_class).sum(dim=1)


def size_mb(path: Path) -> float:
    """Size of a file, with the weights that ONNX keeps beside a large one."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Print the best checkpoint's top-1 on all validation images."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.evaluate", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN")
    best = load_best(RunDir.existing(parser.parse_args(argv).run_dir))
    missing = best.missing("val")
    if missing:
        raise UsageError(missing)
    predicted, true = predict({"pytorch": best.module}, best)
    top1 = (predicted["pytorch"] == true).double().mean().item()
    print(f"{best.folder}: top1 {top1:.4f} on {len(true)} validation images")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
