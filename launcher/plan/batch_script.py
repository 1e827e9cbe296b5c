"""The text of a batch job: pure, the same on a machine without SLURM. ``--dry-run`` prints what is submitted."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.plan.profile import Profile

WAIT_FOR_TASKS_S = 300
"""Seconds that the other nodes get after the first supervisor has ended; then srun ends them."""

EXPORT = "--export=ALL"
"""Without this, the steps of a job submitted with --export=NONE lack the variables that its script sets."""

CHECK_MIN = 15
"""Time limit of a job that only checks its nodes, in minutes."""

TASK = "launcher.backends.slurm.task"
"""The module that each node of a job runs."""
RUNS = "runs.txt"
"""In the folder of a sweep: the absolute path of each run directory, a line each."""

MAX_STARTS = 3
"""Give up after this many starts in a row that reach no worker: do not queue the job again."""

MAX_TRIES = 60
"""The batch script asks a controller that does not answer this many times, five seconds apart, then leaves."""

# What binds the shell that submits to its own cores would bind every worker to them; the commands below would take the
# variables of squeue and sbatch for options.
_SETUP = """\
unset "${{!SLURM_CPU_BIND@}}" "${{!SLURM_MEM_BIND@}}" "${{!SQUEUE_@}}" "${{!SBATCH_@}}"
run={run}
export LAUNCH_BATCH_LOG={log}
before=$(wc -l < "$LAUNCH_BATCH_LOG")
begun=$(grep -cs '"kind": "attempt_started"' "$run/events.jsonl")"""
_TEARDOWN = """\
code=$?
start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
# An element of an array by its own name: one of them has the id of the whole array as its job id.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
words=$(tail -n "+$((before + 1))" "$LAUNCH_BATCH_LOG")
event() { printf '{"time": %s, "kind": "%s", %s}\\n' "$(date +%s.%N)" "$1" "$2" >> "$run/events.jsonl"; }
# The first node speaks for the whole run; srun's own code may be that of a task it ended itself.
for said in "$run/slurm/done-$start-"*; do
  [ ! -s "$said" ] || code=$(cat "$said")
done
# A node that fails its check leaves with 3, and its name where it is to blame itself.
[ "$code" = 0 ] || ! grep -q ': Exited with exit code 3$' <<< "$words" || code=3
bad=$(cat "$run/slurm/bad-$start-"* 2> /dev/null | tr , '\\n' | sort -u)
# 0 is done, 1 failed, 2 and 3 refused. Else, or without a few bad nodes, the run is queued again: 75 means saved and
# wants to go on, the rest that a supervisor was lost. Not after scancel: then the job is no longer RUNNING.
case $code in
  0 | 1 | 2) exit $code ;;
  3) # Where all of several nodes are bad at the same time it is not the nodes.
    num=$(grep -c . <<< "$bad")
    [ "$num" -gt 0 ] && { [ "$num" -lt "$SLURM_JOB_NUM_NODES" ] || [ "$num" = 1 ]; } || exit 3 ;;
esac
# The controller may be silent for a while, as when it is restarted.
patient() { for _ in {1..@MAX_TRIES@}; do "$@" && return; sleep 5; done; return 1; }
[ "$(patient squeue --noheader --jobs "$job" --format %T)" = RUNNING ] || exit $code
if [ "$(grep -cs '"kind": "attempt_started"' "$run/events.jsonl")" = "$begun" ]; then
  event start_failed "\\"job_id\\": \\"$job\\", \\"code\\": $code"
  count='/"kind": "(launched|attempt_started)"/ {n = 0} /"kind": "start_failed"/ {n++} END {print n}'
  failed=$(awk "$count" "$run/events.jsonl")
  if [ "$failed" -ge @MAX_STARTS@ ]; then
    event refused "\\"message\\": \\"$failed starts of the job in a row ended before training; not tried again\\""
    [ $code = 3 ] && exit 3 || exit 1
  fi
fi
# srun's words about a task that was killed from outside name its node; after another one has left it kills by itself.
lost=$(sed -n '/: Exited with exit code/q; s/^srun: error: \\([^ :,[]*\\): task [0-9]*: Killed$/\\1/p' <<< "$words" |
  head -n 1)
own=$(scontrol show job --oneliner "$job" | sed -n 's/.* ExcNodeList=\\([^ (]*\\).*/\\1/p')
exclude=$(printf '%s\\n' "$own" "$bad" "$lost" | sed '/^$/d' | paste -s -d ,)
# Could the job start at all without them? Else it would wait for ever.
if [ -n "$bad$lost" ] && ! sbatch --test-only --exclude="$exclude" "$0" > /dev/null 2>&1; then
  [ $code != 3 ] || exit 3
  exclude=$own
fi
trap '' TERM
patient scontrol requeue "$job"
[ -z "$lost" ] || event supervisor_lost "\\"host\\": \\"$lost\\""
[ -z "$exclude" ] || scontrol update JobId="$job" ExcNodeList="$exclude"
exit $code""".replace("@MAX_STARTS@", str(MAX_STARTS)).replace("@MAX_TRIES@", str(MAX_TRIES))

_CHECK = """launch_check() { [ "$1" = 0 ] || { echo "the profile's setup failed (exit code $1): $2" >&2; exit 3; }; }"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a batch job is made from."""

    name: str
    """Shown by squeue."""
    run_dir: str
    """Absolute path of the run directory."""
    nodes: int
    """Machines, each with one supervisor."""
    procs_per_node: int
    """Workers on each."""
    device: str
    """cuda or cpu."""
    python: str
    """The interpreter that runs ``launch``."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """A job array."""

    num: int
    """Elements."""
    parallel: int
    """How many of them run at the same time at most."""
    first: int = 0
    """Which of the sweep's runs the first element is: a sweep may need several arrays."""


def step_command(job: Job, profile: Profile, *, overlap: bool = False) -> tuple[str, ...]:
    """The plan as a step of an allocation that is there already (salloc): the same supervisors, by srun alone.

    Args:
        job: what is to run.
        profile: the cluster's.
        overlap: share what the step holds that this is asked from, as in `srun --pty bash`; it would wait for it.
    """
    asked = f"--gres={profile.gres}:" if profile.gres else "--gpus-per-node="
    gpus = (f"{asked}{job.procs_per_node}",) if job.device == "cuda" else ()
    python = shlex.split(profile.python) if profile.python else [job.python]
    shared = ("--overlap",) if overlap else ()
    size = (*shared, f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1", *gpus)
    return ("srun", *size, *_srun_args(job, profile), *python, "-u", "-m", TASK, job.run_dir)


def check_command(job: Job, profile: Profile) -> tuple[str, ...]:
    """A job by srun alone that only checks its nodes (:mod:`launcher.node.preflight`).

    They leave the result in ``job.run_dir``.
    """
    options, more = _options(job, profile, Path(job.run_dir) / "srun.log")
    options = {name: value for name, value in options.items() if value is not None} | {"time": CHECK_MIN}
    for name in ("signal_delay_s", "cpus_per_task"):
        del options[name]
    more = {name: value for name, value in more.items() if name not in ("output", "error")}
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in (options | more).items()
    ]
    python = shlex.split(profile.python) if profile.python else [job.python]
    return ("srun", *flags, *_srun_args(job, profile), *python, "-u", "-m", TASK, "--check", job.run_dir)


def _srun_args(job: Job, profile: Profile) -> list[str]:
    return [
        EXPORT,
        "--kill-on-bad-exit=1",
        f"--wait={WAIT_FOR_TASKS_S}",
        # Lost between sbatch and srun from SLURM 22.05 to 23.02.
        f"--cpus-per-task={profile.cpus_per_gpu * job.procs_per_node}",
        *profile.srun_args,
    ]


def build_script(job: Job, profile: Profile, array: Array | None = None) -> str:
    """The whole sbatch script, by the function that submitit itself uses.

    One task a node with all of the node's GPUs: with a GPU per task NCCL could not see its peers (nccl#1066).

    Args:
        job: with the folder of the sweep as its run directory, where there is an ``array``.
        profile: the cluster's.
        array: makes it a job array, one element a run.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    folder = Path(job.run_dir)
    # sbatch fills in %j (%A_%a in an array), the shell the variables: two ways to write one name.
    pattern, variables = (
        ("%A_%a", '"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"') if array else ("%j", '"$SLURM_JOB_ID"')
    )
    options, more = _options(job, profile, folder / "logs" / f"slurm-{pattern}.log")
    line = f"SLURM_ARRAY_TASK_ID + {1 + (array.first if array else 0)}"
    own = f'$(sed -n "$(({line}))p" {shlex.quote(str(folder / RUNS))})'
    setup = _SETUP.format(
        run=own if array else shlex.quote(str(folder)),
        log=f"{shlex.quote(str(folder / 'logs' / 'slurm-'))}{variables}.log",
    )
    python = profile.python or shlex.quote(job.python)
    text: str = _make_sbatch_string(
        f"{python} -u -m submitit.core._submit {shlex.quote(str(folder / 'slurm'))}",
        folder / "slurm",
        **options,
        map_count=array.num if array else None,
        array_parallelism=array.parallel if array else 1,
        additional_parameters={"requeue": True, **more},
        setup=[*setup.splitlines(), *_prepare(profile)],
        srun_args=_srun_args(job, profile),
        teardown=_TEARDOWN.splitlines(),
    )
    return text + "\n"


def post_name(name: str) -> str:
    """Name of the job that makes the exports of a run."""
    return f"{name}-post"


def build_post_script(job: Job, profile: Profile) -> str:
    """The script of a job that makes the exports when the training job has ended well; one task, no GPU."""
    from submitit.slurm.slurm import _make_sbatch_string

    run = Path(job.run_dir)
    one = replace(job, name=post_name(job.name), nodes=1, procs_per_node=1, device="cpu")
    options, more = _options(one, profile, run / "logs" / "slurm-%j.log")
    text: str = _make_sbatch_string(
        f"{profile.python or shlex.quote(job.python)} -u -m launcher export {shlex.quote(str(run))}",
        run / "slurm",
        **options,
        additional_parameters=more,
        setup=_prepare(profile),
        srun_args=[EXPORT, *profile.srun_args],  # a container is one of them
    )
    return text.rstrip() + "\n"


def _options(job: Job, profile: Profile, log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that submitit has a name for, and the others."""
    options: dict[str, Any] = {
        "job_name": job.name,
        "nodes": job.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": profile.cpus_per_gpu * job.procs_per_node,
        "time": profile.timeout_min,
        "signal_delay_s": profile.lead_s,
        "wckey": None,
        **{
            name: getattr(profile, name)
            for name in ("partition", "account", "qos", "constraint", "exclude", "mail_user", "mail_type")
        },
        "exclusive": profile.exclusive or None,
        "mem": None if profile.mem_gb is None else f"{round(profile.mem_gb * 1024)}M",
    }
    if job.device == "cuda":
        gpus = job.procs_per_node
        options |= {"gres": f"{profile.gres}:{gpus}"} if profile.gres else {"gpus_per_node": gpus}
    more: dict[str, Any] = {"output": log, "error": log}
    if profile.reservation:
        more["reservation"] = profile.reservation
    return options, more | {key: value for key, value in profile.sbatch.items() if value is not False}


def _prepare(profile: Profile) -> list[str]:
    """The profile's environment and setup; each of its lines is asked by itself whether it failed.

    Not by `set -e`: what modules and conda source is not made for it. Not by `line || …`: a line may end in a comment,
    or belong to an `if` of several.
    """
    lines = [f"export {key}={shlex.quote(value)}" for key, value in profile.env.items()]
    if profile.setup:
        lines.append(_CHECK)
    for line in profile.setup:
        lines += [line, f"launch_check $? {shlex.quote(line)}"]
    return lines
