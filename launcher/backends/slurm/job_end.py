"""Explains why a SLURM job ended, or does not begin, if no worker recorded it: from SLURM and the logs around."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.backends.slurm import client as slurm_client
from launcher.runs import job_logs

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir
    from launcher.runs.whereabouts import JobState

RESERVED = "Reserved_for_maintenance"
"""What SLURM says of a job that would run into a maintenance; it writes it with spaces, too."""
REASONS = {
    "JobLaunchFailure": "SLURM could not start the script or write its log: see that all nodes share the folder of the "
    "run (--run-dir)",
    "BadConstraints": "no nodes are left that fit: see exclude, constraint and the like in the profile",
    "ReqNodeNotAvail": "the nodes that fit are down, drained or reserved: sinfo -R",
    "PartitionTimeLimit": "lower timeout_min in the profile",
    "AssocGrpBillingMinutes": "the account's budget is spent: another account in the profile",
}
"""What to do, by SLURM's word."""
WORDS = {
    "the profile's setup": "correct that line of the profile, or end it in `|| true` where it may fail",
    "execve": "see `python` in the profile, and that the nodes have what it names",
    "command not found": "see `setup` and `python` in the profile",
    "No module named": "the nodes' Python lacks it: see `setup` and `python` in the profile",
    "No such file or directory": "see that the nodes share what the line names",
    "unable to open": "see that all nodes share the folder of the run (--run-dir)",
    "could not open": "see that all nodes share the folder of the run (--run-dir)",
    "has no interface": "name one that all nodes have: profile.interface",
}
"""What to do, by what a log says; the first that is found counts."""
SLACK_MIN = 2
"""What a job's time limit stays below the time until a maintenance: it takes a while to submit it."""
AGAIN = "launch resume RUN starts it again"


def explain(run: RunDir, job: JobState) -> list[str]:
    """What became of a job from which no worker came, with the evidence and the cure; one that waits has its reason."""
    if not job.over:
        why = f" ({job.reason})" if job.reason not in ("", "None") else ""
        cure = next((text for word, text in REASONS.items() if word in job.reason), "")
        if RESERVED in job.reason.replace(" ", "_"):
            cure = _before_maintenance(run)
        return [f"job {job.job_id} is {job.state.lower()}{why}", *([f"what to do: {cure}"] if cure else [])]
    if job.state == "CANCELLED":
        return [f"job {job.job_id} was cancelled before training began", f"what to do: {AGAIN}"]
    code = slurm_client.exit_code(job.job_id)
    ended = ", ".join(
        filter(
            None,
            [
                job.reason if job.reason not in ("None", "NonZeroExitCode") else "",
                f"exit code {code}" if code else "",
            ],
        )
    )
    words = job_logs.last_words(run, job.job_id)
    text = "\n".join(words)
    cures = [cure for word, cure in REASONS.items() if word == job.reason]
    cures += [cure for word, cure in WORDS.items() if word in text]
    cure = cures[0] if cures else "fix the error shown above" if words else "see `setup` and `python` in the profile"
    again = AGAIN.replace("RUN", "RUN --profile NAME") if "profile" in cure else AGAIN  # which reads it anew
    folders = f"neither in {run.batch_log(job.job_id).parent} nor in {run.supervisor_log(job.job_id, 0).parent}"
    return [
        f"job {job.job_id} ended before training began: {job.state}" + (f" ({ended})" if ended else ""),
        *(words or [f"nothing stands in the logs: {folders}"]),
        f"what to do: {cure}; then {again}",
    ]


def _before_maintenance(run: RunDir) -> str:
    """What to do about a time limit that reaches into a maintenance."""
    profile = run.read_plan().profile
    try:
        found = slurm_client.next_maintenance()
    except slurm_client.SlurmError:
        found = None
    if profile is None or found is None or found.minutes - SLACK_MIN <= profile.lead_s // 60 + 1:
        return "it starts by itself when the maintenance is over"
    shorter = f"profile.timeout_min={found.minutes - SLACK_MIN}"
    return (
        f"a maintenance begins at {found.starts} ({found.name}), and the job may take {profile.timeout_min} minutes "
        "(timeout_min), which is longer than until then: a shorter one starts before it, saves and goes on afterwards: "
        f"launch cancel {run}, then launch resume {run} {shorter}"
    )
