"""A SLURM job by submitit: submit it, and follow it from the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.backends.slurm import follow as slurm_follow
from launcher.backends.slurm import submission, task
from launcher.errors import EXIT_OK, EXIT_RESUMABLE, InterruptedRunError, PreflightError, TrainingError
from launcher.plan import batch_script
from launcher.runs import diagnose, history, states, whereabouts
from launcher.runs.run_dir import RunDir
from launcher.system import processes
from launcher.system.files import write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from launcher.plan.launch_plan import LaunchPlan

OF_THIS_SHELL = (
    "SLURM_CPU_BIND",
    "SLURM_MEM_BIND",
    "SLURM_GPU_BIND",
    "SLURM_GPUS_PER_TASK",
    "SLURM_TRES_PER_TASK",
    "SRUN_",
)
"""Beginnings of what a shell in an allocation is bound to, which srun would bind every worker to."""


def submit(plan: LaunchPlan) -> int:
    """Submit the plan's script; follow the run to its end unless the plan says to detach.

    Raises:
        PreflightError: sbatch refused the job; with its own words.
        LaunchError: the run failed, was interrupted or cancelled.
    """
    run = RunDir(plan.run_dir)
    if plan.command:
        return _run_step(run, plan)
    with _interruptible():
        job_id = _sbatch(run, plan)
        print(f"job {job_id} submitted", flush=True)
        post_id = _sbatch_post(run, plan.post_script, after=job_id) if plan.post_script else None
        if plan.detach:
            print(f"run:  {run}\nnext: launch logs {run} -f, launch ps, launch cancel {run}")
        else:
            _follow(run, plan, job_id, post_id)
    return EXIT_OK


def _follow(run: RunDir, plan: LaunchPlan, job_id: str, post_id: str | None) -> None:
    """Follow a run's job, and that of its exports, to the end, or until somebody does not want to any more."""
    try:
        # Where the run goes on without a node, any other may have the word.
        speakers = range(plan.machines if plan.is_elastic else 1)
        slurm_follow.follow(job_id, *(run.supervisor_log(job_id, node) for node in speakers))
        slurm_follow.conclude(run, job_id)
        if post_id:
            slurm_follow.follow(post_id, run.supervisor_log(post_id, 0))
            slurm_follow.conclude_post(run, post_id)
        elif plan.post_script:
            raise TrainingError(f"training is complete, its exports are not; make them by: launch export {run}")
    except KeyboardInterrupt:
        print(
            f"\nno longer following; job {job_id} goes on. Follow it by: launch logs {run} -f; "
            f"stop it by: launch cancel {run}"
        )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Take every stop signal for a Ctrl-C: it ends this process and no job that was submitted whole."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in processes.heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@_interruptible()
def submit_arrays(
    base: Path,
    arrays: Sequence[tuple[str, Sequence[RunDir]]],
    post_scripts: Sequence[str],
    *,
    detach: bool,
    in_turn: bool,
) -> bool:
    """Submit the runs of a sweep as job arrays, and say what becomes of them until all are over.

    Args:
        base: the sweep's folder.
        arrays: the script of each and its runs.
        post_scripts: of the job that makes each run's exports; empty where there is none.
        detach: return when all is submitted.
        in_turn: an array begins when the one before is over.

    Returns:
        Whether all are over.

    Raises:
        PreflightError: sbatch refused a job; then none of them is left.
    """
    folder = base / "slurm"
    (base / "logs").mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    jobs: dict[str, RunDir] = {}
    with _whole([run for _, runs in arrays for run in runs]) as submitted:
        for script, runs in arrays:
            after = (f"--dependency=afterany:{submitted[-1]}",) if in_turn and submitted else ()
            file = folder / f"array-{len(submitted)}.sh"
            write_text_atomic(file, script)
            array_id = submission.submit(file, *after, name=base.name, logs=base / "logs", known=submitted)
            submitted.append(array_id)
            elements = {f"{array_id}_{index}": run for index, run in enumerate(runs)}
            for job_id, run in elements.items():
                _hand_over(run, folder, job_id)
            jobs |= elements
            print(f"job array {array_id}: {len(runs)} runs in {base}", flush=True)
    posts = {}
    for (job_id, run), post_script in zip(jobs.items(), post_scripts, strict=True):
        post_id = _sbatch_post(run, post_script, after=job_id) if post_script else None
        if post_id:
            posts[post_id] = run
    if detach:
        print(f"next: launch ps {base}, launch compare {base}, launch cancel {base}")
        return False
    try:
        slurm_follow.follow_all(jobs, posts)
    except KeyboardInterrupt:
        print(
            f"\nno longer following; the jobs go on. Look at them by: launch ps {base}; "
            f"stop them by: launch cancel {base}"
        )
        return False
    return True


@contextlib.contextmanager
def _whole(runs: Sequence[RunDir]) -> Iterator[list[str]]:
    """Gather the ids of jobs that are submitted for some runs: whatever goes wrong in between, none of them is left."""
    submitted: list[str] = []
    try:
        yield submitted
    except BaseException as error:
        submission.take_back(submitted)
        with contextlib.suppress(OSError):  # a full disk may be what went wrong
            for run in runs:
                states.move(run, "failed")
        if isinstance(error, slurm_client.SlurmError):
            raise PreflightError(f"the job was refused: {error}") from None
        raise


def _hand_over(run: RunDir, folder: Path, job_id: str) -> None:
    """Leave in ``folder`` what submitit calls on the nodes of a job, and write down that it is the run's."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    DelayedSubmission(task.main, str(run.path)).dump(JobPaths(folder, job_id).submitted_pickle)
    run.append_event("submitted", job_id=job_id)


def _run_step(run: RunDir, plan: LaunchPlan) -> int:
    """Run the plan in the allocation that this process is in.

    Of the profile's setup nothing is done: this shell has been set up by whoever asked for the allocation.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_THIS_SHELL)}
    environment = {**kept, **(plan.profile.env if plan.profile else {})}
    # In a session of its own: to a Ctrl-C of the terminal srun would only say how its tasks are.
    process = subprocess.Popen(plan.command, start_new_session=True, env=environment)

    told: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if not told:
            process.send_signal(signal.SIGUSR2)  # which srun hands on
        elif number == signal.SIGINT:
            os.killpg(process.pid, signal.SIGTERM)  # each srun then has its tasks killed
        told.append(number)

    before = {number: signal.signal(number, stop) for number in processes.heeded()}
    earlier = set(run.slurm.glob("done-*"))
    try:
        code = process.wait()
        for said in sorted(set(run.slurm.glob("done-*")) - earlier):  # for the whole run; the last word counts
            code = int(said.read_text(encoding="utf-8"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    is_unsettled = run.read_status()["state"] in whereabouts.UNSETTLED
    if code and is_unsettled:
        states.move(run, "preempted" if told or code == EXIT_RESUMABLE else "failed")
    if code == EXIT_RESUMABLE or (code and told and is_unsettled):
        raise InterruptedRunError(f"interrupted; go on with: launch resume {run}")
    failed = diagnose.failed_checks(run)
    if failed:
        raise PreflightError("\n".join(["the check of the nodes failed", *failed]))
    if code:
        raise TrainingError(f"srun ended with {code}; more: launch why {run}")
    return EXIT_OK


def _sbatch(run: RunDir, plan: LaunchPlan) -> str:
    from submitit.core.utils import JobPaths

    run.slurm.mkdir(exist_ok=True)
    file = run.slurm / "submission.sh"
    with _whole([run]) as submitted:
        write_text_atomic(file, plan.script)
        known = [str(event["job_id"]) for event in history.events(run, "submitted")]
        job_id = submission.submit(file, name=plan.name, logs=run.logs, known=known)
        submitted.append(job_id)
        file.rename(JobPaths(run.slurm, job_id).submission_file)
        _hand_over(run, run.slurm, job_id)
    return job_id


def _sbatch_post(run: RunDir, script: str, *, after: str) -> str | None:
    """Submit the job that makes the exports; it waits, through all requeues, for the training to end well.

    Returns:
        Its id; None where it was refused, which is said: the training goes on.
    """
    run.slurm.mkdir(exist_ok=True)
    file = run.slurm / "post.sh"
    write_text_atomic(file, script)
    waits = (f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes")
    name = batch_script.post_name(run.read_plan().name)
    known = [str(event["job_id"]) for event in history.events(run, "post_submitted")]
    try:
        job_id = submission.submit(file, *waits, name=name, logs=run.logs, known=known)
    except slurm_client.SlurmError as error:
        said = f"the job that was to make the exports was refused: {error}; job {after} goes on and trains"
        print(f"warning: {said}; then: launch export {run}", file=sys.stderr, flush=True)
        return None
    run.append_event("post_submitted", job_id=job_id)
    print(f"job {job_id} will make the exports of {run.path.name}", flush=True)
    return job_id
