"""`make faults`: provoke every fault of the table on this machine, print the table and write it to docs/faults.md."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from launcher import __version__
from tests import signals
from tests.faults.bench import EPOCHS, ROOT, STEPS_PER_EPOCH, Bench, NotHereError
from tests.faults.matrix import FAULTS, Fault

DOCUMENT = ROOT / "docs/faults.md"
HEAD = """# What happens when something goes wrong

Measured by `make faults`, which provokes each fault on a real run through the command line (2 workers over gloo on the
CPU, shufflenet_v2_x0_5 on {num} steps, a checkpoint every 3 steps) and compares its end with that of a run that nothing
happened to. "The same bits": model.safetensors, optimizer.pt and state.json of the last and of the best checkpoint are
the same to the last bit, and the run's own records show each sample of each epoch used exactly once. Steps lost: steps
that had been taken and were taken again. The suite has the same table (tests/faults), with fewer kills and places.

Rows with --nodes are jobs on a real SLURM cluster of four nodes that one machine pretends (slurm/dev), with 2 workers a
node that all share its cores: seconds are upper bounds. A requeue there finds a free node at once, and SLURM's waits
are cut short; on a cluster it goes to the back of the queue.

finetune-launcher {version}, Python {python}, {cores} CPU cores, seed {seed}, {minutes:.0f} minutes.

| fault | promised | what happened | steps lost |
|---|---|---|---|
"""


def row(bench: Bench, fault: Fault) -> tuple[str, bool]:
    """Provoke one; return its row, and whether the promise held."""
    start = time.monotonic()
    lost: int | str | None = None
    try:
        outcome = fault.provoke(bench)
        held, happened, lost = True, outcome.happened, outcome.steps_lost
    except NotHereError as problem:
        held, happened = True, f"not measured: {problem}"
    except Exception as error:  # the others are to be measured all the same
        traceback.print_exc()
        lines = str(error).splitlines() or [type(error).__name__]
        held, happened = False, f"BROKEN: {lines[0]}"
    finally:
        bench.close()
    print(f"{'ok ' if held else 'BAD'} {time.monotonic() - start:6.1f} s  {fault.name}: {happened}", flush=True)
    return f"| {fault.name} | {fault.promise} | {happened} | {'-' if lost is None else lost} |\n", held


def document(before: str, head: str, measured: dict[str, str]) -> str:
    """The whole document: rows that were measured now, in the table's order; those of ``before`` stay, and its head."""
    kept = {line.split(" | ")[0].removeprefix("| "): line + "\n" for line in before.splitlines()}
    known = kept | measured
    start = before.find("| fault |")
    top = head if start < 0 else before[:start] + head[head.index("| fault |") :]
    return top + "".join(known[fault.name] for fault in FAULTS if fault.name in known)


def main() -> int:
    """Go through the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="at random moments of one run")
    parser.add_argument("--places", type=int, default=100, help="of a checkpoint that are damaged in each way")
    parser.add_argument("--chances", type=int, default=10, help="disks that are tried at each point of a power loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", default="", help="faults with this in their name; other rows stay")
    args = parser.parse_args()
    signals.heed()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["FINETUNE_LAUNCHER_CACHE"] = str(folder / "cache")
    bench = Bench(folder=folder, kills=args.kills, places=args.places, chances=args.chances, seed=args.seed)
    print(f"seed {args.seed}, in {folder}", flush=True)
    start = time.monotonic()
    rows = {fault.name: row(bench, fault) for fault in FAULTS if args.only in fault.name}
    head = HEAD.format(
        num=EPOCHS * STEPS_PER_EPOCH,
        version=__version__,
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        seed=args.seed,
        minutes=(time.monotonic() - start) / 60,
    )
    measured = {name: text for name, (text, _) in rows.items()}
    print("\n" + "".join(measured.values()), flush=True)
    before = DOCUMENT.read_text() if args.only else ""
    DOCUMENT.write_text(document(before, head, measured))
    held = all(held for _, held in rows.values())
    if held:
        shutil.rmtree(folder)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
