"""Has the node's images decoded and kept (``data.cache``) by a process of its own, before the workers begin."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.system import phases, processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.runs.run_dir import RunDir

LOOK_S = 0.2
"""How often the supervisor looks whether it is to stop meanwhile."""


def keep(run: RunDir, heed: Callable[[], None]) -> None:
    """Tell the workers of this process where pixels are kept, if the recipe asks for that and there are any.

    Args:
        run: its recipe says what is kept, and its images are looked through.
        heed: called several times a second; what it raises ends the work.
    """
    from launcher.recipe import load as recipes

    cache = recipes.read_resolved(run.recipe).data.cache
    if cache == "none":
        return
    import multiprocessing

    phases.at("decoding the images that are kept (data.cache)")
    with processes.importing():
        from launcher.engine.loading import keep_pixels, kept_pixels

    os.environ.pop(kept_pixels.FOLDER_VARIABLE, None)
    # The user's own code may be asked about the model, which is nothing for the supervisor's process.
    process = multiprocessing.get_context("fork").Process(target=_keep, args=(run,), name="keep-pixels")
    process.start()
    try:
        while process.is_alive():
            process.join(LOOK_S)
            heed()
    finally:
        process.kill()  # with all that it has started
        process.join()
    if process.exitcode == EXIT_OK:
        os.environ[kept_pixels.FOLDER_VARIABLE] = str(keep_pixels.root_of(cache))


def _keep(run: RunDir) -> None:
    from launcher.engine.loading import keep_pixels

    keep_pixels.start_process()
    try:
        kept = keep_pixels.prepare(run)
    except Exception as error:  # whatever it is, the images can be read as ever
        print(f"data.cache: {type(error).__name__}: {error}; the run goes on without", file=sys.stderr, flush=True)
        kept = False
    sys.stderr.flush()
    os._exit(EXIT_OK if kept else EXIT_FAILED)
