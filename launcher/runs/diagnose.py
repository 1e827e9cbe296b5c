"""Why did it die: from the ranks' error files to the first failure and what to do about it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.runs import findings, history, job_logs, user_code, whereabouts

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.runs.run_dir import RunDir
    from launcher.runs.whereabouts import JobState

NOT_RETRYABLE = ("bug", "usage", "out_of_memory", "full_disk", "environment")
"""Causes that a restart would meet again."""
RESUME = "`launch resume RUN` goes on from the last checkpoint"
AGAIN = "`launch resume RUN` begins it again, since no checkpoint was written yet"
NETWORK_CURE = (
    "with NCCL_DEBUG=INFO the workers' logs say which interface is used and what failed; `launch doctor --nodes N` "
    "checks a cluster's nodes; another interface is named by `interface` in the profile or, without SLURM, by "
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
)
CURES = {
    "bug": "this is a fault of finetune-launcher or of a library that it uses: report it with the lines above; "
    "`launch RECIPE --debug` runs the same in one process",
    "usage": "fix the error that the message names and start again",
    "out_of_memory": "lower batch.size (batch.global_size keeps the step's size), or data.image_size",
    "hang": "the workers' stacks are in their logs; one that waits for data or a lock holds up all others; a step that "
    "really takes this long needs a higher train.hang_timeout_s",
    "memory_kill": "it goes on with batches of half the size, launch.max_restarts times; if that does not help: fewer "
    f"data.workers, a lower data.image_size or more memory; {RESUME}, with batches of half the size again",
    "environment": f"fix the problem that the message names, of the machine, the shell or a file system; {RESUME}",
    "full_disk": f"free space where the run directory is; then {RESUME}",
    "lost_node": f"{RESUME}; ask whoever runs the cluster about the node",
    "lost_worker": "a worker was killed from outside: look for the out-of-memory killer (`dmesg | grep -i oom`) "
    f"or whoever sent the signal; where none was killed it is the network: {NETWORK_CURE}; {RESUME}",
    "network": f"{NETWORK_CURE}; {RESUME}",
}
OWN_CODE = "look at {place}, the last line of your own code above; `launch RECIPE --debug` runs it in one process"
NEW_CODE = "; the run has its own copy of it: `launch resume RUN --new-code` goes on with what you have corrected"
ENVIRONMENT = {
    r"shared memory|/dev/shm|Bus error": "make /dev/shm larger (a container: --shm-size=8g or --ipc=host), or set "
    "data.workers=0",
    r"Too many open files|ancdata": "raise the limit of open files (`ulimit -n`, its hard limit), or set fewer "
    "data.workers",
    r"AF_UNIX path too long": "set TMPDIR to a folder with a short path",
    r"File name too long": "name a --run-dir or a data.path with a shorter path",
    r"Cannot allocate memory": "free memory, or ask for more; fewer data.workers need less",
    r"can't start new thread|Resource temporarily unavailable": "raise the limit of processes (`ulimit -u`, or the "
    "container's)",
    r"Read-only file system|Permission denied|Operation not permitted": "see that the user who runs this may read, and "
    "in the run directory write, what the message names, on every node",
    r"No such file or directory|Not a directory": "see that what the message names is there, on every node",
    r"Duplicate GPU": "two workers were given the same GPU, or slices (MIG) of one: see CUDA_VISIBLE_DEVICES and "
    "--gpus on that node",
    r"Unable to find (address|interface) for|no socket interface|neither AF_INET": "`ip -br address` lists the "
    "interfaces of that node; name one of them in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME or in the profile "
    "(interface), or none: then that of the route between the nodes is taken",
    r"[Mm]ismatched NCCL version|NCCL version mismatch": "install the same torch on all nodes",
    r"ncclInvalidUsage": "NCCL_DEBUG=WARN has NCCL say what it was; look at the NCCL_* variables that are set",
    r"Stale file handle|Input/output error|Transport endpoint": "the file system failed: look at its mount and its "
    "server (`dmesg`)",
}
"""Regular expressions for messages of failures of the environment, each with its cure."""
NETWORK = {
    r"[Aa]ddress already in use|EADDRINUSE": "another process listens there (`ss -ltnp` names it); another start takes "
    "another port",
    r"timeout after \d+ms|Socket Timeout|clients joined|not all workers have come": "a worker that the others waited "
    "for did not come: its log, or its node's, says where it is; else it is the network: " + NETWORK_CURE,
    r"ncclUnhandledCudaError|Cuda failure": "look for errors of the GPU (`dmesg | grep -i xid`, `nvidia-smi -q`); "
    "NCCL_DEBUG=INFO has NCCL say which call it was",
}
"""The same for failures of what the ranks speak by."""
CPP_FRAMES = ("Exception raised from", "frame #")
"""How lines of C++ begin within a traceback; there are dozens."""
SLURM_WORDS = ("oom_kill", "oom-kill", "DUE TO", "Node failure", "Exceeded job memory")
OURS = "DUE TO JOB REQUEUE"
STOPS = ("preempted", "time_limit", "interrupted", "cancelled")
TRACEBACK_LINES = 12
OWN_LINES = 2
"""Of a traceback: the place, and the text of that line."""


def errors(run: RunDir, attempt: int) -> list[dict[str, Any]]:
    """The error files of one attempt, oldest first."""
    found = []
    for file in run.attempt_errors(attempt).glob("rank-*.json"):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError):
            continue
    return sorted(found, key=lambda error: float(error["time"]))


def first_failure(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """What ended an attempt: the first error in time that is not caused by the end of another rank.

    Returns:
        The error file's content; where ranks report only that another one vanished, or that they do not reach it, with
        what the supervisors know of that as its cause, and the earliest such report as ``noticed``.
    """
    found = errors(run, attempt)
    # If all hang, the others wait for the one that does not wait.
    own = sorted((e for e in found if e["kind"] != "peer_lost"), key=lambda e: bool(e.get("waiting")))
    known = _memory_kill(run, attempt) or _lost_node(run, attempt)
    if own and not (known and own[0]["kind"] == "network"):
        return own[0]
    if not found:
        return None
    echo = (own or found)[0]
    noticed = f"rank {echo['rank']} noticed it first: {echo['type']}: {echo['message']}"
    lost = known or {"kind": "lost_worker", "message": "a worker vanished without a word (killed, or its machine lost)"}
    return {**echo, **lost, "rank": None, "type": lost["kind"].replace("_", " "), "traceback": "", "noticed": noticed}


def cause_of_end(run: RunDir, attempt: int) -> tuple[str, str]:
    """The cause of an attempt's end and the message that goes with it, as its supervisor sees them right after."""
    failure = first_failure(run, attempt)
    if failure:
        return failure["kind"], failure["message"]
    killed = _memory_kill(run, attempt)
    if killed:
        return killed["kind"], killed["message"]
    problem = run.problem()  # which is then why nobody left a word
    return ("full_disk", problem) if problem else ("lost_worker", "a worker was killed")


def explain(
    run: RunDir, job: JobState | None = None, explain_job: Callable[[RunDir, JobState], list[str]] = lambda *_: []
) -> str:
    """The answer of ``launch why``, in some ten lines: the first failure in time, the evidence and the cure.

    Args:
        run: the run directory.
        job: what SLURM says of the run's job, where it has one and somebody has asked.
        explain_job: what became of a job from which no worker came, or why it waits.
    """
    status = run.read_status()
    attempt, state = int(status.get("attempt", 1)), whereabouts.settled(status["state"], job)
    left = f" on {found}" if (found := whereabouts.nodes_left(run)) and state == "running" else ""
    shown = whereabouts.shown(run, state)
    epoch, epochs = whereabouts.epoch_shown(status), status.get("epochs")
    place = "" if epoch is None else f"epoch {epoch}{f'/{epochs}' if epochs else ''}, "
    head = f"{run}: {shown}{left}, attempt {attempt}, {place}step {status.get('step', 0)}"
    if job and not history.since_launched(run, "attempt_started"):
        return "\n".join([head, *_before(run, attempt + 1), *explain_job(run, job), *_refused(run)])
    lines = [*_before(run, attempt), *(_lost_nodes(run) if left else [])]
    if job and job.state == "PENDING":
        lines += explain_job(run, job)
    failure = first_failure(run, attempt) or _as_recorded(run, attempt)
    if failure and failure["kind"] == "preempted" and state == "cancelled":  # both begin by SIGTERM
        failure |= {"kind": "cancelled", "type": "cancelled"}
    if failure is None and job and job.over and job.state not in ("COMPLETED", "UNKNOWN"):
        lines += [f"job {job.job_id} ended as {job.state}", *job_logs.last_words(run, job.job_id)]
    elif failure is None and (failed := failed_checks(run)):
        lines += ["the check of the nodes failed", *failed]
    elif failure is None:
        logs = run.attempt_logs(attempt) if attempt else run.logs
        lines.append(f"no failure is recorded for this attempt; the logs are in {logs}")
    lines += [f"{found.message}\nlikely cause: {found.cause}" for found in findings.of_run(run)]
    if failure is None:
        return "\n".join([head, *lines, *_evidence(run), *_refused(run)])
    rank, host = failure["rank"], failure["host"]
    where = f"rank {rank} on {host}" if rank is not None else f"seen from {host}"
    label = "stopped" if failure["kind"] in STOPS else "first failure"
    first = [f"{label}: {where}: {failure['type']}: {failure['message']}", f"what to do: {what_to_do(run, failure)}"]
    lines += [failure["noticed"]] if "noticed" in failure else []
    lines += [f"  {line}" for line in _shown(failure)]
    if rank is not None:
        lines.append(f"log: {run.rank_log(attempt, rank)}")
    return "\n".join([head, *first, *lines, *_evidence(run), *_refused(run)])


def _shown(failure: dict[str, Any]) -> list[str]:
    """The end of a traceback, from the last line of the user's own code where that comes before it."""
    text: str = failure["traceback"]
    lines = [line for line in text.rstrip().splitlines() if not line.startswith(CPP_FRAMES)]
    file, _, number = (failure.get("own_line") or "").rpartition(":")
    own = [index for index, line in enumerate(lines) if line.strip().startswith(f'File "{file}", line {number},')]
    if not own:
        return lines[-TRACEBACK_LINES:]
    if own[-1] >= len(lines) - TRACEBACK_LINES:
        return lines[own[-1] :]
    return [*lines[own[-1] : own[-1] + OWN_LINES], "  …", *lines[OWN_LINES + 1 - TRACEBACK_LINES :]]


def what_to_do(run: RunDir, failure: dict[str, Any]) -> str:
    """The cure of a failure, with the command that goes on with this run or, without a checkpoint, begins it again."""
    from_where = RESUME if run.newest_state() else AGAIN
    return cure(failure).replace(RESUME, from_where).replace("launch resume RUN", f"launch resume {run}")


def cure(failure: dict[str, Any]) -> str:
    """The cure of a failure, in general; RUN stands for the run directory."""
    kind, own_line = failure["kind"], failure.get("own_line")
    table = {"environment": ENVIRONMENT, "network": NETWORK}.get(kind, {})
    found = (text for sign, text in table.items() if re.search(sign, failure["message"]))
    if text := next(found, ""):
        return f"{text}; {RESUME}"
    if kind == "bug" and own_line:  # also where a library raised what the user's code had it do
        file, _, number = own_line.rpartition(":")
        original = user_code.original_of(Path(file))
        return OWN_CODE.format(place=f"{original}:{number}" if original else own_line) + (NEW_CODE if original else "")
    return CURES.get(kind, RESUME)


def failed_checks(run: RunDir) -> list[str]:
    """Problems that nodes found with themselves or each other, if they kept the run from starting."""
    if history.since_launched(run, "attempt_started"):
        return []
    failed = [event["problems"] for event in history.since_launched(run, "preflight_failed")]
    return [f"{host}: {text}" for problems in failed for host, text in problems.items()]


def _memory_kill(run: RunDir, attempt: int) -> dict[str, str] | None:
    """Kind and message if the kernel killed a worker in this attempt."""
    for event in history.events(run, "memory_kill"):
        if event["attempt"] == attempt:
            return {"kind": "memory_kill", "message": f"the kernel killed a worker on {event['host']}: memory ran out"}
    return None


def _lost_node(run: RunDir, attempt: int) -> dict[str, str] | None:
    """Kind and message if a supervisor lost another node in this attempt."""
    for event in history.events(run, "attempt_ended"):
        if event["attempt"] == attempt and event["cause"] == "lost_node":
            return {"kind": "lost_node", "message": event["message"]}
    return None


def _lost_nodes(run: RunDir) -> list[str]:
    """Nodes that a run goes on without, each with the reason."""
    found = history.since_launched(run, "node_lost") + history.since_launched(run, "node_joined")
    last = {event["node"]: event for event in sorted(found, key=lambda event: float(event["time"]))}
    return [f"without node {n} ({e['name']}): {e['message']}" for n, e in last.items() if e["kind"] == "node_lost"]


def _as_recorded(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """The supervisor's record of an attempt whose workers recorded no error."""
    ended = [event for event in history.events(run, "attempt_ended") if event["attempt"] == attempt]
    if not ended:
        return None
    kind = ended[0]["cause"]
    return {**ended[0], "kind": kind, "rank": None, "type": kind.replace("_", " "), "traceback": ""}


def _before(run: RunDir, attempt: int) -> list[str]:
    """How the attempts before the last one ended, in a line."""
    ended = history.events(run, "attempt_ended")  # each node may have written one
    causes = {event["attempt"]: event["cause"] for event in ended if event["attempt"] < attempt}
    counts = [f"{count} x {cause.replace('_', ' ')}" for cause, count in Counter(causes.values()).items()]
    return [f"attempts before it ended by: {', '.join(counts)}"] if counts else []


def _evidence(run: RunDir) -> list[str]:
    """SLURM's last words about the job that say why it ended."""
    if run.read_status()["state"] in ("completed", "early_stopped"):
        return []
    found = [run.batch_log(event["job_id"]) for event in history.events(run, "submitted")]
    logs = sorted(filter(Path.exists, found), key=lambda log: log.stat().st_mtime)
    if not logs:
        return []
    text = logs[-1].read_text(encoding="utf-8", errors="replace")
    words = [line.strip() for line in text.splitlines() if any(w in line for w in SLURM_WORDS) and OURS not in line]
    return [f"{logs[-1].name}: {words[-1]}"] if words else []


def _refused(run: RunDir) -> list[str]:
    return [event["message"] for event in history.since_launched(run, "refused")[-1:]]
