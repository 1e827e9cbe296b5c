"""The text of a batch job: pure, the same on a machine without SLURM. ``--dry-run`` prints what is submitted."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.plan import batch_shell, node_steps

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
_LOGS = (("--output", "out"), ("--error", "err"))
RUNS = "runs.txt"
"""In the folder of a sweep: the absolute path of each run directory, a line each."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a batch job is made from."""

    name: str
    """Shown by squeue."""
    run_dir: str
    """Absolute path of the run directory."""
    nodes: int
    """Machines, spare ones too, each with one supervisor."""
    is_elastic: bool = False
    """Whether the run goes on without a node that is lost: then each supervisor is a step of its own."""
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
    if job.is_elastic:
        srun = shlex.join(["srun", *shared, "--ntasks-per-node=1", *gpus, *_srun_args(job, profile)])
        begin = batch_shell.joined(
            f"run={shlex.quote(job.run_dir)}",
            "start=$SLURM_JOB_ID-0-$EPOCHSECONDS",
            "job=$SLURM_JOB_ID",
            batch_shell.EVENT,
            batch_shell.PATIENT,
        )
        return ("bash", "-c", f"{begin}\n{_node_steps(srun, shlex.join(python), job)}")
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
    together = [] if job.is_elastic else ["--kill-on-bad-exit=1", f"--wait={WAIT_FOR_TASKS_S}"]
    return [
        EXPORT,
        *together,
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
    setup = batch_shell.SETUP.format(
        run=own if array else shlex.quote(str(folder)),
        log=f"{shlex.quote(str(folder / 'logs' / 'slurm-'))}{variables}.log",
    )
    python = profile.python or shlex.quote(job.python)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder / 'slurm'))}"
    srun_args, teardown = _srun_args(job, profile), batch_shell.TEARDOWN
    if job.is_elastic:
        logs = [f'{flag}={shlex.quote(str(folder / "slurm" / pattern))}_"$node"_log.{end}' for flag, end in _LOGS]
        srun = " ".join(["srun --unbuffered", *logs, shlex.join(srun_args)])
        names = batch_shell.joined(batch_shell.START, batch_shell.JOB, batch_shell.EVENT, batch_shell.PATIENT)
        command, teardown = f"{names}\n{_node_steps(srun, python, job)}", batch_shell.ELASTIC_TEARDOWN
        more["no_kill"] = True
    text: str = _make_sbatch_string(
        command,
        folder / "slurm",
        **options,
        use_srun=not job.is_elastic,
        map_count=array.num if array else None,
        array_parallelism=array.parallel if array else 1,
        additional_parameters={"requeue": True, **more},
        setup=[*setup.splitlines(), *_prepare(profile)],
        srun_args=srun_args,
        teardown=teardown.splitlines(),
    )
    return text + "\n"


def _node_steps(srun: str, python: str, job: Job) -> str:
    """Shell that starts each node's supervisor as a step of its own."""
    size = '--nodelist="$host" --nodes=1 --ntasks=1'
    member = f'{python} -u -m {node_steps.MEMBER} "$run" --start "$start" --node "$node"'
    return node_steps.steps(f"{srun} {size} {member}", num=job.nodes)


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
        lines.append(batch_shell.CHECK)
    for line in profile.setup:
        lines += [line, f"launch_check $? {shlex.quote(line)}"]
    return lines
