"""The launcher's own listener, by which rank 0 tells the world: metrics.jsonl, events.jsonl, the terminal."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any

from launcher.recipe import metrics as recipe_metrics
from launcher.recipe.run_weights import AVERAGES
from launcher.runs import findings, generations, states
from launcher.system import phases
from launcher.system.files import write_json_atomic
from launcher.tracking.records import FACTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    from launcher.engine.numerics import Numerics
    from launcher.engine.state import Outcome
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir, State


RANKS_EVERY_S = 5.0
"""The file of the ranks' times is written again after so many seconds (of thousands of ranks it is large), or at once
where another rank is called slow."""


class Recorder:
    """Rank 0's records of one attempt.

    Args:
        run: where to.
        recipe: the run's.
        attempt: which start of the workers this is.
        console: the terminal or pipe that `launch` was started from.
        num_steps: optimizer steps of the whole training.
        bar: show a progress bar on a terminal; it would overwrite a debugger's prompt.
    """

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        *,
        attempt: int,
        console: IO[str],
        num_steps: int,
        bar: bool = True,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._console = console
        self._num_steps = num_steps
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = recipe.train.epochs
        self._table = recipe_metrics.of(recipe.metrics)
        watched = recipe.train.early_stopping.metric.partition("/")[2]
        self._said = [
            name for name, metric in self._table.items() if metric.at_terminal or not metric.value or name == watched
        ]
        """Metrics that the line of a validation has; the files have all."""
        self._hidden: set[str] = set()
        """Metrics that say nothing with so few classes."""
        self._ranks_written = 0.0
        self._named: int | None = None
        """The rank that the file of the ranks' times calls slow."""
        self._writing = threading.Lock()
        self._unwritten: list[Callable[[], object]] = []
        self._open = contextlib.ExitStack()
        if bar and console.isatty():
            self._start_progress()

    def say(self, line: str) -> None:
        """One line for the person at the terminal, and for the rank's log."""
        if self._console is not sys.stdout:
            with contextlib.suppress(OSError):  # a full disk
                print(line, flush=True)  # the rank's log
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=self._console, flush=True)

    def event(self, kind: str, **fields: Any) -> None:
        """A line of events.jsonl."""
        now = time.time()
        self._write(lambda: self._run.append_event(kind, time=now, attempt=self._attempt, rank=0, **fields))

    def resumed(self, *, epoch: int, step: int, offset: int, num_steps: int) -> None:
        """Training goes on from a checkpoint; the number of steps may have changed with the number of ranks."""
        self._num_steps = num_steps
        self.event("resumed", step=step, epoch=epoch, offset=offset)
        self.status(epoch=epoch, step=step, num_steps=num_steps)
        self.say(f"resumed at epoch {epoch + 1}, step {step}")

    def classes(self, num: int, rare: dict[str, int]) -> None:
        """Learn how many outputs the model has, and name the classes with few training images."""
        self._hidden = recipe_metrics.trivial(num)
        if rare:
            self.event("rare_classes", num_classes=len(rare), classes=dict([*rare.items()][: findings.NUM_SHOWN]))
            self.say(f"warning: {findings.describe_rare(rare)}")

    def facts(self, found: dict[str, Any]) -> None:
        """What the start has found out, for whoever tracks the run."""
        self.event(FACTS, **found)

    def numerics(self, agreed: Numerics) -> None:
        """Tell what the steps are computed in where the ranks' devices differ in what they can."""
        if agreed.why:
            self.event("numerics_agreed", **agreed.saved(), why=agreed.why)
            self.say(f"precision {agreed.precision} on all ranks: {agreed.why}")

    def status(self, state: State = "running", **fields: Any) -> None:
        """Write status.json."""
        self._write(lambda: states.move(self._run, state, attempt=self._attempt, **fields))

    def progress(self, *, epoch: int, step: int, part: float) -> None:
        """An optimizer step was taken; costs nothing off a terminal.

        Args:
            epoch: that it belongs to.
            step: steps taken in the whole training.
            part: of the epoch that is done, from 0 to 1.
        """
        if self._progress is not None and self._task is not None:
            steps = self._num_steps // self._epochs
            of_epoch = f"epoch {epoch + 1}/{self._epochs}  step {round(part * steps)}/{steps}"
            self._progress.update(self._task, total=self._num_steps, completed=step, of_epoch=of_epoch)

    def first_step(self, *, epoch: int, step: int, loss: float) -> None:
        """The loss of this rank's images in the first step: what the whole log waits for much longer."""
        self.say(f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._num_steps}  loss {loss:.4f} of rank 0's images")

    def step(self, *, epoch: int, step: int, values: dict[str, Any]) -> None:
        """The means over a window of steps."""
        self._metrics("train", epoch, step, values)
        text = self._shown(values)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, text=text)
        else:
            self.say(f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._num_steps}  {text}  lr {values['lr']:.2g}")

    def epoch(self, *, epoch: int, values: dict[str, Any]) -> None:
        """The means over the training images of an epoch, before its validation."""
        self.say(f"epoch {epoch + 1}/{self._epochs}  train  {self._shown(values)}")

    def _shown(self, values: dict[str, Any]) -> str:
        """Of training: what is measured, and the speed."""
        measured = {name: metric for name, metric in self._table.items() if metric.in_training}
        shown = [f"{name} {values[name]:{'.3f' if metric.fraction else '.4f'}}" for name, metric in measured.items()]
        return "  ".join([*shown, f"{values['images_per_s']:.0f} images/s"])

    def validation(self, *, epoch: int, step: int, values: dict[str, Any], best: bool) -> None:
        """The counts over the validation set after an epoch."""
        self._metrics("val", epoch, step, values)
        shown = [name for name in self._said if name not in self._hidden]
        shown += [f"{kind}_{name}" for kind in AVERAGES for name in shown if f"{kind}_{name}" in values]
        text = "  ".join(f"{name} {values[name]:.4f}" for name in shown)
        self.say(f"epoch {epoch + 1}/{self._epochs}  val  {text}{'  best so far' if best else ''}")

    def has_tested(self, split: str, best: dict[str, Any]) -> bool:
        """Whether the test set has been measured by this best checkpoint."""
        return states.is_tested(self._run.read_status(), split, best)

    def tested(self, split: str, best: dict[str, Any], values: dict[str, Any]) -> None:
        """The counts over the test set, when training is over."""
        self._metrics("test", best["epoch"], best["step"], {"test_set": split, **values})
        shown = {name: values[name] for name in self._table if name in values and name not in self._hidden}
        self.status(test=states.of_test(split, best) | {"samples": values["samples"], **_as_json(shown)})
        self.event("tested", samples=values["samples"], of_step=best["step"])
        said = "  ".join(f"{name} {values[name]:.4f}" for name in self._said if name in shown)
        self.say(f"test  {said}  ({values['samples']:,} images of {split}, best epoch {best['epoch'] + 1})")

    def ranks(self, times: dict[str, Any]) -> None:
        """What each rank did with the time of its last steps; the file has the last of them."""
        now = time.time()
        slowest = times["slowest"]
        named = slowest["rank"] if slowest["is_slow"] else None
        if now - self._ranks_written >= RANKS_EVERY_S or named != self._named:
            self._ranks_written, self._named = now, named
            self._write(
                lambda: write_json_atomic(self._run.rank_times, {"time": now, "attempt": self._attempt, **times})
            )

    def best_validation(self, found: dict[str, Any]) -> None:
        """What the report shows of the best checkpoint's validation, image by image and class by class."""
        self._write(lambda: write_json_atomic(self._run.validation, found))

    def checkpoint(self, *, step: int, best: bool, seconds: float, size_mb: float) -> None:
        """A checkpoint is on the disk."""
        self.event("checkpoint", step=step, seconds=round(seconds, 3), size_mb=round(size_mb, 3), best=best)

    def end(self, *, outcome: Outcome) -> None:
        """Training is over."""
        self.status(outcome)
        self.event("training_ended", outcome=outcome)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._open.close()
        if self._progress is not None:
            self._progress.stop()

    def _metrics(self, split: str, epoch: int, step: int, values: dict[str, Any]) -> None:
        record = {"time": time.time(), "split": split, "attempt": self._attempt, "epoch": epoch, "step": step, **values}
        self._write(lambda: self._run.append_metrics(**_as_json(record)))

    def _write(self, write: Callable[[], object]) -> None:
        """Write to the run directory; what a full disk does not take now is kept, in its order, for the next time."""
        generations.leave_if_over()
        with self._writing:  # the checkpoint's thread has events to tell
            self._unwritten.append(write)
            try:
                while self._unwritten:
                    self._unwritten[0]()
                    del self._unwritten[0]
            except OSError as error:
                problem = error
            else:
                return
        if len(self._unwritten) == 1:
            self.say(f"{self._run}: cannot be written to: {problem.strerror}; training goes on, its records wait")

    def _start_progress(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.fields[of_epoch]}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(file=self._console),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("train", total=self._num_steps, of_epoch="first batch", text="")
        self._progress.start()
        self._open.enter_context(phases.told_by(_OnBar(self._progress, self._task)))


class _OnBar:
    """Tells what is done between steps on the progress bar, where it has the epoch and its steps.

    Args:
        progress: the bar.
        task: of it.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self.phase = ""

    def at(self, phase: str) -> None:
        """It begins."""
        if phase and phase != self.phase:
            self._show(phase)
            self.phase = phase

    def update(self, detail: str) -> None:
        """How far it has come."""
        if self.phase:
            self._show(f"{self.phase} {detail}")

    def end(self, *, told: bool = True) -> None:  # noqa: ARG002  the next step shows where training is
        """It is over."""
        self.phase = ""

    def _show(self, text: str) -> None:
        self._progress.update(self._task, of_epoch=text)


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Null for NaN and infinity, which are no JSON: of one class there is no AUROC."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
