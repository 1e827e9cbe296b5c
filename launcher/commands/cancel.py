"""``launch cancel``: an end to a run, or to all runs of a sweep, wherever they are carried out."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, TrainingError, UsageError
from launcher.node.elastic import presence
from launcher.plan import batch_script
from launcher.runs import states, whereabouts
from launcher.runs.generations import Generations
from launcher.runs.run_dir import RunDir
from launcher.system import processes
from launcher.system.waiting import wait_until

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

END_S = 90
"""More than SLURM gives a job between SIGTERM and SIGKILL (KillWait, 30 s) and what a checkpoint takes."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch cancel``; return its exit code."""
    parser = parser_of("cancel", "Stop a run, or all of a sweep, wherever they run; a checkpoint is saved first.")
    parser.add_argument("path", metavar="RUN|SWEEP")
    args = parser.parse_args(argv)
    from launcher.system import console

    console.protect()
    run(args.path)
    return EXIT_OK


def run(path: str) -> None:
    """End a run, or every run of a sweep's folder; wait until nothing of them is left.

    Raises:
        UsageError: nothing of it runs, or it runs on another machine.
        TrainingError: it did not end.
    """
    listed = Path(path, batch_script.RUNS)
    if listed.is_file():
        cancel([RunDir(Path(path, Path(line).name)) for line in listed.read_text(encoding="utf-8").splitlines()])
    else:
        cancel([RunDir.existing(path)])


def cancel(runs: Sequence[RunDir]) -> None:
    """End some runs, all at the same time: their jobs, or their processes on this machine.

    Raises:
        UsageError: none of them runs, or one does on another machine.
        TrainingError: one did not end.
    """
    ids = {run: [found for found in (whereabouts.job_of(run), whereabouts.post_job_of(run)) if found] for run in runs}
    jobs = slurm_client.job_states([job_id for own in ids.values() for job_id in own])
    states = {
        run: whereabouts.settled(run.read_status()["state"], jobs[ids[run][0]] if ids[run] else None) for run in runs
    }
    alive = {run: [job_id for job_id in own if not jobs[job_id].over] for run, own in ids.items()}
    here = [run for run in runs if not ids[run] and states[run] not in whereabouts.OVER]
    if not here and not any(alive.values()):
        if len(runs) == 1:
            raise UsageError(f"{runs[0]}: {states[runs[0]]} already")
        counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
        raise UsageError(f"{runs[0].path.parent}: all of its runs are over already ({counts})")
    _end(here, [job_id for own in alive.values() for job_id in own])
    for run in runs:
        if run in here or alive[run]:
            _note(run, alive[run], is_trained=states[run] in whereabouts.TRAINED)


def _end(runs: Sequence[RunDir], job_ids: Sequence[str]) -> None:
    elastic = {run: Generations.by_hand(run) for run in runs if run.read_plan().is_elastic}
    here = [run for run in runs if run not in elastic]
    for run in here:
        host = run.read_launched().host
        if host != os.uname().nodename:
            raise UsageError(f"{run}: runs on {host}; cancel it there")
    pids = {pid for run in here if (pid := whereabouts.process_of(run))}  # one for all runs of a sweep
    started = {pid: processes.start_time(pid) for pid in pids}
    if job_ids:
        slurm_client.run("scancel", *job_ids)
    for pid in pids:
        os.kill(pid, _signal_for(pid))
    if pids:
        _wait(lambda: all(processes.start_time(pid) != started[pid] for pid in pids), f"process {min(pids)}")
    for generations in elastic.values():  # whichever nodes carry it out now, wherever they are
        generations.say_stop(reason="stopped by launch cancel", cause="preempted")
    for generations in elastic.values():
        _wait(functools.partial(_is_left, generations), f"a node of {generations.folder}")
    if job_ids:
        _wait(lambda: all(job.over for job in slurm_client.job_states(job_ids).values()), f"job {job_ids[0]}")


def _is_left(generations: Generations) -> bool:
    return not presence.living_nodes(generations)


def _signal_for(pid: int) -> signal.Signals:
    found = processes.stop_signal_for(pid)
    if found is None:
        raise TrainingError(f"process {pid} was started to ignore all stop signals; end it by: kill -9 {pid}")
    return found


def _note(run: RunDir, job_ids: Sequence[str], *, is_trained: bool) -> None:
    """Write down and say that a run was cancelled, or the job that makes the exports of one that is trained."""
    run.append_event("cancelled", job_id=job_ids[0] if job_ids else None)
    if is_trained:
        print(f"{run}: job {job_ids[0]} is cancelled, which was to make the exports; make them by: launch export {run}")
        return
    states.move(run, "cancelled")
    print(f"cancelled; go on with: launch resume {run}")


def _wait(is_over: Callable[[], bool], what: str) -> None:
    if not wait_until(is_over, timeout_s=END_S, heed=lambda: None, what=f"{what} to end"):  # Ctrl-C ends it by itself
        raise TrainingError(f"{what} has not ended in {END_S} s")
