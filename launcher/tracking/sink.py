"""What a place for records offers to :mod:`launcher.tracking.follow`, and which places there are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.records import Record, Story


class Sink(Protocol):
    """A place that a run's records go to.

    A tracker may be killed at any time. What it wrote into files of its own is then removed and written again by the
    next one; a server is asked what it holds.
    """

    name: str
    """By which it keeps how far it has come."""
    confirms: bool
    """Whether all that was sent is safe after :meth:`flush`."""

    def files(self) -> Sequence[Path]:
        """Files or folders of this run's records, each written by one tracker."""

    def open(self, story: Story, sent: int) -> int:
        """Begin; return how many of the records need not be sent.

        Args:
            story: the run as it is now.
            sent: so many were sent by trackers that ended well, or were confirmed.

        Raises:
            UnreachableError: the server cannot be used.
        """

    def send(self, record: Record) -> None:
        """Take a record."""

    def flush(self, story: Story) -> None:
        """All records of this look at the run were sent."""

    def close(self, story: Story, *, artifacts: Sequence[str]) -> None:
        """End; what was sent is safe when this returns.

        Args:
            story: the run as it has ended, or where the tracker leaves it.
            artifacts: what of ``best`` and ``exports`` is to be sent too.
        """


class UnreachableError(Exception):
    """The server cannot be used."""


EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Sinks whose package is an extra of ours, each with the module that it needs."""
NAMES = ("wandb", *EXTRAS)
"""Valid in ``tracking.backends``."""


def lacking(name: str) -> str | None:
    """What is not installed for a sink, and how to have it; None: all is there."""
    module = EXTRAS.get(name)
    if module is None or find_spec(module):
        return None
    return f"{name}: the package {module} is not installed: pip install 'finetune-launcher[{name}]'"


def build(name: str, run: RunDir, recipe: Recipe, plan: LaunchPlan) -> Sink:
    """Make a sink, other than wandb's (which first has to find out whether it can send).

    Raises:
        UsageError: its package is not installed.
    """
    if problem := lacking(name):
        raise UsageError(problem)
    if name == "tensorboard":
        from launcher.tracking.tensorboard import TensorBoard

        return TensorBoard(run, recipe)
    from launcher.tracking.mlflow import Mlflow

    return Mlflow(run, recipe, plan)
