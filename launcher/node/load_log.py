"""Writes down now and then what a node's cores, memory and GPUs do, for those who track or watch the run."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

from launcher.runs.run_dir import node_name
from launcher.system.files import append_jsonl
from launcher.system.load import Load

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs.run_dir import RunDir

FIRST_S = 5.0
"""Seconds from the start to the first line."""
EVERY_S = 15.0
"""Seconds between two lines while the file is small."""
LEAVE_S = 1.0
"""How long a line that is being made is waited for at the end: nvidia-smi may take longer."""
DOUBLE_BYTES = 256 << 10
"""Twice as many seconds for each so many bytes of it: a month of a node with eight GPUs is 3 MB."""


class LoadLog:
    """While entered, writes the lines in a thread: a millisecond each, and without a GPU no process.

    Args:
        run: where to; each node has a file of its own.
        plan: as this node carries it out.
    """

    def __init__(self, run: RunDir, plan: LaunchPlan) -> None:
        self._file = run.node_load(plan.node)
        self._is_wanted = not plan.tune
        self._has_gpus = plan.device == "cuda"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="load-log", daemon=True)

    def __enter__(self) -> Self:
        if self._is_wanted:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._is_wanted:
            self._thread.join(timeout=LEAVE_S)

    def _watch(self) -> None:
        load, wait_s, has_told = None, 0.0, False
        while not self._done.wait(wait_s):
            try:
                if load is None:
                    load, wait_s = Load(gpus=self._has_gpus), FIRST_S
                    continue
                self._file.parent.mkdir(exist_ok=True)
                append_jsonl(self._file, {"time": time.time(), "host": node_name(), **load.measure()})
                wait_s = every_s(self._file.stat().st_size)
            except (OSError, LookupError, ValueError) as error:  # a full disk; no /proc, or not as Linux writes it
                wait_s = EVERY_S
                if not has_told:
                    why = f"{type(error).__name__}: {error}"
                    print(
                        f"{self._file.name}: what this node does is not written down ({why}); trying again", flush=True
                    )
                has_told = True


def every_s(size: int) -> float:
    """Seconds to the next line of a file that has so many bytes."""
    return float(EVERY_S * 2 ** (size // DOUBLE_BYTES))
