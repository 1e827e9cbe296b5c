"""``launch track``: send a run's records to wandb, TensorBoard or MLflow, live or afterwards, from its files alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from launcher.backends import living
from launcher.commands.parser import parser_of
from launcher.commands.run_end import Ending
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, UsageError
from launcher.runs import history, whereabouts
from launcher.runs.run_dir import RunDir
from launcher.tracking import sink as sinks
from launcher.tracking import wandb_mode
from launcher.tracking.trackers import POLL_S, Trackers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.recipe.schema import Recipe

ASK_S = 10.0
"""Seconds between two questions whether exports are still made."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch track``; return its exit code."""
    parser = parser_of(
        "track",
        "Send a run's records to wandb, TensorBoard or MLflow until the run is over: while it trains elsewhere, or "
        "afterwards. It can be stopped at any time; the next one goes on. Without an option: what the recipe names.",
    )
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--wandb", action="store_true", help="to Weights & Biases")
    parser.add_argument("--offline", action="store_true", help="with --wandb: record into the run, for `wandb sync`")
    parser.add_argument("--tensorboard", action="store_true", help="into RUN/tensorboard")
    parser.add_argument("--mlflow", action="store_true", help="to MLflow (tracking.mlflow.uri, MLFLOW_TRACKING_URI)")
    parser.add_argument("--once", action="store_true", help="send what there is now, and end")
    args = parser.parse_args(argv)
    run = RunDir.existing(args.run_dir)
    asked = [name for name in sinks.NAMES if getattr(args, name)] or (["wandb"] if args.offline else [])
    from launcher.recipe import load as recipes

    recipe = recipes.read_resolved(run.recipe)
    names = asked or list(dict.fromkeys(recipe.tracking.backends))
    mode = "offline" if args.offline else _mode(recipe, names, asked=bool(asked))
    if problems := list(filter(None, map(sinks.lacking, names))):
        raise UsageError("\n".join(problems))
    return _track(run, names, mode, once=args.once)


def _mode(recipe: Recipe, names: Sequence[str], *, asked: bool) -> str:
    """How wandb is used: as the recipe says, or online where it says no more than that training does not."""
    mode = wandb_mode.asked_mode(recipe.tracking.wandb.mode)
    if "wandb" not in names:
        return mode
    if mode == "disabled" and not asked:
        raise UsageError("the recipe has tracking.wandb.mode: disabled; to track the run all the same: --wandb")
    mode = "online" if mode == "disabled" else mode
    if mode != "offline" and (lacking := wandb_mode.lacking_key()):
        raise UsageError(f"wandb: {lacking}; `wandb login` stores one; --offline records for `wandb sync`")
    return mode


def _track(run: RunDir, names: Sequence[str], mode: str, *, once: bool) -> int:
    def say(line: str) -> None:
        print(line, flush=True)

    say(
        f"{', '.join(names)}: following {run}{'' if once else ' until it is over (Ctrl-C stops; this command goes on)'}"
    )
    ended = _Ended(run)
    try:
        with Trackers(run, names, say=say, beside=False, mode=mode) as trackers:
            while not once and trackers.alive and not ended():
                time.sleep(POLL_S)
            trackers.finish(None)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return EXIT_RESUMABLE
    code = max((EXIT_FAILED if code < 0 else code for code in trackers.codes), default=EXIT_OK)  # < 0: killed
    if code == EXIT_OK:
        say(f"{', '.join(names)}: {run} is {run.read_status()['state']}, and its record is complete")
    return code


class _Ended:
    """Whether nothing more will come: the run is over, and so are its exports."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._ending = Ending(run)
        self._asked: float | None = None
        self._looked: float | None = None
        self._is_over = False

    def __call__(self) -> bool:
        """Look, once a second at most."""
        now = time.monotonic()
        if self._looked is None or now - self._looked >= 1.0:
            self._looked, self._is_over = now, self._look(now)
        return self._is_over

    def _look(self, now: float) -> bool:
        if not self._ending.has_come():
            return False
        if self._run.read_status()["state"] not in whereabouts.TRAINED:
            return True
        if history.since_launched(self._run, "completed") and not self._run.read_plan().post_job:
            return True
        if self._asked is not None and now - self._asked < ASK_S:
            return False
        self._asked = now
        return living.living(self._run) is None
