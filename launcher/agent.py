"""torch's elastic agent on one node: workers are forked from a process that has imported torch and torchvision once.

Measured against torchrun, which imports them in every worker: README, "Start-up".
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from launcher import diagnose, history, host_memory, network, processes, waiting, whereabouts
from launcher.peers import LOST_IDLE_S, Peers
from launcher.run_dir import ATTEMPT_VARIABLE, MEMORY_KILLS_VARIABLE
from launcher.watchdog import Heartbeats, Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.elastic.multiprocessing.api import LogsDest

    from launcher.run_dir import RunDir
    from launcher.stopping import StopSignals

SHUTDOWN_S = 10
JOIN_TIMEOUT_S = 900
IDLE_S = 2.0
"""After a stop, torch's agent gets as long without a living worker to come to an end by itself."""
SAVE_S = 60.0
"""How long the workers get to save and leave where another node is gone: some may wait for those of it for ever."""
ASK_S = LOST_IDLE_S + 2.0
"""How long a node is looked out for whose workers have vanished."""
STACK_BYTES = 64 << 20
"""Of the thread that forks the workers, on whose stack they run."""


class WorkersFailedError(Exception):
    """The workers failed for good; ``attempt`` is the number of the last start."""

    def __init__(self, attempt: int, reason: str) -> None:
        super().__init__(reason)
        self.attempt = attempt


class LeftError(Exception):
    """No worker of this node lives, and torch's agent waits for other nodes: of no use after a stop or a loss."""


class _NoRestartError(Exception):
    """Starting the workers again would not help."""


def run_workers(
    run: RunDir, plan: dict[str, Any], *, node_rank: int, first_attempt: int, stop: StopSignals
) -> dict[int, str]:
    """Start this node's workers and restart them when one dies, up to the plan's ``max_restarts``.

    Args:
        run: the run directory.
        plan: its ``plan.json``.
        node_rank: which node this is.
        first_attempt: number of the first start.
        stop: whether a stop was asked for.

    Returns:
        Each local worker's outcome, by global rank.

    Raises:
        WorkersFailedError: they failed, and no restart is left or would help.
        LeftError: this node left a wait for others, as ``stop`` says.
    """
    # The only import of torch on this node; torchvision brings the rest of what a worker needs.
    with processes.importing():
        worker_main = importlib.import_module("launcher.engine.worker").worker_main
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _log_to_file(run, node_rank)
    if plan["nodes"] == 1:
        _meet_at_once()
    beats = Heartbeats(plan["procs_per_node"])
    logs = _attempt_logs(run, node_rank=node_rank, first_attempt=first_attempt, stop=stop, beats=beats)
    watchdog = Watchdog(
        run,
        beats,
        timeout_s=plan["hang_timeout_s"],
        node_rank=node_rank,
        attempt=lambda: int(logs.attempt),
    )
    options: dict[str, Any] = {
        "min_nodes": plan["nodes"],
        "max_nodes": plan["nodes"],
        "nproc_per_node": plan["procs_per_node"],
        "logs_specs": logs,
        "run_id": plan["run_id"],
        "role": "worker",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": plan["rdzv_endpoint"],
        # Told, not guessed: comparing host names finds nodes that are not "me" (pytorch#73656).
        "rdzv_configs": {
            "is_host": node_rank == 0,
            **dict.fromkeys(("timeout", "join_timeout", "read_timeout"), JOIN_TIMEOUT_S),
        },
        "max_restarts": plan["max_restarts"],
        "start_method": "fork",
        "local_addr": network.local_address(*_split(plan["rdzv_endpoint"])),
        "shutdown_timeout": SHUTDOWN_S,
    }
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # torch 2.9 has fewer
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    agent = _Agent(lambda: elastic_launch(config, worker_main)(str(run.path), beats))
    peers = Peers(plan, node_rank=node_rank)
    try:
        with watchdog, peers:
            try:
                outcomes = agent.attend(run, stop, peers, beats)
            except (ChildFailedError, _NoRestartError):
                if plan["nodes"] > 1 and diagnose.cause_of_end(run, logs.attempt)[0] == "lost_worker":
                    _ask_for_lost(stop, peers)
                raise
    except RendezvousError as error:
        if plan["nodes"] == 1:
            raise WorkersFailedError(logs.attempt, str(error).splitlines()[0]) from error
        stop.request(reason=peers.why_apart(), cause="lost_node")
        raise LeftError from None
    except (ChildFailedError, _NoRestartError) as error:
        with contextlib.suppress(OSError):  # a full disk
            logs.note_kill()
        raise WorkersFailedError(logs.attempt, str(error).splitlines()[0]) from error
    return outcomes


class _Agent:
    """torch's elastic agent, in a thread.

    It waits in C code for minutes, where no signal is heeded: for nodes to come, and for nodes to be done. The main
    thread stays free to take signals, to look after the other nodes, and to leave.

    Args:
        launch: runs the workers to their end.
    """

    def __init__(self, launch: Callable[[], dict[int, str]]) -> None:
        self._launch = launch
        self._outcomes: dict[int, str] = {}
        self._error: BaseException | None = None
        before = threading.stack_size(STACK_BYTES)
        self._thread = threading.Thread(target=self._work, name="agent", daemon=True)
        self._thread.start()
        threading.stack_size(before)

    def _work(self) -> None:
        try:
            self._outcomes = self._launch()
        except BaseException as error:  # raised again by attend
            self._error = error

    def attend(self, run: RunDir, stop: StopSignals, peers: Peers, beats: Heartbeats) -> dict[int, str]:
        """Wait for the workers' outcomes; stop where another node is gone or was told to.

        Where a node is lost when all is trained, there is nothing to wait for: rank 0's outcome is in the run's state.

        Raises:
            LeftError: this node left a wait for others, as ``stop`` says.
        """
        notice = waiting.Notice()
        busy = stopping_since = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(waiting.POLL_S)
            now, living = time.monotonic(), beats.living()
            if living:
                busy = now
            idle = now - busy > IDLE_S
            if stop.requested:
                peers.tell(stop.reason)
                if stop.cause == "lost_node" and now - stopping_since > SAVE_S:
                    _kill(living)
                if idle and self._thread.is_alive():
                    raise LeftError
                continue
            stopping_since = now
            notice.say(peers.awaited())
            lost = peers.lost(idle=idle)
            if lost and idle and (state := run.read_status()["state"]) in whereabouts.TRAINED:
                return {0: state} if peers.is_first else {}
            if lost:
                print(f"{lost}; stopping", file=sys.stderr, flush=True)
                stop.request(reason=lost, cause="lost_node")
            elif peers.stopped:
                stop.request(reason=peers.stopped, cause=history.cause_of_signal(""))
        if self._error:
            raise self._error
        return self._outcomes


def _ask_for_lost(stop: StopSignals, peers: Peers) -> None:
    """A worker vanished: with its node, or alone? The node would be missed a moment later."""
    waiting.wait_until(lambda: peers.lost(idle=True) or stop.requested, timeout_s=ASK_S, heed=lambda: None)
    if lost := peers.lost(idle=True):
        stop.request(reason=lost, cause="lost_node")


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _attempt_logs(run: RunDir, *, node_rank: int, first_attempt: int, stop: StopSignals, beats: Heartbeats) -> Any:
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class AttemptLogs(LogsSpecs):
        """What the agent asks for at each start of the workers: the place to count attempts and to refuse one.

        Workers open their logs themselves, so no streams are redirected here.
        """

        attempt = first_attempt - 1
        noted = 0
        """The last attempt of which it is written down that the kernel killed a worker."""

        @property
        def root_log_dir(self) -> str:
            return str(run.logs)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            if self.attempt >= first_attempt:
                self._check_restart()
            self.attempt += 1
            beats.clear()
            told = {
                ATTEMPT_VARIABLE: str(self.attempt),
                host_memory.FREE_VARIABLE: str(host_memory.free()),  # before any worker takes some
                MEMORY_KILLS_VARIABLE: str(history.num_memory_kills(run, node_rank)),
            }
            for env in envs.values():
                env.update(told)
            run.append_event("attempt_started", attempt=self.attempt, node=node_rank, workers=len(envs))
            nowhere = dict.fromkeys(envs, os.devnull)
            run.attempt_errors(self.attempt).mkdir(parents=True, exist_ok=True)
            streams = dict.fromkeys(envs, "")
            return LogsDest(stdouts=streams, stderrs=streams, error_files=nowhere)

        def note_kill(self) -> None:
            """Write down, once, that the kernel killed a worker that trained, if it did: it leaves no word itself."""
            before = beats.kills_before
            if self.noted < self.attempt and before is not None and host_memory.num_kills() > before:
                self.noted = self.attempt
                run.append_event("memory_kill", attempt=self.attempt, node=node_rank)

        def _check_restart(self) -> None:
            self.note_kill()
            cause, message = diagnose.cause_of_end(run, self.attempt)
            if stop.requested or cause in diagnose.NOT_RETRYABLE:
                raise _NoRestartError(cause)
            run.append_event("attempt_ended", attempt=self.attempt, node=node_rank, cause=cause, message=message)
            # How often a worker may vanish is the user's to say (launch.max_restarts).
            if cause != "lost_worker" and (refused := history.refusal(run)):
                raise _NoRestartError(refused)
            print(f"attempt {self.attempt} ended: {message}; starting the workers again", file=sys.stderr, flush=True)

    return AttemptLogs()


def _meet_at_once() -> None:
    """Have a single node's rendezvous begin without the random delay (0 to 0.3 s) that keeps many from crowding."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    delay = getattr(dynamic_rendezvous, "_delay", None)
    if delay is not None:

        def without_random(seconds: float | tuple[float, float]) -> None:
            if not isinstance(seconds, tuple):
                delay(seconds)

        dynamic_rendezvous._delay = without_random  # noqa: SLF001  torch has no setting for it


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host, int(port)


def _log_to_file(run: RunDir, node_rank: int) -> None:
    """Keep the agent's talk off the terminal, where it would bury the first traceback (pytorch#113546)."""
    handler = logging.FileHandler(run.node_log(node_rank), delay=True)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # noqa: ARG005  # a full disk: it prints tracebacks
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("torch.distributed", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
