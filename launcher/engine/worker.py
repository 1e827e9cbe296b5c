"""What runs on one rank, from its first line of log to its error file."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import itertools
import os
import sys
import time
import traceback
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.engine.device import Device
from launcher.engine.distributed import Ranks, init_process_group, record_collectives
from launcher.engine.error_kinds import error_kind, error_record
from launcher.engine.listeners import header
from launcher.engine.listeners.recorder import Recorder
from launcher.engine.loading.data_sets import open_data_sets
from launcher.engine.loading.handover import heed_stop_signal
from launcher.engine.optimizing import compiling
from launcher.engine.setup import build_parts
from launcher.engine.stopping import StopFlag
from launcher.engine.trainer import Trainer
from launcher.engine.tuning import autotune
from launcher.errors import EXIT_FAILED, EXIT_RESUMABLE
from launcher.recipe import load as recipes
from launcher.runs import findings
from launcher.runs.heartbeats import BUILDING, DUMP_SIGNAL, FIRST, MEASURING, STARTING, TRAINING
from launcher.runs.run_dir import ATTEMPT_VARIABLE, MEMORY_KILLS_VARIABLE, RunDir, node_name
from launcher.runs.worker_spec import WorkerSpec
from launcher.system import console, phases
from launcher.system import memory as host_memory
from launcher.system.files import write_json_atomic
from launcher.system.numa import Place, show_cores
from launcher.system.processes import die_with_parent, offer_to_kernel, telling_signal
from launcher.system.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.engine.schedule import Batching
    from launcher.engine.setup import Parts
    from launcher.engine.state import Outcome
    from launcher.recipe.schema import Recipe
    from launcher.runs.heartbeats import Heartbeats

TOLD = {
    STARTING: "starting the workers",
    MEASURING: "measuring batch size",
    BUILDING: "building the model",
    FIRST: "first batch",
}
"""Phases that people call otherwise."""
CALLS_BEFORE_STEP = 2
"""How often the training loop says that it lives before it has taken a step."""


def worker_main(run_path: str, beats: Heartbeats) -> Outcome:
    """Entry point of a forked worker; torch's agent has set torchrun's environment variables.

    Args:
        run_path: the run directory.
        beats: where this worker says that it lives, and what it is doing before its first step.
    """
    ranks = Ranks.from_environment()
    if place := Place.told(ranks.local_rank):
        place.take()  # before anything is counted, and any thread started
    spec = WorkerSpec(run_dir=run_path, attempt=int(os.environ[ATTEMPT_VARIABLE]))
    run = RunDir(run_path)
    own, folder = run.rank_error(spec.attempt, ranks.rank), run.attempt_errors(spec.attempt)
    stop = StopFlag(peer_failed=lambda: beats.any_failed or any(file != own for file in folder.glob("rank-*.json")))
    stop.install()
    beats.enter(ranks.local_rank)
    at = functools.partial(beats.beat, ranks.local_rank, ranks.rank)
    at(STARTING)
    # torch's own SIGINT may be ignored here. Where the supervisor dies, the workers save and leave.
    die_with_parent(telling_signal())
    offer_to_kernel(500)  # rather than the supervisor, which starts workers again
    supervisor = os.getppid()
    terminal = _redirect_output(run, spec, ranks)
    line = phases.Line(terminal)
    tell = _told(at, terminal, line) if ranks.rank == 0 else at
    if place:
        near = "" if place.node is None else f", near to NUMA node {place.node}"
        print(f"on cores {show_cores(place.cores)}{near}; its share is {place.num_cores} of them", flush=True)

    calls = itertools.count()

    def alive() -> None:
        stop.trains = True
        tell(FIRST if next(calls) < CALLS_BEFORE_STEP else TRAINING)

    begin = functools.partial(_begin, beats)
    with _telling(run, spec, ranks, stop, beats), phases.told_by(line) if ranks.rank == 0 else contextlib.nullcontext():
        with training(spec, ranks, stop, terminal, at=tell, begin=begin, alive=alive) as trainer:
            outcome = trainer.run()
        beats.rest(ranks.local_rank)
    console.drain()
    # From here on the agent's acknowledgement is awaited. Without an agent it would never come, and one that has lost
    # the other nodes waits for this worker instead.
    beats.leave(ranks.local_rank)
    die_with_parent()
    if os.getppid() != supervisor:
        os._exit(EXIT_RESUMABLE)
    return outcome


def _told(at: Callable[[str], None], terminal: IO[str], line: phases.Line) -> Callable[[str], None]:
    """The same, which tells the person at the terminal too what is being done before training."""
    before = own = ""

    def tell(phase: str) -> None:
        nonlocal before, own
        at(phase)
        # What is told within a phase goes on; but what a block put back after itself is over once it trains.
        if phase == before and phase != TRAINING:
            return
        before = phase
        if phase == TRAINING or (phase == FIRST and terminal.isatty()):  # where a bar has begun
            if line.phase == own:
                line.end()
        else:
            own = TOLD.get(phase, phase)
            line.at(own)

    return tell


def _begin(beats: Heartbeats) -> None:
    beats.begin(host_memory.num_kills())


@contextlib.contextmanager
def _telling(run: RunDir, spec: WorkerSpec, ranks: Ranks, stop: StopFlag, beats: Heartbeats) -> Iterator[None]:
    """Leave what ends this worker in its error file: by it the supervisor and `launch why` learn of it."""
    try:
        yield
    except BaseException as error:  # whatever it is
        lonely = error_kind(error) in ("peer_lost", "network")
        if stop() and not stop.trains and lonely:  # its peers were told to stop as this one was
            os._exit(EXIT_RESUMABLE)
        with contextlib.suppress(OSError):  # a full disk; the supervisor looks whether it is
            write_error(run, spec, ranks, error)
            if error_kind(error) == "memory_kill":
                run.append_event("memory_kill", attempt=spec.attempt, node=ranks.node_rank, rank=ranks.rank)
        beats.fail(ranks.local_rank)
        console.drain()
        os._exit(EXIT_FAILED)  # the agent would print the same traceback once more


def train_here(spec: WorkerSpec) -> Outcome:
    """Train as the only worker, in this process and on this terminal; what ends it leaves an error file, too."""
    stop = StopFlag()
    stop.install()
    phases.stop()  # in place they would overwrite a debugger's prompt
    try:
        with training(spec, Ranks(), stop, sys.stdout) as trainer:
            return trainer.run()
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk
            write_error_file(RunDir(spec.run_dir), spec, Ranks(), error)
        raise


@dataclass(frozen=True)
class _Nothing:
    """Stands for a trainer where there is nothing to train."""

    outcome: Outcome

    def run(self) -> Outcome:
        return self.outcome


@contextlib.contextmanager
def training(
    spec: WorkerSpec,
    ranks: Ranks,
    stop: Callable[[], bool],
    terminal: IO[str],
    *,
    at: Callable[[str], None] = lambda _: None,
    begin: Callable[[], None] = lambda: None,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Trainer | _Nothing]:
    """Build all that trains on this rank, and close it when that has come to its end or an agreed stop.

    Args:
        spec: what to train.
        ranks: who this is.
        stop: whether this rank was asked to stop.
        terminal: what rank 0 talks to the user by.
        at: told what this rank is about to do before it trains, and again while it gets on with it.
        begin: called when all ranks have tried what they try.
        alive: called at every step and validation batch.
    """
    run = RunDir(spec.run_dir)
    plan, recipe, data_sets = run.read_plan(), recipes.read_resolved(run.recipe), open_data_sets(run)
    device = Device(type=plan.device, index=ranks.local_rank)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    own: dict[str, Any] = {}
    say = functools.partial(print, file=terminal if ranks.rank == 0 else sys.stdout, flush=True)
    if recipe.batch.size == "auto" and not spec.debug:  # in children, before this process touches its device
        heed = functools.partial(_heed_in_probe, stop, at)
        own = autotune.tune_rank(run, recipe, ranks, device, data_sets, fresh=plan.tune, stop=heed, say=say)
    at(STARTING)
    _join_group(run, spec, device, ranks, recipe.train.hang_timeout_s, at)
    at(BUILDING)
    batching, nothing = _agree(run, recipe, ranks, own, say)
    if nothing or plan.tune:
        yield nothing or _Nothing("completed")
        _leave_process_group()
        return
    recorder, trainer = None, None
    try:
        begin()
        if own:
            torch.set_num_threads(own["threads"])
        workers, debug = own.get("workers"), spec.debug
        parts = build_parts(
            run, ranks, device, data_sets=data_sets, batching=batching, loader_workers=workers, debug=debug
        )
        at(FIRST)
        if ranks.rank == 0:
            recorder = _begin_record(run, parts, spec, terminal)
        _fit(parts, say)
        heed_stop_signal()
        memory_kills = int(os.environ.get(MEMORY_KILLS_VARIABLE, "0"))
        trainer = Trainer(parts, recorder=recorder, stop_requested=stop, alive=alive, memory_kills=memory_kills)
        yield trainer
    finally:
        if recorder:
            recorder.close()
    _leave_process_group()


def _heed_in_probe(stop: Callable[[], bool], at: Callable[[str], None]) -> bool:
    """Whether to stop; asked again and again while a probe runs, which has a time limit of its own."""
    at(MEASURING)
    return stop()


def _agree(
    run: RunDir, recipe: Recipe, ranks: Ranks, own: dict[str, Any], say: Callable[[str], None]
) -> tuple[Batching | None, _Nothing | None]:
    """The batch sizes that all ranks agree on, where they measured; nothing is trained where one was told to stop."""
    try:
        return (autotune.agree(run, recipe, ranks, own, say) if own else None), None
    except autotune.StoppedError:
        return None, _Nothing("preempted")


def _join_group(
    run: RunDir,
    spec: WorkerSpec,
    device: Device,
    ranks: Ranks,
    hang_timeout_s: float | None,
    at: Callable[[str], None],
) -> None:
    """Start the device, and the process group over it."""
    device.activate()
    if device.is_cuda:
        record_collectives(run.nccl_dump(spec.attempt), run.nccl_pipe(spec.attempt), hang_timeout_s)
    init_process_group(device, ranks, hang_timeout_s=hang_timeout_s, at=at)


def _fit(parts: Parts, say: Callable[[str], None]) -> None:
    """Have as many loader processes as there is room for, and the network compiled where the recipe says so."""
    if fewer := parts.fit_loading():
        say(fewer)
        parts.run.append_event("fewer_loaders", rank=parts.ranks.rank, message=fewer)
    if parts.recipe.train.compile and (problem := compiling.compile_network(parts.model.module, parts.device, say)):
        say(f"train.compile: {problem}; nothing is compiled")


def _begin_record(run: RunDir, parts: Parts, spec: WorkerSpec, terminal: IO[str]) -> Recorder:
    """What rank 0 tells the world by."""
    recorder = Recorder(
        run,
        parts.recipe,
        attempt=spec.attempt,
        console=terminal,
        num_steps=parts.num_steps,
        bar=not spec.debug,
    )
    recorder.status(epoch=0, step=0, num_steps=parts.num_steps, epochs=parts.recipe.train.epochs)
    recorder.facts(header.facts(parts))
    recorder.numerics(parts.numerics)
    for line in header.lines(parts):
        recorder.say(line)
    recorder.classes(len(parts.classes), findings.rare_classes(parts.images_per_class))
    return recorder


def _leave_process_group() -> None:
    """Only where all goes well: NCCL waits here for its collectives, and peers of a rank that failed sit in one.

    Such a rank says so in its error file and ends; the system closes its connections.
    """
    with contextlib.suppress(Exception):  # a peer that died already has closed its end
        dist.destroy_process_group()


def write_error(run: RunDir, spec: WorkerSpec, ranks: Ranks, error: BaseException) -> None:
    """Leave what ended this rank in its log and its error file."""
    with contextlib.suppress(OSError):
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
    write_error_file(run, spec, ranks, error)


def write_error_file(run: RunDir, spec: WorkerSpec, ranks: Ranks, error: BaseException) -> None:
    """Leave what ended this rank in its error file."""
    file = run.rank_error(spec.attempt, ranks.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    who = {"attempt": spec.attempt, "rank": ranks.rank, "node": ranks.node_rank, "host": node_name()}
    write_json_atomic(file, {"time": time.time(), **who, **error_record(error)})


def _redirect_output(run: RunDir, spec: WorkerSpec, ranks: Ranks) -> IO[str]:
    """Send standard output and error to the rank's log; return what rank 0 talks to the user by."""
    original = os.dup(1)
    log = run.rank_log(spec.attempt, ranks.rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    console.redirect(log)
    faulthandler.enable(sys.stderr)
    faulthandler.register(DUMP_SIGNAL, sys.stderr)
    return console.stream(original)
