"""Draws where a model looked: a heat map by Grad-CAM beside the picture that it saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.errors import UsageError
from launcher.runs.run_dir import RunDir
from launcher.tools import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from launcher.tools.trained_model import Prediction, TrainedModel

    Floats = NDArray[np.float32]

MAP_DIMS = 4
"""Of what a layer gives that still knows where things are: N x C x H x W."""
STRENGTH = 0.5
"""Of the heat map over the picture."""
GAP = 8
"""Pixels between the picture and the heat map."""


class Explainer:
    """Writes a picture for each prediction.

    Args:
        place: a run directory, whose best checkpoint is asked: gradients need torch.
        folder: where pictures are written.

    Raises:
        UsageError: it is no run, captum is not installed, or the folder cannot be made.
    """

    def __init__(self, place: str, folder: Path) -> None:
        if Path(place).is_file():
            raise UsageError(f"--explain: {place} is a file; name the run: gradients are computed by its checkpoint")
        try:
            from captum.attr import LayerAttribution, LayerGradCam
        except ImportError:
            raise UsageError("--explain needs captum: pip install 'finetune-launcher[explain]'") from None
        run = RunDir.existing(place)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{error.strerror or error}; name another folder for the pictures"
            raise UsageError(f"--out {folder}: cannot be made: {problem}") from error
        best = evaluate.load_best(run)
        self._classes = best.classes
        self._settings = best.preprocessing
        size, channels = self._settings.image_size, self._settings.channels
        self._stretch: Any = LayerAttribution.interpolate
        self._grad_cam: Any = LayerGradCam(best.module, last_map(best.module, size, channels))
        self._folder = folder
        self._names: set[str] = set()

    def each(self, predictions: Iterable[Prediction], model: TrainedModel) -> Iterator[Prediction]:
        """Pass predictions on, and draw the likeliest class of each that has one."""
        for found in predictions:
            if found.label is not None:
                self.draw(found.name, model.read(found.name), found.label)
            yield found

    def draw(self, name: str, image: Floats, label: str) -> Path:
        """Write the picture of an image and what speaks for a class; return its file.

        Args:
            name: of the image's file, whose stem the picture has.
            image: as the model sees it, float32 C x S x S.
            label: the class.
        """
        from PIL import Image

        heat = self.heat(image, label)[..., None]
        settings = self._settings
        mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (settings.mean, settings.std))
        picture = (image * std + mean).clip(0, 1).transpose(1, 2, 0)
        picture = picture.repeat(3 // picture.shape[2], axis=2)  # grey is drawn as RGB, too
        colours = np.concatenate([2 * heat, 2 * heat - 1, 0 * heat], axis=2).clip(0, 1)  # black, red, yellow
        over = picture * (1 - STRENGTH) + colours * STRENGTH
        gap = np.ones((len(picture), GAP, 3))
        both = np.concatenate([picture, gap, over], axis=1)
        target = self._folder / self._name(Path(name).stem)
        Image.fromarray((both * 255).round().astype(np.uint8)).save(target)
        return target

    def heat(self, image: Floats, label: str) -> Floats:
        """What speaks for a class, S x S, from 0 to 1."""
        given = torch.from_numpy(image)[None].requires_grad_()
        found = self._grad_cam.attribute(given, target=self._classes.index(label), relu_attributions=True)
        wide = self._stretch(found, image.shape[1:], interpolate_mode="bilinear")[0].sum(dim=0).detach().numpy()
        return np.asarray(wide / max(float(wide.max()), 1e-12), np.float32)

    def _name(self, stem: str) -> str:
        """Images of several folders may have the same name."""
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}-{number}"
        self._names.add(name)
        return f"{name}.explained.png"


def last_map(module: torch.nn.Module, size: int, channels: int) -> torch.nn.Module:
    """The last part of a network that still knows where things are.

    Raises:
        UsageError: there is none.
    """
    found: list[torch.nn.Module] = []

    def look(part: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == MAP_DIMS and min(output.shape[2:]) > 1:
            found.append(part)

    hooks = [part.register_forward_hook(look) for part in module.modules() if part is not module]
    try:
        with torch.inference_mode():
            module(torch.zeros(1, channels, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UsageError("--explain: no layer of this network gives a map of the picture, which Grad-CAM needs")
    return found[-1]
