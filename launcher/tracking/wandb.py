"""A run's records as a run of Weights & Biases.

Where the server cannot be used the record is kept in the run directory, for ``wandb sync``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipe import load as recipes
from launcher.recipe import metrics as recipe_metrics
from launcher.runs import whereabouts
from launcher.system.redact import one_line
from launcher.tracking import wandb_folder, wandb_service, wandb_tables
from launcher.tracking.pictures import Pictures
from launcher.tracking.sink import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import wandb

    from launcher.plan.launch_plan import LaunchPlan
    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.records import Record, Story

DEFAULT_PROJECT = "finetune-launcher"
NOT_UPLOADED = ("optimizer.pt",)  # two thirds of a checkpoint, and only this run can use it
PROBE_S = 10.0
"""Seconds between two checks that wandb's folder can be written."""


class Wandb:
    """Sends with wandb's own client.

    A row's number is the record's, so the server takes none twice.

    Args:
        run: the run; wandb's own files go to its ``wandb/``.
        recipe: becomes wandb's config, with ``plan`` and ``facts`` as two more keys.
        plan: its ``run_id`` is the wandb run's id and name, so that a resumed run goes on in the same one.
        online: whether to send; else the record is kept in the run directory.
        say: called with a line, from whatever thread.
        beside: whether training runs on this machine, which wandb then watches.
        reason: why it is not sent, though that was asked for.
    """

    confirms = False

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        plan: LaunchPlan,
        *,
        online: bool,
        say: Callable[[str], None],
        beside: bool,
        reason: str | None = None,
    ) -> None:
        self.name = "wandb" if online else "wandb-offline"
        self._run = run
        self._recipe = recipe
        self._plan = plan
        self._online = online
        self._say = say
        self._beside = beside
        self._reason = reason
        self._pictures = Pictures(run, recipe)
        self._tracked: wandb.Run
        self.folder: Path
        """Of the record; there once it was opened."""
        self._probed = 0.0
        self._told: dict[str, Any] = {}
        # keep wandb's files out of the home folder; its crash reports need the network at exit
        os.environ.setdefault("WANDB_CACHE_DIR", str(run.wandb / "cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(run.wandb / "data"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

    def files(self) -> Sequence[Path]:
        """The offline records that nobody has sent yet; of others the server has some already."""
        if self._online:
            return ()
        return [folder for folder in self._run.wandb.glob("offline-run-*") if not wandb_folder.is_synced(folder)]

    def open(self, story: Story, sent: int) -> int:
        """Begin, or go on in the run that the server has."""
        self._check_folder()
        wandb_folder.await_new_name(self._run.wandb)
        try:
            self._tracked = self._start(story)
        except BaseException as error:  # a wrong key, a server that is down or slow
            wandb_service.end()
            if self._online:
                raise UnreachableError(one_line(error)) from error
            raise
        self.folder = Path(self._tracked.settings.sync_dir)
        self._define()
        if self._reason:
            self._tell_reason(self._reason)
        return max(sent, self._tracked.starting_step) if self._online else sent

    def send(self, record: Record) -> None:
        """Plot a line over its step, as ``train/loss``, ``train/lr``, ``val/top1``, ``epoch`` …."""
        row: dict[str, Any] = {**record.values, "epoch": record.epoch, "step": record.step}
        if record.is_best:
            row |= wandb_tables.of(record.line)
        row |= wandb_tables.of_best(record.validation, self._pictures)
        row |= wandb_tables.pictures(record, self._pictures)
        self._tracked.log(row, step=record.number)

    def flush(self, story: Story) -> None:
        """Tell what was found out since; look whether there is room."""
        if time.monotonic() - self._probed > PROBE_S:
            self._check_folder()
        told = {"facts": story.facts, "attempts": story.attempts}
        if told != self._told:
            self._told = told
            tracked: Any = self._tracked  # half typed
            tracked.config.update({"facts": story.facts}, allow_val_change=True)
            tracked.summary.update({"attempts": story.attempts})

    def close(self, story: Story, *, artifacts: Sequence[str]) -> None:
        """What the run came to, its models, an alert where it is over; then wait until all is sent."""
        self._check_folder()
        if story.best:
            best = story.best
            values = {
                f"best/{best['metric']}": best["value"],
                "best/epoch": best["epoch"] + 1,
                "best/step": best["step"],
            }
            self._tracked.summary.update(values)
        if "best" in artifacts:
            epoch = f"epoch-{story.best['epoch'] + 1}" if story.best else None
            self._best(["best", *([epoch] if epoch else [])])
        if "exports" in artifacts:
            self._exports()
        self._alert(story)
        if story.state == "preempted":
            self._tracked.mark_preempting()
        self._tracked.finish(exit_code=0 if story.state in (*whereabouts.TRAINED, "running", "pending") else 1)
        wandb_service.leave()
        sys.modules["wandb"].teardown()
        if self._online:
            if problem := wandb_folder.upload_error(self.folder):
                raise UnsentError(problem)
            wandb_folder.mark_synced(self._run)

    def _start(self, story: Story) -> wandb.Run:
        import wandb

        options = wandb_service.settings("online" if self._online else "offline", self._say, watch_machine=self._beside)
        wandb_service.start(options)
        asked = self._recipe.tracking.wandb
        plan = self._plan.to_dict() | asdict(self._run.read_launched())
        config = {**recipes.to_dict(self._recipe), "plan": plan, "facts": story.facts}
        return wandb.init(
            id=self._plan.run_id,
            name=self._plan.run_id,
            project=asked.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=asked.entity,  # None: WANDB_ENTITY, or the key's own
            group=asked.group or os.environ.get("WANDB_RUN_GROUP") or self._sweep(),
            tags=asked.tags or None,
            notes=asked.notes,
            dir=str(self._run.path),
            config=json.loads(json.dumps(config, default=str)),
            resume="allow",
            allow_val_change=True,  # a resumed run may have another plan
            settings=options,
        )

    def _tell_reason(self, reason: str) -> None:
        """Say why the record is kept here, and how it is sent; note for the report that the server lacks it."""
        self._run.append_event(wandb_folder.UNSYNCED, folder=self.folder.name, reason=reason)
        goes_on = "training goes on; " if self._beside else ""
        command = wandb_folder.sync_command([self.folder])
        self._say(f"wandb: offline: {reason}; {goes_on}`{command}` sends what is recorded")

    def _sweep(self) -> str | None:
        """Name of the sweep that the run is one of, by the names that its runs are given; None: it is of none."""
        above = self._run.path.parent.name
        return above if self._plan.run_id == f"{above}-{self._run.path.name}" else None

    def _define(self) -> None:
        # Over our own step, never wandb's: that counts records.
        self._tracked.define_metric("step")
        for pattern in ("train/*", "val/*", "test/*", "node*", "epoch"):
            self._tracked.define_metric(pattern, step_metric="step")
        for name, metric in recipe_metrics.of(self._recipe.metrics).items():
            self._tracked.define_metric(f"val/{name}", step_metric="step", summary=f"{metric.mode},last")

    def _check_folder(self) -> None:
        wandb_folder.check_writable(self._run.wandb)
        self._probed = time.monotonic()

    def _best(self, aliases: list[str]) -> None:
        folder = self._run.best_checkpoint.resolve()
        self._log_folder(folder, f"model-{self._plan.run_id}", {"checkpoint": folder.name}, aliases)

    def _exports(self) -> None:
        manifest = json.loads(self._run.export_manifest.read_text(encoding="utf-8"))
        self._log_folder(self._run.exports, f"exports-{self._plan.run_id}", manifest, ["latest"])
        for export in [manifest["reference"], *manifest["exports"]]:
            numbers = {key: value for key, value in export.items() if isinstance(value, (bool, int, float))}
            self._tracked.summary.update({f"exports/{export['format']}/{key}": value for key, value in numbers.items()})

    def _log_folder(self, folder: Path, name: str, metadata: dict[str, Any], aliases: list[str]) -> None:
        import wandb

        files = sorted(f for f in folder.glob("*") if f.is_file() and f.name not in NOT_UPLOADED)
        if not files:
            self._say(f"wandb: {folder}: nothing there to upload")
            return
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        for file in files:
            # Sent from where it lies: a copy in the home folder, which is wandb's default, can fill a quota.
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        self._tracked.log_artifact(artifact, aliases=aliases)

    def _alert(self, story: Story) -> None:
        """Tell who asked wandb for it that the run is over."""
        if story.state == "failed":
            why = story.message or f"launch why {self._run.path}"
            self._tracked.alert(f"{self._plan.run_id} failed", why, level="ERROR")
        elif story.state in whereabouts.TRAINED:
            best = story.best
            came_to = f"best {best['metric']} {best['value']:.4f} in epoch {best['epoch'] + 1}" if best else "done"
            self._tracked.alert(f"{self._plan.run_id} is {story.state.replace('_', ' ')}", came_to, level="INFO")


class UnsentError(Exception):
    """The server has not taken all of it."""
