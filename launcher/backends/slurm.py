"""A SLURM job by submitit: submit it, and follow it from the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from launcher import diagnose, job, slurm_client
from launcher.errors import EXIT_OK, EXIT_RESUMABLE, InterruptedRunError, TrainingError
from launcher.processes import STOP_SIGNALS
from launcher.run_dir import RunDir, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.plan import LaunchPlan
    from launcher.slurm_client import JobState

POLL_S = 2.0
MAX_FAILURES, PAUSE_S = 60, 10.0
LAST_LINES = 15


def submit(plan: LaunchPlan) -> int:
    """Submit the plan's script; follow the run to its end unless the plan says to detach.

    Raises:
        SlurmError: sbatch refused the job; with its own words.
        LaunchError: the run failed, was interrupted or cancelled.
    """
    run = RunDir(plan.run_dir)
    if plan.command:
        return _run_step(run, plan)
    job_id = _sbatch(run, plan.script)
    run.append_event("submitted", job_id=job_id)
    print(f"job {job_id} submitted", flush=True)
    post_id = _sbatch_post(run, plan.post_script, after=job_id) if plan.post_script else None
    if plan.detach:
        print(f"run:  {run}\nnext: launch logs {run} -f, launch ps, launch cancel {run}")
        return EXIT_OK
    try:
        _follow(job_id, run.supervisor_log(job_id, 0))
        _conclude(run, job_id)
        if post_id:
            _follow(post_id, run.supervisor_log(post_id, 0))
            _conclude(run, post_id)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job_id} goes on. Stop it by: launch cancel {run}")
    return EXIT_OK


def submit_array(base: Path, runs: Sequence[RunDir], script: str, *, detach: bool) -> None:
    """Submit the runs of a sweep as one job array, and say what becomes of them until all are over.

    Raises:
        SlurmError: sbatch refused the job.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    folder = base / "slurm"
    (base / "logs").mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    file = folder / "array.sh"
    write_text_atomic(file, script)
    array_id = slurm_client.run("sbatch", "--parsable", str(file)).strip().split(";")[0]
    ids = [f"{array_id}_{index}" for index in range(len(runs))]
    for job_id, run in zip(ids, runs, strict=True):
        DelayedSubmission(job.main, str(run.path)).dump(JobPaths(folder, job_id).submitted_pickle)
        run.append_event("submitted", job_id=job_id)
    print(f"job array {array_id}: {len(runs)} runs in {base}", flush=True)
    if detach:
        print(f"next: launch ps {base}, launch compare {base}")
        return
    try:
        _watch(dict(zip(ids, runs, strict=True)))
    except KeyboardInterrupt:
        print(f"\nno longer following; the jobs go on. Stop them by: scancel {array_id}")


def _watch(runs: dict[str, RunDir]) -> None:
    """One line for each change of a job's state, until all jobs are over."""
    shown: dict[str, str] = {}
    while True:
        states = _states(list(runs))
        for job_id, state in states.items():
            if shown.get(job_id) != state.state:
                print(f"{runs[job_id].path.name}: job {job_id} {state.state.lower()}", flush=True)
                shown[job_id] = state.state
        if all(state.over for state in states.values()):
            return
        time.sleep(POLL_S)


def _run_step(run: RunDir, plan: LaunchPlan) -> int:
    """Run the plan in the allocation that this process is in.

    Of the profile's setup nothing is done: this shell has been set up by whoever asked for the allocation.
    """
    environment = {**os.environ, **(plan.profile or {})["env"]}
    # In a session of its own: to a Ctrl-C of the terminal srun would only say how its tasks are.
    process = subprocess.Popen(plan.command, start_new_session=True, env=environment)

    def stop(_number: int, _frame: object) -> None:
        process.send_signal(signal.SIGUSR2)  # which srun hands on; on SIGTERM it has its tasks killed

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    earlier = set(run.slurm.glob("done-*"))
    try:
        code = process.wait()
        for said in set(run.slurm.glob("done-*")) - earlier:  # by the first node, for the whole run
            code = int(said.read_text(encoding="utf-8"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == EXIT_RESUMABLE:
        raise InterruptedRunError(f"interrupted; go on with: launch resume {run}")
    if code:
        raise TrainingError(f"srun ended with {code}; more: launch why {run}")
    return EXIT_OK


def _sbatch(run: RunDir, script: str) -> str:
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """submitit's, but what it submits is the text that the plan shows."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
            return script

    for name in set(os.environ) - set(slurm_client.clean_environment()):
        del os.environ[name]  # submitit hands its own environment to sbatch, and sbatch to the job
    try:
        submitted = Executor(run.slurm).submit(job.main, str(run.path))
    except (FailedJobError, RuntimeError) as error:
        run.update_status(state="failed")
        raise slurm_client.SlurmError(f"the job was refused: {error}") from None
    return str(submitted.job_id)


def _sbatch_post(run: RunDir, script: str, *, after: str) -> str:
    """Submit the job that makes the exports; it waits, through all requeues, for the training to end well."""
    file = run.slurm / "post.sh"
    write_text_atomic(file, script)
    waits = (f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes")
    job_id = slurm_client.run("sbatch", "--parsable", *waits, str(file)).strip().split(";")[0]
    run.append_event("post_submitted", job_id=job_id)
    print(f"job {job_id} will make the exports", flush=True)
    return job_id


def _follow(job_id: str, log: Path) -> None:
    """Show a job's log, and what becomes of the job, until it is over."""
    shown: JobState | None = None
    position = 0
    while True:
        state = _states([job_id])[job_id]
        position = _print_from(log, position)
        if state != shown and state.state in ("PENDING", "RUNNING"):
            reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
            where = f" on {state.nodes}" if state.nodes else reason
            print(f"job {job_id} {state.state.lower()}{where}", flush=True)
        shown = state
        if state.over:
            _print_from(log, position)
            return
        time.sleep(POLL_S)


def _states(job_ids: list[str]) -> dict[str, JobState]:
    """The jobs' states; waits for a controller that does not answer for a while, as when it is restarted."""
    for _ in range(MAX_FAILURES):
        try:
            return slurm_client.job_states(job_ids)
        except slurm_client.SlurmError as error:
            print(f"SLURM does not answer, asking again: {error}", file=sys.stderr, flush=True)
            time.sleep(PAUSE_S)
    return slurm_client.job_states(job_ids)


def _print_from(file: Path, position: int) -> int:
    """Print what was appended to a file since ``position``; return the new one."""
    try:
        with file.open("rb") as stream:
            stream.seek(position)
            text = stream.read()
    except FileNotFoundError:
        return position
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    return position + len(text)


def _conclude(run: RunDir, job_id: str) -> None:
    """Return where a job that is over ended well.

    Raises:
        LaunchError: it did not; says how, with the job's last words.
    """
    state = slurm_client.job_states([job_id])[job_id]
    found = run.read_status()["state"]
    if found in ("completed", "early_stopped") and state.state in ("COMPLETED", "UNKNOWN"):
        return
    if state.state == "CANCELLED":
        raise InterruptedRunError(f"job {job_id} was cancelled; go on with: launch resume {run}")
    if found == "preempted" and state.state != "FAILED":
        raise InterruptedRunError(f"job {job_id} ended as {state.state}; go on with: launch resume {run}")
    if found == "failed":
        raise TrainingError(f"job {job_id} ended as {state.state}\n{diagnose.explain(run)}\nmore: launch why {run}")
    logs = (run.supervisor_log(job_id, 0).with_suffix(".err"), run.batch_log(job_id))
    said = [f"{log}:\n{text}" for log in logs if (text := _last_lines(log))]
    raise TrainingError("\n".join([f"job {job_id} ended as {state.state} ({state.reason}), the run is {found}", *said]))


def _last_lines(file: Path) -> str:
    try:
        return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
    except FileNotFoundError:
        return ""
