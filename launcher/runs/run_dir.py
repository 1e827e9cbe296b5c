"""Every file name of a run, in one class."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from launcher.errors import UsageError
from launcher.plan.launch_plan import Launched, LaunchPlan
from launcher.system.files import append_jsonl, check_room, fsync, write_json_atomic
from launcher.system.redact import redact_all

State = Literal["pending", "running", "preempted", "completed", "early_stopped", "failed", "cancelled"]
ATTEMPT_VARIABLE = "LAUNCH_ATTEMPT"
"""Environment variable with the number of a worker's attempt, which the supervisor counts."""
MEMORY_KILLS_VARIABLE = "LAUNCH_MEMORY_KILLS"
"""Environment variable of a worker: how many workers of its node the kernel has killed for lack of memory since the
last checkpoint."""
BATCH_LOG_VARIABLE = "LAUNCH_BATCH_LOG"
"""Environment variable of a node's supervisor: the log of its batch script; unset outside of one."""


def node_name() -> str:
    """This machine's name in SLURM, by which it can be excluded; it may differ from the host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


class RunDir:
    """The files of one run (a public contract: docs/run-directory.md).

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunDir:
        """Open the run at ``path``.

        Raises:
            UsageError: there is no run directory at ``path``.
        """
        run = cls(path)
        if not run.exists:
            missing = run.plan.name if run.recipe.is_file() else run.recipe.name
            found = f"a folder without {missing}" if run.path.is_dir() else "nothing"
            raise UsageError(f"{path}: not a run directory (found {found}); `launch ps` lists the runs there are")
        return run

    def __str__(self) -> str:
        """Relative to the working directory where that is shorter."""
        relative = os.path.relpath(self.path)
        return relative if len(relative) < len(str(self.path)) else str(self.path)

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        return self.plan.is_file() and self.recipe.is_file()

    @property
    def run_id(self) -> str:
        """The run's id, as fixed in the plan before it started."""
        return self.read_plan().run_id

    @property
    def recipe(self) -> Path:
        """The resolved recipe, every default written out."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan as carried out."""
        return self.path / "plan.json"

    @property
    def code(self) -> Path:
        """The folder of the user's own code as it was launched, with a manifest; there where the recipe names some."""
        return self.path / "code"

    @property
    def status(self) -> Path:
        """``{state, attempt, epoch, step, best, updated}``."""
        return self.path / "status.json"

    @property
    def bad_images(self) -> Path:
        """Images that cannot be decoded: ``{version, attempt, scanned, leaked, images}``; made before the workers."""
        return self.path / "bad_images.json"

    @property
    def tuning(self) -> Path:
        """Batch sizes that were measured: ``{version, batching, ranks}``; there with ``batch.size: auto``."""
        return self.path / "tuning.json"

    @property
    def events(self) -> Path:
        """One line per attempt, restart, signal, failure, checkpoint, export."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One line per logged training window and per validation."""
        return self.path / "metrics.jsonl"

    @property
    def rank_times(self) -> Path:
        """What each rank did with the time of its last steps: ``{time, attempt, step, slowest, step_s, …}``."""
        return self.path / "ranks.json"

    @property
    def validation(self) -> Path:
        """Of the best checkpoint's validation: classes, calibration, confusions, and single images."""
        return self.path / "validation.json"

    @property
    def sample_batch(self) -> Path:
        """Small pictures of training images as the model sees them."""
        return self.path / "sample_batch.json"

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return self.path / "logs"

    def attempt_logs(self, attempt: int) -> Path:
        """The folder of one attempt's rank logs."""
        return self.logs / f"attempt-{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """Standard output and error of one rank."""
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    def nccl_dump(self, attempt: int) -> Path:
        """Beginning of the file names of NCCL's flight recorder; torch adds the rank."""
        return self.attempt_logs(attempt) / "nccl-rank-"

    def nccl_pipe(self, attempt: int) -> Path:
        """Beginning of the names of the pipes that ask for it; torch adds the rank and ``.pipe``, and makes them."""
        digest = hashlib.sha256(f"{self.path} {attempt}".encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"launch-{digest}-"

    def launch_log(self, node_rank: int) -> Path:
        """Output of ``launch --detach`` on one node."""
        return self.logs / ("launch.log" if node_rank == 0 else f"launch-{node_rank}.log")

    def node_log(self, node_rank: int) -> Path:
        """Output of torch's elastic agent on one node."""
        return self.logs / f"node-{node_rank}.log"

    def node_load(self, node: int | str) -> Path:
        """What a node's cores, memory and GPUs did, a line now and then: ``{time, host, cpu, memory_mb, gpus, …}``."""
        return self.path / "system" / f"node-{node}.jsonl"

    @property
    def post_log(self) -> Path:
        """Output of the post-step."""
        return self.logs / "post.log"

    def attempt_errors(self, attempt: int) -> Path:
        """The folder of one attempt's error files."""
        return self.path / "errors" / f"attempt-{attempt}"

    def rank_error(self, attempt: int, rank: int) -> Path:
        """What ended a rank: ``{time, attempt, rank, node, kind, type, message, traceback}``."""
        return self.attempt_errors(attempt) / f"rank-{rank}.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def newest_state(self) -> dict[str, Any] | None:
        """``state.json`` of the newest checkpoint that has one; None where nothing was trained yet."""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            with contextlib.suppress(OSError, ValueError):  # half of one
                state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                return state
        return None

    @property
    def last_checkpoint(self) -> Path:
        """Symlink to the newest checkpoint."""
        return self.checkpoints / "last"

    @property
    def best_checkpoint(self) -> Path:
        """Symlink to the checkpoint with the best watched metric."""
        return self.checkpoints / "best"

    @property
    def exports(self) -> Path:
        """The folder of exported models."""
        return self.path / "exports"

    @property
    def export_manifest(self) -> Path:
        """What each exported model measured against its checkpoint."""
        return self.exports / "manifest.json"

    @property
    def report_json(self) -> Path:
        """The report, for programs."""
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        """The report, for people."""
        return self.path / "report.html"

    @property
    def model_card(self) -> Path:
        """What the model is, in Markdown."""
        return self.path / "model_card.md"

    @property
    def slurm(self) -> Path:
        """The folder of submitit's own files, and of the output of each node's supervisor."""
        return self.path / "slurm"

    def supervisor_log(self, job_id: str, node_rank: int) -> Path:
        """Standard output of one node's supervisor in a SLURM job; node 0's is what a terminal would show."""
        return self._of_job(job_id) / "slurm" / f"{job_id}_{node_rank}_log.out"

    def batch_log(self, job_id: str) -> Path:
        """Output of a SLURM job's batch script, with srun's own words."""
        return self._of_job(job_id) / "logs" / f"slurm-{job_id}.log"

    def _of_job(self, job_id: str) -> Path:
        """Where a job writes: an element of an array (``7_1``) into the folder of its sweep."""
        return self.path.parent if "_" in job_id else self.path

    def meeting(self, start: str) -> Path:
        """Where the nodes meet in one start of a SLURM job: ``{host, port, attempt}``."""
        return self.slurm / f"meeting-{start}.json"

    @property
    def meetings(self) -> Path:
        """The folder in which nodes started by hand exchange files before the workers start."""
        return self.path / "nodes"

    @property
    def meeting_by_hand(self) -> Path:
        """Node 0's answer to them: ``{created, problems, address}``."""
        return self.meetings / "meeting.json"

    def node_by_hand(self, node_rank: int) -> Path:
        """The facts of one of the other nodes."""
        return self.meetings / f"node-{node_rank}.json"

    def preflight(self, start: str) -> Path:
        """The folder in which the nodes exchange files before one start of a SLURM job."""
        return self.slurm / f"preflight-{start}"

    def bad_nodes(self, start: str, node_rank: int | str) -> Path:
        """Comma-separated names of nodes that one start of a SLURM job should leave out, as one node (``*``) found."""
        return self.slurm / f"bad-{start}-{node_rank}"

    def node_left(self, start: str, node: int | str) -> Path:
        """A node's exit code, made where it ended by itself, or else is started again; ``script``: it heard the end."""
        return self.slurm / f"left-{start}-{node}"

    def job_done(self, start: str) -> Path:
        """The run's exit code in one start of a SLURM job; made when all is done by the node that held rank 0."""
        return self.slurm / f"done-{start}"

    @property
    def wandb(self) -> Path:
        """The folder of wandb itself, when tracking is on."""
        return self.path / "wandb"

    def sink_folder(self, sink: str) -> Path:
        """The folder of another sink's own files: ``tensorboard/``, ``mlflow/``."""
        return self.path / sink

    def tracked(self, sink: str) -> Path:
        """How far a sink's tracker has come: ``{sent, before, …}``; ``.lock`` beside it: who tracks now."""
        return self.path / "tracking" / f"{sink}.json"

    def tracking_log(self, sink: str) -> Path:
        """What a sink's tracker and its libraries wrote."""
        return self.logs / f"tracking-{sink}.log"

    def create(self) -> None:
        """Make the folder and those of its folders that every run has; they survive a loss of power."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        fsync(self.path)
        for above in list(self.path.parents)[:2]:  # runs/ may be new, too
            with contextlib.suppress(OSError):  # a folder that may be passed through but not be read
                fsync(above)

    def problem(self) -> str | None:
        """Why nothing can be written here (a full disk, for example); None: it can."""
        try:
            check_room(self.path, f".room-{node_name()}-{os.getpid()}")
        except OSError as error:
            return f"{self}: cannot be written to: {error.strerror}"
        return None

    def read_plan(self) -> LaunchPlan:
        """The plan in ``plan.json``."""
        return LaunchPlan.from_dict(json.loads(self.plan.read_text(encoding="utf-8")))

    def read_launched(self) -> Launched:
        """By whom, when and with what code the plan was launched, as ``plan.json`` says too."""
        return Launched.from_dict(json.loads(self.plan.read_text(encoding="utf-8")))

    def write_plan(self, plan: LaunchPlan, launched: Launched) -> None:
        """Write ``plan.json``; it survives a loss of power."""
        write_json_atomic(self.plan, plan.to_dict() | asdict(launched), durable=True)

    def read_status(self) -> dict[str, Any]:
        """The content of ``status.json``; ``{"state": "pending"}`` where there is none, or half of one."""
        try:
            status: dict[str, Any] = json.loads(self.status.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {"state": "pending"}
        return status

    def update_status(self, **changes: Any) -> None:
        """Change some fields of ``status.json``. One process at a time writes it: rank 0, or the supervisor.

        The state goes by way of :func:`launcher.runs.states.move`.
        """
        write_json_atomic(self.status, {**self.read_status(), **changes, "updated": time.time()})

    def append_event(self, kind: str, **fields: Any) -> None:
        """Add a line ``{time, kind, host, …}`` to ``events.jsonl``; secrets in messages are hidden."""
        head = {"time": time.time(), "kind": kind, "host": node_name()}
        append_jsonl(self.events, head | redact_all(fields))

    def append_metrics(self, **fields: Any) -> None:
        """Add a line to ``metrics.jsonl``."""
        append_jsonl(self.metrics, {"time": time.time(), **fields})
