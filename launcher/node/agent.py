"""torch's elastic agent on one node: workers are forked from a process that has imported torch and torchvision once.

Measured against torchrun, which imports them in every worker: docs/evidence.md, "Start-up".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
import os
import sys
from typing import TYPE_CHECKING, Any

from launcher.node import placement
from launcher.node.agent_thread import AgentThread, LeftError, ask_for_lost, blame_lost
from launcher.node.part import Part
from launcher.node.peers import Peers
from launcher.node.watchdog import Watchdog
from launcher.runs import diagnose, history
from launcher.runs.generations import NODE_VARIABLE
from launcher.runs.heartbeats import Heartbeats
from launcher.runs.run_dir import ATTEMPT_VARIABLE, MEMORY_KILLS_VARIABLE
from launcher.system import lazy_dynamo, lazy_meta, network, phases, processes
from launcher.system import memory as host_memory
from launcher.system.log_cap import LogCap

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsDest
    from torch.distributed.launcher.api import LaunchConfig

    from launcher.node.signals import StopSignals
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs.run_dir import RunDir

SHUTDOWN_S = 10
JOIN_TIMEOUT_S = 900


class WorkersFailedError(Exception):
    """The workers failed for good; ``attempt`` is the number of the last start."""

    def __init__(self, attempt: int, reason: str) -> None:
        super().__init__(reason)
        self.attempt = attempt


class _NoRestartError(Exception):
    """Starting the workers again would not help."""


def prepare() -> None:
    """Import what the workers need, once on this node; torchvision brings the rest of it."""
    lazy_dynamo.put_off()
    lazy_meta.put_off()
    with processes.importing():
        from launcher.engine import worker  # noqa: F401


def run_workers(
    run: RunDir, plan: LaunchPlan, *, first_attempt: int, stop: StopSignals, part: Part | None = None
) -> dict[int, str]:
    """Start this node's workers and restart them when one dies, up to the plan's ``max_restarts``.

    Args:
        run: the run directory.
        plan: as this node carries it out.
        first_attempt: number of the first start.
        stop: whether a stop was asked for.
        part: this node's, where the run goes on without nodes that are lost.

    Returns:
        Each local worker's outcome, by global rank.

    Raises:
        WorkersFailedError: they failed, and no restart is left or would help.
        LeftError: this node left a wait for others, as ``stop`` says.
    """
    phases.at("importing torch")
    prepare()
    with processes.importing():
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.launcher.api import elastic_launch

        from launcher.engine.worker import worker_main

    phases.end()  # workers are forked from here
    node, part = plan.node, part or Part()
    _settle(run, plan)
    beats = Heartbeats(plan.procs_per_node)
    logs = _attempt_logs(run, part, node_rank=node, first_attempt=first_attempt, stop=stop, beats=beats)
    watchdog = Watchdog(run, beats, timeout_s=plan.hang_timeout_s, node_rank=node, attempt=lambda: int(logs.attempt))
    agent = AgentThread(functools.partial(elastic_launch(_config(plan, logs), worker_main), str(run.path), beats))
    peers = Peers(plan, part.hosts)
    capped = LogCap(lambda: [run.rank_log(logs.attempt, int(rank)) for rank in logs.ranks])
    try:
        with watchdog, peers, capped:
            try:
                outcomes = agent.attend(run, stop, peers, beats, part)
            except (ChildFailedError, _NoRestartError):
                if plan.nodes > 1 and diagnose.cause_of_end(run, logs.attempt)[0] in ("lost_worker", "network"):
                    ask_for_lost(stop, peers)
                blame_lost(stop, peers)
                raise
    except (RendezvousError, DistError) as error:  # the latter where the node that has the store dies meanwhile
        if plan.nodes == 1:
            raise WorkersFailedError(logs.attempt, str(error).splitlines()[0]) from error
        stop.request(reason=peers.why_apart(), cause="lost_node")
        raise LeftError from None
    except (ChildFailedError, _NoRestartError) as error:
        with contextlib.suppress(OSError):  # a full disk
            logs.note_kill()
        raise WorkersFailedError(logs.attempt, str(error).splitlines()[0]) from error
    finally:
        logs.is_left = True
    return outcomes


def _settle(run: RunDir, plan: LaunchPlan) -> None:
    """Set up this process for torch's agent."""
    _log_to_file(run, plan.node)
    _name_methods_quickly()
    if plan.nodes == 1:
        _meet_at_once()
    os.environ |= placement.environment(plan)


def _config(plan: LaunchPlan, logs: Any) -> LaunchConfig:
    """What torch's agent is told."""
    from torch.distributed.launcher.api import LaunchConfig
    from torch.numa.binding import AffinityMode, NumaOptions

    options: dict[str, Any] = {
        "min_nodes": plan.nodes,
        "max_nodes": plan.nodes,
        "nproc_per_node": plan.procs_per_node,
        "logs_specs": logs,
        "run_id": plan.run_id,
        "role": "worker",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": plan.rdzv_endpoint,
        # Told, not guessed: comparing host names finds nodes that are not "me" (pytorch#73656).
        "rdzv_configs": {
            "is_host": plan.node_rank == 0,
            **dict.fromkeys(("timeout", "join_timeout", "read_timeout"), JOIN_TIMEOUT_S),
        },
        "max_restarts": plan.max_restarts,
        "start_method": "fork",
        "local_addr": plan.address or network.local_address(*network.split(plan.rdzv_endpoint)),
        "shutdown_timeout": SHUTDOWN_S,
        # Any, or torch counts GPUs to choose one: by CUDA, which then works in no worker that this process forks, where
        # there is no NVML or a MIG slice is named.
        "numa_options": NumaOptions(affinity_mode=AffinityMode.NODE),
    }
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # torch 2.9 has fewer
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    config.numa_options = None  # workers bind themselves: torch would ask CUDA for the places of GPUs
    return config


def _attempt_logs(
    run: RunDir, part: Part, *, node_rank: int, first_attempt: int, stop: StopSignals, beats: Heartbeats
) -> Any:
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class AttemptLogs(LogsSpecs):
        """What the agent asks for at each start of the workers: the place to count attempts and to refuse one.

        Workers open their logs themselves, so no streams are redirected here.
        """

        attempt = first_attempt - 1
        ranks: tuple[str, ...] = ()
        """This node's in the present attempt."""
        is_left = False
        """Whether this node has turned to something else: an agent that still waits for others must start no worker."""
        noted = 0
        """The last attempt of which it is written down that the kernel killed a worker."""

        @property
        def root_log_dir(self) -> str:
            return str(run.logs)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            _refuse_if_over(part, is_left=self.is_left)
            if self.attempt >= first_attempt:
                self._check_restart()
            self.attempt += 1
            self.ranks = tuple(map(operator.itemgetter("RANK"), envs.values()))
            beats.clear()
            part.began(self.ranks)
            for env in envs.values():
                env.update(_variables(run, part, attempt=self.attempt, node=node_rank))
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


def _refuse_if_over(part: Part, *, is_left: bool) -> None:
    if is_left or part.is_over:
        raise _NoRestartError("the run has gone on without these workers")


def _variables(run: RunDir, part: Part, *, attempt: int, node: int) -> dict[str, str]:
    """What the workers of a node are told at their start."""
    return {
        ATTEMPT_VARIABLE: str(attempt),
        host_memory.FREE_VARIABLE: str(host_memory.free()),  # before any worker takes some
        MEMORY_KILLS_VARIABLE: str(history.num_memory_kills(run, node)),
        NODE_VARIABLE: str(node),
        **part.environment,
    }


def _meet_at_once() -> None:
    """Have a single node's rendezvous begin without the random delay (0 to 0.3 s) that keeps many from crowding."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    delay = getattr(dynamic_rendezvous, "_delay", None)
    if delay is not None:

        def without_random(seconds: float | tuple[float, float]) -> None:
            if not isinstance(seconds, tuple):
                delay(seconds)

        dynamic_rendezvous._delay = without_random  # noqa: SLF001  torch has no setting for it


def _name_methods_quickly() -> None:
    """Have torch's rendezvous find the names of its methods, for its log, in no time.

    It makes a list of all frames with their source files a dozen times, which takes half as long as to import numpy.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    def name(depth: int = 2) -> str:
        return sys._getframe(depth).f_code.co_name  # noqa: SLF001  as the inspect module does

    if hasattr(dynamic_rendezvous, "get_method_name"):
        dynamic_rendezvous.get_method_name = name


def _log_to_file(run: RunDir, node_rank: int) -> None:
    """Keep the agent's talk off the terminal, where it would bury the first traceback (pytorch#113546)."""
    handler = logging.FileHandler(run.node_log(node_rank), delay=True)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # noqa: ARG005  # a full disk: it prints tracebacks
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("torch.distributed", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
