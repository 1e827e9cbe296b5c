"""A run's records as TensorBoard's event files, in ``tensorboard/``."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

from launcher.images.folder import printable
from launcher.recipe import load as recipes
from launcher.runs import thumbnails
from launcher.tracking.wandb_tables import in_words

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
        recipe: shown as text.
    """

    name = "tensorboard"
    confirms = False

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = run.sink_folder(self.name)
        self._recipe = recipe
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
        """A line's numbers, over its step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {**record.values, "epoch": record.epoch}
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        if wrong := record.validation.get("wrong"):
            lines = [
                f"{row['image']}: {in_words(row['true'])}, answered {in_words(row['predicted'])} {row['confidence']}"
                for row in wrong
            ]
            self._text("val/mistakes", "\n".join(lines), step=record.step)
            found += self._pictures(wrong)
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

    def _pictures(self, wrong: list[dict[str, Any]]) -> Iterator[Any]:
        """The surest wrong answers' images, where they are there and may be shown."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        rows = wrong if self._recipe.tracking.pictures else []
        for number, small in enumerate(thumbnails.jpegs(rows, self._recipe.data)):
            if small:
                width, height = Image.open(io.BytesIO(small)).size
                image = Summary.Image(encoded_image_string=small, width=width, height=height, colorspace=3)
                yield Summary.Value(tag=f"val/mistakes/{number + 1}", image=image)

    def _text(self, tag: str, text: str, *, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        # Four spaces are Markdown's way of leaving it as it is; a file's name need not be text.
        quoted = "\n".join(f"    {line}" for line in printable(text).splitlines())
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(tag, quoted)))
