"""A run's records as a run of MLflow, on its server or in the run directory."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from launcher.recipe.keys import flat, show

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlflow.entities import Metric

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.records import Record, Story

DEFAULT_EXPERIMENT = "finetune-launcher"
RUN_TAG = "launcher.run_id"
"""Tag by which a run is found again."""
MOST_CHARACTERS = 6000
"""Of a parameter's value, by MLflow's own limit."""
AT_ONCE = 1000
"""Measurements of a request, by MLflow's own limit; parameters: a tenth."""
STATES = {"completed": "FINISHED", "early_stopped": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
"""MLflow's word for how a run has ended; a run that goes on later is SCHEDULED until then."""


class Mlflow:
    """Sends with MLflow's client, whose server has taken what it has answered for.

    Args:
        run: the run directory.
        recipe: becomes the parameters.
        plan: its ``run_id`` is the run's name, and the tag by which it is found.
    """

    name = "mlflow"
    confirms = True

    def __init__(self, run: RunDir, recipe: Recipe, plan: LaunchPlan) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else a folder is refused, and a database is needed
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it needs the network
        from mlflow.tracking import MlflowClient

        self._run = run
        self._recipe = recipe
        self._plan = plan
        uri = recipe.tracking.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._is_own = uri is None
        self._client = MlflowClient(tracking_uri=uri or run.sink_folder(self.name).as_uri())
        self._id = ""
        self._waiting: list[Record] = []
        self._unsure = True

    def files(self) -> Sequence[Path]:
        """None: what was confirmed stays, and the rest is looked for."""
        return ()

    def open(self, story: Story, sent: int) -> int:  # noqa: ARG002
        """Find the run, or make it with the recipe as its parameters."""
        experiment = (
            self._recipe.tracking.mlflow.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        )
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([number], f"tags.`{RUN_TAG}` = '{self._plan.run_id}'")
        if runs:
            self._id = runs[0].info.run_id
        else:
            wandb = self._recipe.tracking.wandb
            tags = {RUN_TAG: self._plan.run_id, **dict.fromkeys(wandb.tags, "true")}
            tags |= {"mlflow.note.content": wandb.notes} if wandb.notes else {}
            self._id = self._client.create_run(number, run_name=self._plan.run_id, tags=tags).info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._parameters()
        return sent

    def send(self, record: Record) -> None:
        """Keep it for :meth:`flush`."""
        self._waiting.append(record)

    def flush(self, story: Story) -> None:  # noqa: ARG002
        """Send what waits; after a tracker that was killed, only what MLflow lacks of it."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_name(name), float(value), round(1000 * record.time), record.step)
            for record in self._waiting
            for name, value in {**record.values, "epoch": record.epoch}.items()
        ]
        if self._unsure and metrics:
            metrics = self._lacking(metrics)
            self._unsure = False
        for first in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[first : first + AT_ONCE])
        self._waiting.clear()

    def close(self, story: Story, *, artifacts: Sequence[str]) -> None:
        """What the run came to; models, where they go to another place than the run directory."""
        self.flush(story)
        if story.best:
            self._client.set_tag(self._id, "best", f"{story.best['metric']} {story.best['value']:.4f}")
        for name, value in story.facts.items():
            self._client.set_tag(self._id, f"facts.{name}", str(value)[:MOST_CHARACTERS])
        folders = {"best": self._run.best_checkpoint, "exports": self._run.exports}
        for name in () if self._is_own else artifacts:
            for file in sorted(folders[name].glob("*")):
                if file.is_file() and file.name != "optimizer.pt":
                    self._client.log_artifact(self._id, str(file), artifact_path=name)
        self._client.set_terminated(self._id, STATES.get(story.state, "SCHEDULED"))

    def _parameters(self) -> None:
        """The recipe; those that MLflow has stay: it lets none be changed."""
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        values = [(key, show(value)[:MOST_CHARACTERS]) for key, value in flat(self._recipe)]
        lacking = [Param(key, value) for key, value in values if key not in known]
        for first in range(0, len(lacking), AT_ONCE // 10):
            self._client.log_batch(self._id, params=lacking[first : first + AT_ONCE // 10])

    def _lacking(self, metrics: list[Metric]) -> list[Metric]:
        """Those that MLflow has not got yet."""
        held: dict[str, set[tuple[Any, ...]]] = {}
        for name in {metric.key for metric in metrics}:
            history = self._client.get_metric_history(self._id, name)
            held[name] = {(metric.timestamp, metric.step) for metric in history}
        return [metric for metric in metrics if (metric.timestamp, metric.step) not in held[metric.key]]


def _name(name: str) -> str:
    """Of a metric, in characters that MLflow allows; ``train/lr`` and ``train/lr/head`` would collide as files."""
    split, _, rest = name.partition("/")
    return re.sub(r"[^\w\-. :/]", "_", f"{split}/{rest.replace('/', '.')}" if rest else split)
