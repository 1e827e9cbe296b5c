"""The exports of a run, made where it was trained, by a process of their own."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.system import console, numa, processes
from launcher.system.redact import redact

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir


def run_post_step(run: RunDir) -> str | None:
    """Make the exports in a process of their own, forked with torch imported; return what went wrong, or None."""
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=_post_step, args=(run,), name="post-step")
    process.start()
    process.join()
    if process.exitcode == EXIT_OK:
        return None
    console.say_over("", end="")  # it may have left a line in place
    lines = (
        run.post_log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if run.post_log.exists() else []
    )
    return (
        f"the export failed (exit code {process.exitcode}): {lines[-1] if lines else 'no output'} (log: {run.post_log})"
    )


def _post_step(run: RunDir) -> None:
    import signal
    import traceback

    for number in processes.heeded():
        signal.signal(number, signal.SIG_DFL)
    processes.die_with_parent()
    os.environ.pop(numa.PLACES_VARIABLE, None)  # the workers'
    if run.read_plan().export_threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)  # a worker's share of the cores; nothing else computes now
    terminal = os.dup(1)
    console.redirect(run.post_log)
    try:
        from launcher.tools import export

        export.export_run(run, terminal=terminal)
    except Exception:  # whatever it is, its text goes to a file
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
