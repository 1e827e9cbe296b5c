"""A run's records as TensorBoard's event files, in ``tensorboard/``."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

from launcher.images.folder import printable
from launcher.recipe import load as recipes
from launcher.tracking import drawing
from launcher.tracking.pictures import Pictures, in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.records import Record, Story


class TensorBoard:
    """Writes with TensorBoard's own writer, which needs no torch.

    Args:
        run: the run directory.
        recipe: shown as text; says where the images are.
    """

    name = "tensorboard"
    confirms = False

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = run.sink_folder(self.name)
        self._recipe = recipe
        self._pictures = Pictures(run, recipe)
        self._make = EventFileWriter
        self._facts: dict[str, Any] = {}

    def files(self) -> Sequence[Path]:
        """The event files: each tracker writes one."""
        return list(self._folder.glob("events.out.tfevents.*"))

    def open(self, story: Story, sent: int) -> int:  # noqa: ARG002
        """Begin a file, which has the recipe first."""
        self._writer = self._make(str(self._folder))
        if not sent:
            self._text("recipe", recipes.to_yaml(self._recipe))
        return sent

    def send(self, record: Record) -> None:
        """A line's numbers, over its step, and what there is to see of it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {**record.values, "epoch": record.epoch}
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        if wrong := record.validation.get("wrong"):
            self._text("val/mistakes", _answers(wrong), step=record.step)
            smalls = self._pictures.thumbnails(wrong)
            found += [_image(f"val/mistakes/{place + 1}", small) for place, small in enumerate(smalls) if small]
        if rows := record.line.get("examples"):
            self._text("val/examples", _answers(rows), step=record.step)
        shown = {"val/examples": self._pictures.examples(record), "train/batch": self._pictures.batch(record)}
        found += [_image(tag, drawing.grid(each)) for tag, each in shown.items() if each]
        found += _curves(record.validation)
        self._writer.add_event(Event(wall_time=record.time, step=record.step, summary=Summary(value=found)))

    def flush(self, story: Story) -> None:
        """Have TensorBoard see it."""
        if story.facts != self._facts:
            self._facts = story.facts
            self._text("facts", "\n".join(f"{name}: {value}" for name, value in story.facts.items()))
        self._writer.flush()

    def close(self, story: Story, *, artifacts: Sequence[str]) -> None:  # noqa: ARG002
        """What the run came to, as text."""
        best = story.best
        if best:
            self._text("best", f"{best['metric']} {best['value']:.4f} (epoch {best['epoch'] + 1}, step {best['step']})")
        self._writer.close()

    def _text(self, tag: str, text: str, *, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        # Four spaces are Markdown's way of leaving it as it is; a file's name need not be text.
        quoted = "\n".join(f"    {line}" for line in printable(text).splitlines())
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(tag, quoted)))


def _answers(rows: Sequence[dict[str, Any]]) -> str:
    """A line of each image: its true class and the answer."""
    return "\n".join(
        f"{row['image']}: {in_words(row['true'])}, answered {in_words(row['predicted'])} "
        f"{'no number' if row['confidence'] is None else row['confidence']}"
        for row in rows
    )


def _image(tag: str, picture: bytes) -> Any:
    """A JPEG or PNG."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = Image.open(io.BytesIO(picture)).size
    image = Summary.Image(encoded_image_string=picture, width=width, height=height, colorspace=3)
    return Summary.Value(tag=tag, image=image)


def _curves(validation: dict[str, Any]) -> Iterator[Any]:
    """ROC and precision over recall as pictures; the latter of each class also for TensorBoard's own page."""
    kinds = {
        "roc": ("val/roc", "ROC", "false positive rate", "recall"),
        "precision_recall": ("val/pr", "precision over recall", "recall", "precision"),
    }
    for key, (tag, *words) in kinds.items():
        found = validation.get(key)
        if found and found["mean"]:
            yield _image(tag, drawing.curves(found, *words))
    for name, values in ((validation.get("precision_recall") or {}).get("classes") or {}).items():
        if counted := (validation.get("classes") or {}).get(name):
            yield _precision_recall(f"val/pr/{printable(name)}", values, counted["val"], validation["samples"])


def _precision_recall(tag: str, precision: list[float], positive: int, samples: int) -> Any:
    """A curve as TensorBoard's plugin takes it: what is counted at each threshold, from the lowest one on.

    Args:
        tag: of it.
        precision: at even recalls, from 0 to 1.
        positive: images of the class.
        samples: of all classes.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT
    from tensorboard.plugins.pr_curve.metadata import create_summary_metadata

    num, rows = len(precision), []
    for place in reversed(range(num)):
        recall, right = place / (num - 1), precision[place]
        hits = recall * positive
        wrong = hits * (1 - right) / right if right else 0.0
        rows.append((hits, wrong, max(0.0, samples - positive - wrong), positive - hits, right, recall))
    columns = [value for column in zip(*rows, strict=True) for value in column]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in (len(rows[0]), num)])
    return Summary.Value(
        tag=tag,
        metadata=create_summary_metadata(display_name="", description="", num_thresholds=num),
        tensor=TensorProto(dtype=DT_FLOAT, float_val=columns, tensor_shape=shape),
    )
