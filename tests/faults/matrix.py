"""The table of faults: what each is, what is promised, and what provokes it on a real run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.faults import data, disk, kills, losses, nodes, processes, terminals

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.bench import Bench, Outcome


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row."""

    name: str
    """What goes wrong."""
    promise: str
    """What holds all the same."""
    provoke: Callable[[Bench], Outcome]
    """Has it go wrong, and asserts the promise."""
    needs_cluster: bool = False
    """Whether it happens on a SLURM cluster, which this machine pretends."""
    in_suite: bool = True
    """Whether the suite provokes it too, and not only `make faults`: another one shows the same, and it takes long."""


FAULTS = (
    Fault(
        name="kill -9 of a rank",
        promise="started again from the last checkpoint; the same bits",
        provoke=processes.rank,
    ),
    Fault(
        name="kill -9 of a loader process",
        promise="started again from the last checkpoint; the same bits",
        provoke=processes.loader,
    ),
    Fault(
        name="kill -9 of the supervisor (the agent)",
        promise="the workers save and leave; resumed: the same bits, no step lost",
        provoke=processes.supervisor,
    ),
    Fault(
        name="kill -9 of all at once",
        promise="resumed from the last checkpoint; the same bits",
        provoke=processes.everything,
    ),
    Fault(
        name="kill -9 at random moments of one run",
        promise="the same bits; no sample repeated or missed",
        provoke=kills.at_random_moments,
    ),
    Fault(
        name="the same with phases, a one-cycle schedule, EMA, mixup, CutMix and data.balance",
        promise="the same bits, also of the EMA; no sample repeated or missed",
        provoke=kills.of_the_whole_craft,
    ),
    Fault(
        name="SIGTERM",
        promise="saves, exit 75; resumed: the same bits, no step lost",
        provoke=processes.sigterm,
    ),
    Fault(
        name="Ctrl-C once",
        promise="saves, exit 75; resumed: the same bits, no step lost",
        provoke=processes.ctrl_c,
    ),
    Fault(
        name="Ctrl-C twice",
        promise="ends at once, nobody left; resumed from the last checkpoint: the same bits",
        provoke=processes.ctrl_c_twice,
    ),
    Fault(
        name="the terminal is closed (nohup launch … &)",
        promise="trains on, to exit 0 and the same bits",
        provoke=terminals.nohup,
    ),
    Fault(
        name="the terminal is closed (launch … & disown)",
        promise="trains on, to exit 0 and the same bits",
        provoke=terminals.disown,
    ),
    Fault(
        name="the terminal is closed (setsid launch … &)",
        promise="trains on, to exit 0 and the same bits",
        provoke=terminals.setsid,
    ),
    Fault(
        name="the reader of its output leaves, as head -1 does (launch … piped)",
        promise="trains on, to exit 0 and the same bits",
        provoke=terminals.closed_pipe,
    ),
    Fault(
        name="power loss at every write point of a checkpoint",
        promise="a whole checkpoint, no older than the last that was reported as written; last and best lead to one",
        provoke=losses.of_checkpoints,
    ),
    Fault(
        name="power loss: the other files of a run",
        promise="recipe and plan survive once workers start; the run can be resumed whatever else is lost",
        provoke=losses.of_a_run,
    ),
    Fault(
        name="a checkpoint truncated, or a byte of it flipped, at random places",
        promise="passed over with an event that says which file; the run goes on from the one before",
        provoke=disk.damaged,
    ),
    Fault(
        name="disk full, later not any more",
        promise="training goes on; the last checkpoint stays whole; event and line; no record lost; exit 0",
        provoke=disk.full_then_freed,
    ),
    Fault(
        name="disk full to the end",
        promise="exit 1 and why, no restart in vain; the last checkpoint stays whole and the run can be resumed",
        provoke=disk.full_to_the_end,
    ),
    Fault(
        name="disk full, then SIGTERM",
        promise="exit 75 and which checkpoint is kept; resumed: the same bits",
        provoke=disk.full_when_stopped,
    ),
    Fault(
        name="disk full from the start",
        promise="exit 2 and why; nothing is started",
        provoke=disk.full_from_the_start,
    ),
    Fault(
        name="corrupt image before the run (data.on_bad_image: error)",
        promise="exit 2 with its path; nothing is written",
        provoke=data.corrupt_before,
    ),
    Fault(
        name="corrupt image before the run (data.on_bad_image: quarantine)",
        promise="left out on every rank, and listed; every other sample once an epoch",
        provoke=data.corrupt_quarantined,
    ),
    Fault(
        name="an image becomes corrupt during the run",
        promise="exit 1 with its path, no restart in vain; mended and resumed: the same bits",
        provoke=data.corrupt_during,
    ),
    Fault(
        name="NaN, train.on_nan: stop",
        promise="all ranks stop at that step, exit 1; the log names the images; no NaN in the weights",
        provoke=data.nan_stop,
    ),
    Fault(
        name="NaN, train.on_nan: skip",
        promise="the step has no effect, and is told; exit 0",
        provoke=data.nan_skip,
    ),
    Fault(
        name="NaN, train.on_nan: rollback",
        promise="back to the last checkpoint and on without that step, three times at most",
        provoke=data.nan_rollback,
    ),
    Fault(
        name="a rank hangs (SIGSTOP)",
        promise="found after train.hang_timeout_s; the stacks of all ranks in their logs; started again: the same bits",
        provoke=processes.hang,
    ),
    Fault(
        name="wandb cannot be reached",
        promise="training goes on; one warning, an offline record, `wandb sync` in the report; exit 0",
        provoke=data.wandb_down,
    ),
    Fault(
        name="kill -9 of a node's supervisor, in a job of 3 nodes (--nodes 3)",
        promise="queued again without that node; the samples of every step as undisturbed",
        provoke=nodes.requeued,
        needs_cluster=True,
        in_suite=False,
    ),
    Fault(
        name="the same in a job that shrinks and grows (--nodes 2:3)",
        promise="the other two train on within 30 s after it was noticed, in the same job; it is taken in again",
        provoke=nodes.supervisor,
        needs_cluster=True,
        in_suite=False,
    ),
    Fault(
        name="a node's network is cut, and later given back (--nodes 2:3)",
        promise="the other two train on within 30 s after it was noticed, in the same job; it is taken in again",
        provoke=nodes.cut,
        needs_cluster=True,
    ),
    Fault(
        name="the network of the job's first node is cut for good (--nodes 2:3 --spares 1)",
        promise="the others train on and the spare one takes its place, in the same job, which they end",
        provoke=nodes.first,
        needs_cluster=True,
    ),
    Fault(
        name="kill -9 of all of a node at random moments of one job (--nodes 2:3)",
        promise="the samples of every step as undisturbed, in the same job",
        provoke=nodes.at_random_moments,
        needs_cluster=True,
    ),
)
