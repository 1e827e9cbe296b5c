"""The part of a job that shrinks and grows: one supervisor a node, each a step of its own that survives the others.

Shell, because the batch script runs outside of a container, where there may be no Python. The same text starts the
steps of an allocation that is there already.
"""

from __future__ import annotations

MEMBER = "launcher.backends.slurm.member"
"""The module that each node runs."""

MAX_DEATHS, CALM_S = 10, 600
"""Leave a node out whose supervisor was killed so often from outside, each time within so many seconds of its start."""

LINGER_S = 120
"""Seconds that the other nodes get after the run has ended, as when one is cut off; then their steps are ended."""

# The shell's jobs are waited for in pieces: a signal ends a `wait`, and is handed on to every step.
_STEPS = r"""
holds() { scontrol show hostnames "$(squeue --noheader --jobs "$job" --format %N)" | grep -qxF -- "$1"; }
is_over() {
  local said
  for said in "$run/slurm/done-$start-"*; do [ ! -s "$said" ] || return 0; done
  return 1
}
await() {
  local code
  while wait "$1"; code=$?; kill -0 "$1" 2> /dev/null; do :; done
  return $code
}
# Keeps the supervisor of a node alive until it ends by itself, which it then has said.
attend() {
  local node=$1 host=$2 deaths=0 began code srun
  trap 'kill -USR2 "$srun" 2> /dev/null' USR2
  trap 'kill -TERM "$srun" 2> /dev/null' TERM
  while :; do
    began=$SECONDS
    @SRUN@ &
    srun=$!
    await "$srun"
    code=$?
    [ ! -s "$run/slurm/left-$start-$node" ] && ! is_over || return $code
    [ "$(patient squeue --noheader --jobs "$job" --format %T)" = RUNNING ] || return $code
    [ $((SECONDS - began)) -lt @CALM_S@ ] || deaths=0
    # What ends with a code of its own before it can say so, as where there is no Python, is hardly cured by time.
    deaths=$((deaths + (code > 128 ? 1 : @MAX_DEATHS@ / 3)))
    event supervisor_lost "\"host\": \"$host\", \"node\": $node"
    if [ $deaths -ge @MAX_DEATHS@ ] || ! holds "$host"; then
      echo "$host" > "$run/slurm/lost-$start-$node"
      return $code
    fi
    sleep 2
  done
}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
hosts=("${hosts[@]:0:@NUM@}") attending=()
for node in "${!hosts[@]}"; do
  attend "$node" "${hosts[node]}" &
  attending+=($!)
done
trap 'kill -USR2 $(jobs -rp) 2> /dev/null' USR2
code=0 since=
while [ -n "$(jobs -rp)" ]; do
  sleep 1
  is_over || continue
  : > "$run/slurm/left-$start-script"
  since=${since:-$SECONDS}
  [ $((SECONDS - since)) -lt @LINGER_S@ ] || kill $(jobs -rp) 2> /dev/null
done
for each in "${attending[@]}"; do wait "$each" || code=$?; done
(exit $code)"""


def steps(srun: str, *, num: int) -> str:
    """Shell that starts the supervisors and waits for them; its exit code is one of theirs that is not 0, if any.

    It needs ``run``, ``start`` and ``job``, and the functions ``patient`` and ``event``.

    Args:
        srun: the command that starts one, with the shell's ``$node`` and ``$host``.
        num: of nodes; an allocation may hold more.
    """
    values = {"SRUN": srun, "NUM": num, "MAX_DEATHS": MAX_DEATHS, "CALM_S": CALM_S, "LINGER_S": LINGER_S}
    text = _STEPS.lstrip()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text
