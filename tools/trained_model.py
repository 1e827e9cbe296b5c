"""A trained model that classifies images: ``load(…).predict(["a.jpg"])``.

An ONNX file needs neither torch nor the images that it was trained on; a run without one is computed by its checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.errors import UsageError
from launcher.images import pixels
from launcher.runs.run_dir import RunDir
from launcher.system.cores import num_cores
from launcher.tools import publish
from launcher.tools.meaning import Meaning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from PIL.Image import Image as PillowImage

    from launcher.tools.evaluate import BestModel

    Source = str | os.PathLike[str] | bytes | PillowImage | NDArray[Any]
    """A file by its path, its content, or an image that is open."""
    Floats = NDArray[np.float32]

USUAL_TOP = 5
BATCH_SIZE = 32
"""Images that all cores compute at once. More were not faster on a CPU, and take memory."""
BATCH_OF_A_CORE = 4
"""Images at once where each core computes a batch of its own: more leave its caches (tests/bench/predict.py)."""
AHEAD = 3
"""Batches that are decoded ahead of those that are computed."""
ONNX, MANIFEST_FORMAT = ".onnx", "onnx"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image."""

    name: str
    """The image's path as it was given; of what has none, its number from 0."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest classes, the first one first, each with its probability from 0 to 1; empty if ``problem``. Where an
    image has several, those that reach the model's threshold before calibration, which may be none."""
    problem: str | None = None
    """Why the image could not be read; None: it was."""

    @property
    def label(self) -> str | None:
        """The likeliest class; None: the image could not be read, or has none of several."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """Of the likeliest class, from 0 to 1; None: there is none."""
        return self.top[0][1] if self.top else None


class TrainedModel:
    """Classifies images as validation did.

    Args:
        file: what it was loaded from.
        meaning: of the logits.
        facts: the preprocessing, as exports carry it.
        logits: from normalised images, float32 N x 3 x S x S, to float32 N x C.
        at_once: batches that are computed at the same time, each by one thread; 1: all threads compute one.
        read: from an open image to the model's input of it, float32 3 x S x S; None: as ``facts`` say.
    """

    def __init__(
        self,
        *,
        file: Path,
        meaning: Meaning,
        facts: dict[str, Any],
        logits: Callable[[Floats], Floats],
        at_once: int = 1,
        read: Callable[[PillowImage], Floats] | None = None,
    ) -> None:
        self.file = file
        self.classes = meaning.classes
        self.threshold = meaning.threshold
        self.facts = facts
        self._meaning = meaning
        self._logits = logits
        self.at_once = at_once
        self._levels = [] if read else _normalised_levels(facts)
        self._read = read or self._as_described

    def predict(self, images: Iterable[Source], *, top: int = 5, batch_size: int | None = None) -> list[Prediction]:
        """What the model says of each image, in their order.

        Args:
            images: paths, contents of files (bytes), images opened by Pillow, or uint8 arrays H x W x 3 (RGB).
            top: how many of the likeliest classes.
            batch_size: images that are computed at once; None: as many as is quick on a CPU.
        """
        return list(self.stream(images, top=top, batch_size=batch_size))

    def stream(self, images: Iterable[Source], *, top: int = 5, batch_size: int | None = None) -> Iterator[Prediction]:
        """As :meth:`predict`, one by one while the next images are decoded, in threads: of a million images a few."""
        size = batch_size or (BATCH_SIZE if self.at_once == 1 else BATCH_OF_A_CORE)
        numbered = enumerate(images)
        with (
            ThreadPoolExecutor(num_cores(), thread_name_prefix="decode") as decoders,
            ThreadPoolExecutor(self.at_once, thread_name_prefix="compute") as computers,
        ):
            ahead: deque[Future[list[Prediction]]] = deque()
            while True:
                while len(ahead) < self.at_once + AHEAD and (part := list(islice(numbered, size))):
                    decoded = [(_name(image, number), decoders.submit(self.read, image)) for number, image in part]
                    ahead.append(computers.submit(self._compute, decoded, top))
                if not ahead:
                    return
                yield from ahead.popleft().result()

    @property
    def usual_top(self) -> int:
        """How many classes of an image are told where nobody says it: of a model of several classes, all."""
        return min(USUAL_TOP, len(self.classes)) if self.threshold is None else len(self.classes)

    def read(self, source: Source, check: Callable[[PillowImage], None] | None = None) -> Floats:
        """The model's input of an image, float32 3 x S x S.

        Args:
            source: a path, the content of a file, an image opened by Pillow, or an array.
            check: looks at a file's image before its pixels are decoded; it raises what is wrong with it.
        """
        from PIL import Image

        if isinstance(source, np.ndarray):
            return self._read(Image.fromarray(source))
        if isinstance(source, Image.Image):
            return self._read(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if check:
                check(image)
            return self._read(image)

    def ranked(self, images: Floats, top: int) -> list[tuple[tuple[str, float], ...]]:
        """The likeliest classes of each image of a batch (float32 N x 3 x S x S), as a prediction's ``top``."""
        return self._meaning.likeliest(self._logits(images), top)

    def probabilities(self, images: Floats) -> Floats:
        """Of normalised images, float32 N x 3 x S x S, float32 N x C."""
        return self._meaning.probabilities(self._logits(images))

    def _compute(self, batch: list[tuple[str, Future[Floats]]], top: int) -> list[Prediction]:
        problems = [problem_of(error) if (error := future.exception()) else None for _, future in batch]
        images = [future.result() for (_, future), problem in zip(batch, problems, strict=True) if not problem]
        found = iter(self.ranked(np.stack(images), top) if images else ())
        return [
            Prediction(name=name, problem=problem) if problem else Prediction(name=name, top=next(found))
            for (name, _), problem in zip(batch, problems, strict=True)
        ]

    def _as_described(self, image: PillowImage) -> Floats:
        facts = self.facts
        rgb = pixels.to_rgb(image, facts.get("background", pixels.WHITE), facts.get("grey_range"))
        cropped = pixels.centre_crop(rgb, facts["resize_size"], facts["image_size"], facts["interpolation"])
        if facts.get("channels") == 1:
            cropped = cropped.convert("L")
        if len(self._levels) > 1:
            cropped = cropped.convert("RGB")  # grey is so only in exports of earlier versions
        values = np.atleast_3d(np.asarray(cropped))
        normalised = np.empty((len(self._levels), *values.shape[:2]), np.float32)
        for channel, levels in enumerate(self._levels):
            np.take(levels, values[..., channel], out=normalised[channel], mode="clip")
        return normalised


def load(path: str | os.PathLike[str], *, threads: int | None = None, many: bool = False) -> TrainedModel:
    """Open a trained model.

    Args:
        path: a run directory, or an ONNX file that was exported from one. Of a run, its accepted ``model.onnx`` is
            taken, or its best checkpoint (which needs torch) where there is none.
        threads: of the CPU; None: all cores.
        many: each thread computes batches of its own: quicker for many images, slower for one. Of ONNX files.

    Raises:
        UsageError: there is neither, or the file is not an export of ours.
    """
    file = Path(path)
    if file.suffix == ONNX or file.is_file():
        return _load_onnx(file, threads or num_cores(), many=many)
    run = RunDir.existing(path)
    exact = [row["file"] for row in accepted_onnx(run) if row["format"] == MANIFEST_FORMAT]
    if exact:
        return _load_onnx(run.exports / exact[0], threads or num_cores(), many=many)
    return _load_checkpoint(run, threads)


def accepted_onnx(run: RunDir) -> list[dict[str, Any]]:
    """Rows of the manifest: ONNX files of the best checkpoint that passed their gate and need no code of a user."""
    manifest = publish.read_manifest(run)
    if manifest is None:
        return []
    best, made_of = run.read_status().get("best"), manifest["checkpoint"]
    is_current = not best or best["step"] == made_of["step"]  # a run that was trained on may have a better one
    if not is_current or "transform" in manifest["preprocessing"]:
        return []
    files = [row for row in manifest["exports"] if row["file"].endswith(ONNX) and row["accepted"]]
    return [row for row in files if (run.exports / row["file"]).is_file()]


def _normalised_levels(facts: dict[str, Any]) -> list[Floats]:
    """What each of the 256 levels of a colour becomes, for each channel: quicker to look up than to compute."""
    levels = np.arange(256, dtype=np.float32)[:, None] / 255
    found = np.asarray((levels - np.float32(facts["mean"])) / np.float32(facts["std"]), np.float32)
    return [np.ascontiguousarray(found[:, channel]) for channel in range(found.shape[1])]


def _load_onnx(file: Path, threads: int, *, many: bool) -> TrainedModel:
    from launcher.tools import onnx_model

    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    try:
        session = onnx_model.open_session(file, threads=1 if many else threads, warn=_warn, spinning=False)
    except Exception as error:  # whatever ONNX Runtime raises of a foreign file
        other = "predictions are made by an ONNX file, or by a run: give RUN/exports/model.onnx, or RUN"
        raise UsageError(f"{file}: cannot be opened as ONNX: {error if file.suffix == ONNX else other}") from None
    said = session.get_modelmeta().custom_metadata_map
    if not {"classes", "preprocessing"} <= said.keys():
        raise UsageError(f"{file}: lacks the metadata of an export of `launch`: classes and preprocessing")
    facts = json.loads(said["preprocessing"])
    if "transform" in facts:
        raise UsageError(
            f"{file}: images are made by the user's own code, {facts['transform']}, which lies in the run: name the run"
        )
    meaning = Meaning(
        classes=json.loads(said["classes"]),
        independent=json.loads(said.get(onnx_model.INDEPENDENT, "false")),
        threshold=json.loads(said.get(onnx_model.THRESHOLD, "null")),
        temperature=json.loads(said.get(onnx_model.TEMPERATURE, "1.0")),
    )
    if onnx_model.is_baked(session):
        return _baked(file, session, meaning, facts)
    return TrainedModel(
        file=file,
        meaning=meaning,
        facts=facts,
        logits=lambda images: np.asarray(session.run(["logits"], {"images": images})[0]),
        at_once=threads if many else 1,
    )


def _baked(file: Path, session: Any, meaning: Meaning, facts: dict[str, Any]) -> TrainedModel:
    """A file that does the preprocessing itself: images of any size are computed one by one, as they are read."""
    from launcher.tools import baked

    def read(image: PillowImage) -> Floats:
        rgb = pixels.to_rgb(image, facts.get("background", pixels.WHITE), facts.get("grey_range"))
        found: Floats = baked.logits(session, np.asarray(rgb)[None], meaning)[0]
        return found

    return TrainedModel(file=file, meaning=meaning, facts=facts, logits=lambda images: images, read=read)


def _warn(line: str) -> None:
    """Beside the answers, which go to standard output."""
    print(line, file=sys.stderr)


def _load_checkpoint(run: RunDir, threads: int | None) -> TrainedModel:
    import torch

    from launcher.tools import evaluate

    if threads:
        torch.set_num_threads(threads)
    best = evaluate.load_best(run)

    def logits(images: Floats) -> Floats:
        with torch.inference_mode():
            found: Floats = best.module(torch.from_numpy(images)).float().numpy()
        return found

    return TrainedModel(
        file=best.folder,
        meaning=Meaning(
            classes=best.classes,
            independent=best.independent,
            threshold=best.threshold,
            temperature=temperature_of(run, best.state["step"]),
        ),
        facts=best.preprocessing.describe(),
        logits=logits,
        read=_own_transform(best) if best.recipe.data.transform else None,
    )


def temperature_of(run: RunDir, step: int) -> float:
    """What the exports of the checkpoint of a step were calibrated to; 1: they were not."""
    return publish.temperature_of(publish.calibration_of(run, step))


def _own_transform(best: BestModel) -> Callable[[PillowImage], Floats]:
    """The user's own transform, as validation uses it."""
    from torchvision.transforms import v2

    from launcher.engine.user.transform import UserTransform

    config, settings = best.recipe.data, best.preprocessing
    facts = {"mean": settings.mean, "std": settings.std, "interpolation": settings.interpolation}
    transform = UserTransform(config, train=False, image_size=settings.image_size, from_file=True, facts=facts)

    def read(image: PillowImage) -> Floats:
        rgb = pixels.to_rgb(image, settings.background, settings.grey_range)
        found: Floats = transform(v2.functional.pil_to_tensor(rgb)).numpy()
        return found

    return read


def _name(image: Source, number: int) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return str(getattr(image, "filename", "") or number)


def problem_of(error: BaseException) -> str:
    """Why an image could not be read, in a prediction's words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition(" <_io.BytesIO ")[0] or type(error).__name__  # where it lay in memory helps nobody
