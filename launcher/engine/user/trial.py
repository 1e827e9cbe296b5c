"""Runs the user's code once before anything is started, in a child process, from the copy that the run will have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.error_kinds import error_record
from launcher.engine.tuning.child import OutOfMemoryError, TooSlowError, call_in_child
from launcher.errors import LaunchError, TrainingError
from launcher.recipe import user_code as recipe_code
from launcher.recipe.user_modules import CODE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.recipe.schema import Recipe
    from launcher.runs.user_code import Code

    Findings = list[tuple[str, str]]
    """Keys of a recipe, each with what is wrong."""

TIMEOUT_S = 600.0


class UserCodeError(TrainingError):
    """The user's own code raised; ``record`` is what an error file holds."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(f"your own code raised {record['type']}: {record['message']}\n{record['traceback']}".rstrip())
        self.record = record


def find_problems(
    recipe: Recipe, code: Code, find: Callable[[Recipe], Iterator[tuple[str, str]]], *, place: Path
) -> Findings:
    """What ``find`` finds of a recipe with the user's code, which runs in a child process.

    Args:
        recipe: with references as the run's recipe has them.
        code: what they lead to.
        find: called with the recipe whose references lead to the code.
        place: the run directory, for messages.

    Raises:
        UserCodeError: the code raised.
    """
    with tempfile.TemporaryDirectory(prefix="launch-trial-") as name:
        folder = Path(name).resolve()
        code.write(folder / CODE)
        trial = recipe_code.placed(recipe, folder)
        try:
            found: dict[str, Any] = call_in_child(
                lambda: _try(trial, find), timeout_s=TIMEOUT_S, heed_stop=lambda: None
            )
        except (OutOfMemoryError, TooSlowError) as error:  # training will tell; here it may be for want of a GPU
            print(f"warning: your own code was not tried before the start: {error}", flush=True)
            return []
    if record := found.get("error"):
        for key in ("traceback", "own_line"):
            record[key] = (record[key] or "").replace(str(folder), str(place)) or None
        raise UserCodeError(record)
    problems: Findings = found["problems"]
    return problems


def _try(recipe: Recipe, find: Callable[[Recipe], Iterator[tuple[str, str]]]) -> dict[str, Any]:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.environ["PYTHONBREAKPOINT"] = "0"  # nobody is there to answer
    try:
        return {"problems": list(find(recipe))}
    except LaunchError:
        raise
    except BaseException as error:  # whatever the user's code raises
        return {"error": error_record(error)}
