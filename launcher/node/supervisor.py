"""The supervisor on each node: signals, torch's elastic agent, restarts, the post-step, the exit code.

``python -m launcher.node RUN`` runs it by hand; ``launch`` calls :func:`supervise` in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.errors import EXIT_OK, InterruptedRunError, TrainingError
from launcher.node import agent, agent_thread, finish, meeting, pixels
from launcher.node.elastic.course import Course, EndedError, LeaderLostError, StoppedError
from launcher.node.elastic.part import ElasticPart
from launcher.node.load_log import LoadLog
from launcher.node.signals import StopSignals
from launcher.runs import diagnose, history, quarantine, states, whereabouts
from launcher.runs.generations import Generations
from launcher.runs.run_dir import RunDir
from launcher.system import allocator, console, loader_room, network, phases, processes
from launcher.tracking import trackers as tracking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.images.scan import Scan
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.tracking.trackers import Trackers


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's part of a run to its end; return the exit code.

    Raises:
        LaunchError: training failed or was interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m launcher.node", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="the run directory")
    parser.add_argument("--node-rank", type=int, default=0, help="which of the run's nodes this is, from 0")
    parser.add_argument("--nodes", type=int, help="how many there are (default: as planned)")
    parser.add_argument("--procs", type=int, dest="procs_per_node", help="workers on each (default: as planned)")
    parser.add_argument("--rdzv-endpoint", help="how this node reaches node 0 (default: as planned)")
    parser.add_argument("--recipe-from-stdin", action="store_true", help="what this node was given, to be compared")
    args = parser.parse_args(argv)
    run = meeting.wait_for_run(args.run_dir) if args.node_rank else RunDir.existing(args.run_dir)
    given = {name: value for name, value in vars(args).items() if value is not None}
    recipe = json.load(sys.stdin) if given.pop("recipe_from_stdin") else {}
    return supervise(replace(run.read_plan(), recipe=recipe, **given))


def supervise(plan: LaunchPlan, *, first_attempt: int | None = None, start: str = "") -> int:
    """Run one node's part of a run to its end; return the exit code.

    Args:
        plan: as this node carries it out; a job has filled in where the nodes meet, and this node's address.
        first_attempt: number of the first start of the workers; None: the next.
        start: of a job, where the run goes on without nodes that are lost: tells its starts from each other.

    Raises:
        LaunchError: training failed or was interrupted.
    """
    console.protect()
    phases.show()
    run = meeting.wait_for_run(plan.run_dir) if plan.node_rank else RunDir(plan.run_dir)
    network.set_environment(plan.env)
    if plan.keep_freed_memory:
        allocator.keep_freed()
    loader_room.make()
    processes.adopt_orphans()
    elastic = plan.is_elastic
    with (
        finish.failure_reported(run, plan),
        _nothing_left(run, plan),
        StopSignals(run, node_rank=plan.node_rank, outlives_loss=elastic) as stop,
        LoadLog(run, plan),
        _tracked(run, plan, stop) as trackers,
    ):
        if plan.backend != "slurm" and plan.nodes > 1:
            heed_stop = functools.partial(_heed_stop, run, plan.node_rank, stop, " while the nodes meet")
            plan = meeting.meet(run, plan, heed_stop=heed_stop)
            network.set_environment(plan.env)
        if elastic:
            outcomes = _train_while_enough_live(run, plan, stop, start, trackers)
        else:
            attempt = first_attempt or history.next_attempt(run)
            _check_images(run, plan.node_rank, stop, attempt)
            with _explained(run, plan, stop, attempt):
                outcomes = agent.run_workers(run, plan, first_attempt=attempt, stop=stop)
            if "preempted" in outcomes.values():
                raise _interrupted(run, plan, stop, attempt)
        if 0 in outcomes and not plan.tune:  # the node that holds rank 0 finishes the run
            finish.finish(run, plan, stop, trackers)
    return EXIT_OK


def _tracked(run: RunDir, plan: LaunchPlan, stop: StopSignals) -> Trackers:
    """Whoever tells wandb and the like of the run: processes of their own, on the first node."""
    from launcher.recipe import load as recipes

    say = console.say_over
    if plan.node_rank or plan.tune or plan.debug:
        return tracking.Trackers(run, (), say=say, beside=True, stop=lambda: stop.requested)
    return tracking.beside(run, recipes.read_resolved(run.recipe), say=say, stop=lambda: stop.requested)


def _track_as_leader(run: RunDir, plan: LaunchPlan, trackers: Trackers) -> None:
    """Go on with what the first node began, which may be lost."""
    from launcher.recipe import load as recipes

    if names := trackers.take_over(tracking.possible(recipes.read_resolved(run.recipe))):
        print(f"{', '.join(names)}: node {plan.node_rank} goes on with it", flush=True)


def _train_while_enough_live(
    run: RunDir, plan: LaunchPlan, stop: StopSignals, start: str, trackers: Trackers
) -> dict[int, str]:
    """Train to the end with the nodes that are there, whichever are lost or come; return the last outcomes here."""
    agent.prepare()  # first: a node that is taken in begins at once
    generations = Generations(run, start) if start else Generations.by_hand(run)
    expected = plan.members or range(plan.nodes)
    with Course(run, plan, stop, generations, expected, trackers.pids) as course, _end_told(run, course):
        while True:
            try:
                attempt = course.next().attempt
                if course.leads and (plan.node_rank or course.generation.number > 1) and not plan.tune:
                    _track_as_leader(run, plan, trackers)
                outcomes = _train_in_generation(run, course, stop)
            except StoppedError:
                if not course.is_member:  # it only waited, and says nothing for the run
                    raise InterruptedRunError(f"{stop.reason} while it waited to be taken in") from None
                raise _interrupted(run, course.plan, stop, course.generation.attempt, speaks=True) from None
            except EndedError as ended:
                return _ended_without(run, ended)
            if outcomes is None or ("preempted" in outcomes.values() and course.goes_on()):
                continue
            if "preempted" in outcomes.values():
                raise _interrupted(run, course.plan, stop, attempt)
            return outcomes


def _train_in_generation(run: RunDir, course: Course, stop: StopSignals) -> dict[int, str] | None:
    """Train until a node is lost, or another one comes: then None."""
    plan, generation = course.plan, course.generation
    with _explained(run, plan, stop, generation.attempt), ElasticPart(run, course) as part:
        try:
            _check_images(run, plan.node_rank, stop, generation.first_attempt, also_heed=course.heed_wait)
            return agent.run_workers(run, plan, first_attempt=generation.attempt, stop=stop, part=part)
        except LeaderLostError:
            return None
        except (agent_thread.LeftError, agent.WorkersFailedError):
            if stop.cause != "lost_node" or not course.goes_on():
                raise
            return None


@contextlib.contextmanager
def _end_told(run: RunDir, course: Course) -> Iterator[None]:
    """Tell the nodes that wait to be taken in how the run has ended."""
    try:
        yield
    except InterruptedRunError as error:
        course.end(state="preempted", message=str(error))
        raise
    except Exception as error:
        course.end(state="failed", message=str(error))
        raise
    else:
        course.end(state=run.read_status()["state"])


def _ended_without(run: RunDir, ended: EndedError) -> dict[int, str]:
    """What a node leaves with that waited to be taken in when the run ended."""
    if ended.state in whereabouts.TRAINED:
        print(f"the run is {ended.state}, without this node; it is in {run}", flush=True)
        return {}
    why = f"the run has ended without this node: {str(ended) or ended.state}"
    if ended.state in ("preempted", "cancelled"):
        raise InterruptedRunError(why)
    raise TrainingError(f"{why}\nmore: launch why {run}")


@contextlib.contextmanager
def _nothing_left(run: RunDir, plan: LaunchPlan) -> Iterator[None]:
    """Leave no process of the run behind, and no meeting of its nodes, however it ends."""
    try:
        yield
    finally:
        processes.kill_descendants()
        if plan.node_rank == 0 and not plan.is_elastic:
            meeting.leave(run)


def _heed_stop(run: RunDir, node_rank: int, stop: StopSignals, awaited: str) -> None:
    """End this node where a stop was asked for before its workers have started; ``awaited`` says in which wait."""
    if stop.requested:
        if node_rank == 0:
            whereabouts.note_preempted(run)
        raise InterruptedRunError(
            f"{stop.reason}{awaited}, before training began; go on with: {whereabouts.resume_command(run)}"
        )


def _check_images(
    run: RunDir, node_rank: int, stop: StopSignals, attempt: int, also_heed: Callable[[], None] = lambda: None
) -> None:
    """Decide which images are left out, before any worker deals out the samples, and keep their pixels."""
    awaited = " while waiting for node 0 to look through the images" if node_rank else ""

    def heed(doing: str = awaited) -> None:
        _heed_stop(run, node_rank, stop, doing)
        also_heed()

    heed()
    quarantine.prepare(run, attempt=attempt, node_rank=node_rank, progress=heed, scan_own=_scan_own)
    pixels.keep(run, lambda: heed(" while the images were decoded"))


def _scan_own(run: RunDir, heed_stop: Callable[[], None]) -> Scan:
    from launcher.engine.user import scan

    return scan.scan(run, heed_stop)


@contextlib.contextmanager
def _explained(run: RunDir, plan: LaunchPlan, stop: StopSignals, attempt: int) -> Iterator[None]:
    """Record what ended the workers and raise it as an error with a message."""
    try:
        yield
    except agent_thread.LeftError:
        raise _interrupted(run, plan, stop, attempt) from None
    except agent.WorkersFailedError as error:
        if stop.requested:
            raise _interrupted(run, plan, stop, attempt) from None
        cause, message = diagnose.cause_of_end(run, error.attempt)
        with _even_if_full(run):
            if plan.node_rank == 0:
                states.move(run, "failed", attempt=error.attempt)
            run.append_event("attempt_ended", attempt=error.attempt, node=plan.node, cause=cause, message=message)
        why = diagnose.explain(run)
        if cause == "full_disk":  # of which no file could tell
            why = f"{message}\nwhat to do: {diagnose.what_to_do(run, {'kind': cause, 'message': message})}"
        raise TrainingError(f"training failed\n{why}\nmore: launch why {run}") from None


@contextlib.contextmanager
def _even_if_full(run: RunDir) -> Iterator[None]:
    """Go on even if the run directory cannot be written."""
    try:
        yield
    except OSError as error:
        print(f"{run}: cannot be written to: {error.strerror}", file=sys.stderr, flush=True)


def _interrupted(
    run: RunDir, plan: LaunchPlan, stop: StopSignals, first_attempt: int, *, speaks: bool = False
) -> InterruptedRunError:
    """The error to raise after a stop, which is recorded in the run's state and history.

    With ``speaks`` by this node, whichever it is: the first one may be lost.
    """
    node_rank, lost = plan.node_rank, stop.cause == "lost_node"
    reason = stop.reason or "stopped by the signal of another node"  # of which only a worker here has heard
    # Of a job only the first node writes: another one that was cut off may come to it when the run goes on elsewhere.
    if speaks or node_rank == 0 or (lost and plan.backend != "slurm"):
        attempt = history.next_attempt(run) - 1
        cause = stop.cause or history.cause_of_signal("")
        with _even_if_full(run):
            if attempt >= first_attempt:  # else the nodes were still waiting for each other
                run.append_event("attempt_ended", attempt=attempt, node=plan.node, cause=cause, message=reason)
            whereabouts.note_preempted(run)
    last = run.last_checkpoint
    kept = f"the checkpoint {last.resolve().name} is saved" if last.exists() else "it had not begun to train"
    told = "" if node_rank == 0 and plan.nodes == 1 else f" ({reason})"
    return InterruptedRunError(f"interrupted{told}; {kept}; go on with: {whereabouts.resume_command(run)}")
