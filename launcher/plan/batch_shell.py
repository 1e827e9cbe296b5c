"""Pieces of shell that batch scripts are made of: what comes before the nodes' supervisors, and what comes after."""

from __future__ import annotations

MAX_STARTS = 3
"""Give up after this many starts in a row that reach no worker: do not queue the job again."""

MAX_TRIES = 60
"""The batch script asks a controller that does not answer this many times, five seconds apart, then leaves."""

# What binds the shell that submits to its own cores would bind every worker to them; the commands below would take the
# variables of squeue and sbatch for options.
SETUP = """\
unset "${{!SLURM_CPU_BIND@}}" "${{!SLURM_MEM_BIND@}}" "${{!SQUEUE_@}}" "${{!SBATCH_@}}"
run={run}
export LAUNCH_BATCH_LOG={log}
before=$(wc -l < "$LAUNCH_BATCH_LOG")
begun=$(grep -cs '"kind": "attempt_started"' "$run/events.jsonl")"""

CHECK = """launch_check() { [ "$1" = 0 ] || { echo "the profile's setup failed (exit code $1): $2" >&2; exit 3; }; }"""

START = "start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"

JOB = """\
# An element of an array by its own name: one of them has the id of the whole array as its job id.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}"""

EVENT = """\
event() { printf '{"time": %s, "kind": "%s", %s}\\n' "$(date +%s.%N)" "$1" "$2" >> "$run/events.jsonl"; }"""

PATIENT = f"""\
# The controller may be silent for a while, as when it is restarted.
patient() {{ for _ in {{1..{MAX_TRIES}}}; do "$@" && return; sleep 5; done; return 1; }}"""

_WORDS = """\
words=$(tail -n "+$((before + 1))" "$LAUNCH_BATCH_LOG")"""

_SAID = """\
# The first node speaks for the whole run; srun's own code may be that of a task it ended itself.
for said in "$run/slurm/done-$start-"*; do
  [ ! -s "$said" ] || code=$(cat "$said")
done"""

_ELASTIC_SAID = """\
# The node that had rank 0 speaks for the whole run; where it changed, the last one that had it.
for said in "$run/slurm/done-$start-"*; do
  [ ! -s "$said" ] || code=$(cat "$said")
done"""

_FAILED_CHECK = """\
# A node that fails its check leaves with 3, and its name where it is to blame itself.
[ "$code" = 0 ] || ! grep -q ': Exited with exit code 3$' <<< "$words" || code=3"""

_DECIDE = """\
bad=$(cat "$run/slurm/bad-$start-"* 2> /dev/null | tr , '\\n' | sort -u)
# 0 is done, 1 failed, 2 and 3 refused. Else, or without a few bad nodes, the run is queued again: 75 means saved and
# wants to go on, the rest that a supervisor was lost. Not after scancel: then the job is no longer RUNNING.
case $code in
  0 | 1 | 2) exit $code ;;
  3) # Where all of several nodes are bad at the same time it is not the nodes.
    num=$(grep -c . <<< "$bad")
    [ "$num" -gt 0 ] && { [ "$num" -lt "$SLURM_JOB_NUM_NODES" ] || [ "$num" = 1 ]; } || exit 3 ;;
esac"""

_COUNT_STARTS = f"""\
[ "$(patient squeue --noheader --jobs "$job" --format %T)" = RUNNING ] || exit $code
if [ "$(grep -cs '"kind": "attempt_started"' "$run/events.jsonl")" = "$begun" ]; then
  event start_failed "\\"job_id\\": \\"$job\\", \\"code\\": $code"
  count='/"kind": "(launched|attempt_started)"/ {{n = 0}} /"kind": "start_failed"/ {{n++}} END {{print n}}'
  failed=$(awk "$count" "$run/events.jsonl")
  if [ "$failed" -ge {MAX_STARTS} ]; then
    event refused "\\"message\\": \\"$failed starts of the job in a row ended before training; not tried again\\""
    [ $code = 3 ] && exit 3 || exit 1
  fi
fi"""

_LOST = """\
# srun's words about a task that was killed from outside name its node; after another one has left it kills by itself.
lost=$(sed -n '/: Exited with exit code/q; s/^srun: error: \\([^ :,[]*\\): task [0-9]*: Killed$/\\1/p' <<< "$words" |
  head -n 1)"""

_ELASTIC_LOST = """\
# Nodes that were given up; where all were it is not the nodes.
lost=$(cat "$run/slurm/lost-$start-"* 2> /dev/null)
[ "$(grep -c . <<< "$lost")" -lt ${#hosts[@]} ] || lost="""

_QUEUE_AGAIN = """\
own=$(scontrol show job --oneliner "$job" | sed -n 's/.* ExcNodeList=\\([^ (]*\\).*/\\1/p')
exclude=$(printf '%s\\n' "$own" "$bad" "$lost" | sed '/^$/d' | paste -s -d ,)
# Could the job start at all without them? Else it would wait for ever.
if [ -n "$bad$lost" ] && ! sbatch --test-only --exclude="$exclude" "$0" > /dev/null 2>&1; then
  [ $code != 3 ] || exit 3
  exclude=$own
fi
trap '' TERM
patient scontrol requeue "$job"
"""

_TELL_LOST = """\
[ -z "$lost" ] || event supervisor_lost "\\"host\\": \\"$lost\\""
"""

_END = """\
[ -z "$exclude" ] || scontrol update JobId="$job" ExcNodeList="$exclude"
exit $code"""

_CODE = "code=$?"


def joined(*pieces: str) -> str:
    """Pieces one after the other."""
    return "\n".join(piece.rstrip("\n") for piece in pieces)


TEARDOWN = joined(
    *(_CODE, START, JOB, _WORDS, EVENT, _SAID, _FAILED_CHECK, _DECIDE, PATIENT, _COUNT_STARTS),
    *(_LOST, _QUEUE_AGAIN, _TELL_LOST, _END),
)
"""After the supervisors: the job's exit code, and whether it is queued again."""

ELASTIC_TEARDOWN = joined(_CODE, _ELASTIC_SAID, _DECIDE, _COUNT_STARTS, _ELASTIC_LOST, _QUEUE_AGAIN, _END)
"""The same where each node's supervisor was a step of its own, and was started by :mod:`launcher.plan.node_steps`."""
