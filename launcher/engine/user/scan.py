"""Reads every sample of a user's own data set once, before training, for those that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from launcher.engine.device import num_cores
from launcher.engine.loading.samples import seed_generators
from launcher.engine.tuning.child import call_in_child
from launcher.engine.user.dataset import UserDataset
from launcher.errors import UsageError
from launcher.images.scan import Scan, ScannedImage
from launcher.recipe import load as recipes

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

FOREVER_S = 1e9


def scan(run: RunDir, heed_stop: Callable[[], None]) -> Scan:
    """What the samples of a run's data set are, in a child process: what raises is bad.

    Args:
        run: its recipe names the data set.
        heed_stop: called twice a second at least; what it raises ends the work.
    """
    recipe = recipes.read_resolved(run.recipe)
    found: Scan = call_in_child(lambda: _scan(recipe), timeout_s=FOREVER_S, heed_stop=heed_stop)
    return found


def _scan(recipe: Recipe) -> Scan:
    torch.set_num_threads(1)
    images: list[ScannedImage] = []
    classes: list[str] = []
    for split in filter(None, ("train", "val", recipe.data.test)):
        samples = UserDataset(recipe.data, split, lambda image: image, seed=recipe.seed)
        classes = classes or samples.classes
        readings = DataLoader(_Readings(samples), batch_size=None, num_workers=min(num_cores(), 8))
        for (key, label), problem in zip(samples.samples, readings, strict=True):
            names = tuple(samples.classes[one] for one in ([label] if isinstance(label, int) else label))
            images.append(
                ScannedImage(
                    path=key,
                    split=split,
                    class_name=";".join(names),
                    digest=f"{split}/{key}",
                    kind="raises" if problem else None,
                    message=problem,
                    notes=(),
                    several=names,
                )
            )
    folder = Path(recipe.data.path or ".")
    return Scan(folder=folder, images=images, num_read=len(images), warnings=[], classes=classes)


class _Readings(Dataset[str]):
    """What each sample raises, in words; empty: it can be read."""

    def __init__(self, samples: UserDataset) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        seed_generators(index)
        try:
            self._samples.load(index)
        except UsageError:
            raise  # it is wrong in kind, not a bad sample
        except Exception as error:  # whatever the user's code raises
            return f"{type(error).__name__}: {error}"
        return ""
