"""The ``launch`` command: one table of its subcommands. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from launcher.errors import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class _Module(Protocol):
    """A module of ``launcher.commands``."""

    def main(self, argv: Sequence[str]) -> int:
        """Run the command; return its exit code."""


@dataclass(frozen=True)
class Command:
    """A subcommand of ``launch``."""

    usage: str
    """Its arguments, as `launch --help` shows them."""
    about: str
    """What it does, in a line."""
    load: Callable[[], _Module]
    """Imports its module."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    with explained() as ended:
        if command:
            ended.code = command.load().main(arguments[1:])
        else:
            from launcher.commands import launch

            ended.code = launch.main(arguments, epilog=epilog(), commands=COMMANDS)
    return ended.code


def epilog() -> str:
    """The end of `launch --help`: the other commands and the exit codes."""
    rows = [f"  {f'launch {verb} {command.usage}':<24} {command.about}" for verb, command in COMMANDS.items()]
    return "\n".join(
        [
            "other commands:",
            *rows,
            "",
            "exit codes: 0 done, 1 failed, 2 wrong recipe or command line (nothing was started), 3 a check of the",
            "machine or of images failed, 75 interrupted with a checkpoint and resumable",
        ]
    )


def _augment() -> _Module:
    from launcher.commands import augment

    return augment


def _benchmark() -> _Module:
    from launcher.commands import benchmark

    return benchmark


def _cancel() -> _Module:
    from launcher.commands import cancel

    return cancel


def _check() -> _Module:
    from launcher.commands import check

    return check


def _watch() -> _Module:
    from launcher.commands import watch

    return watch


def _completion() -> _Module:
    from launcher.commands.completion import Completion

    return Completion(COMMANDS)


def _compare() -> _Module:
    from launcher.commands import compare

    return compare


def _doctor() -> _Module:
    from launcher.commands import doctor

    return doctor


def _evaluate() -> _Module:
    from launcher.commands import evaluate

    return evaluate


def _export() -> _Module:
    from launcher.commands import export

    return export


def _logs() -> _Module:
    from launcher.commands import logs

    return logs


def _lr_find() -> _Module:
    from launcher.commands import lr_find

    return lr_find


def _init_profile() -> _Module:
    from launcher.commands import init_profile

    return init_profile


def _new() -> _Module:
    from launcher.commands import new

    return new


def _models() -> _Module:
    from launcher.commands import models

    return models


def _predict() -> _Module:
    from launcher.commands import predict

    return predict


def _ps() -> _Module:
    from launcher.commands import ps

    return ps


def _push() -> _Module:
    from launcher.commands import push

    return push


def _recipes() -> _Module:
    from launcher.commands import recipes

    return recipes


def _report() -> _Module:
    from launcher.commands import report

    return report


def _resume() -> _Module:
    from launcher.commands import resume

    return resume


def _schema() -> _Module:
    from launcher.commands import schema

    return schema


def _serve() -> _Module:
    from launcher.commands import serve

    return serve


def _package() -> _Module:
    from launcher.commands import package

    return package


def _track() -> _Module:
    from launcher.commands import track

    return track


def _tune() -> _Module:
    from launcher.commands import tune

    return tune


def _why() -> _Module:
    from launcher.commands import why

    return why


COMMANDS = {
    "resume": Command("RUN", "go on from a run's last checkpoint", _resume),
    "logs": Command("RUN [-f]", "what the ranks wrote; --rank R, --attempt A, --grep X", _logs),
    "ps": Command("[FOLDER]", "the runs below a folder: state, job, progress", _ps),
    "cancel": Command(
        "RUN", "stop a run (or a sweep's folder), wherever it runs; a checkpoint is saved first", _cancel
    ),
    "watch": Command(
        "RUN …", "how runs get on, from their files: progress, curves, speed, queue; here or on a login node", _watch
    ),
    "track": Command(
        "RUN", "send a run's records to wandb, TensorBoard or MLflow, live from a login node, or afterwards", _track
    ),
    "compare": Command("RUN …", "runs or folders of runs side by side, the best first", _compare),
    "export": Command("RUN", "export, quantize and measure a run's best checkpoint again", _export),
    "benchmark": Command("RUN|FILE", "time exported models on this machine, beside eager PyTorch", _benchmark),
    "evaluate": Command("RUN", "measure a run's best checkpoint on its validation images, or on others", _evaluate),
    "predict": Command("RUN IMAGE …", "classify images, folders or patterns; an ONNX file needs no torch", _predict),
    "serve": Command("RUN|FILE", "answer requests over HTTP with a run's model; an ONNX file needs no torch", _serve),
    "package": Command("RUN", "a folder with the model, its server and a Dockerfile, which needs no torch", _package),
    "push": Command(
        "RUN --to PLACE", "share the card and the accepted exports: a folder, hub:OWNER/NAME, wandb", _push
    ),
    "report": Command("RUN", "write report.html, report.json and model_card.md again", _report),
    "why": Command("RUN", "the first failure of a run, and its cure", _why),
    "models": Command(
        "[PATTERN]", "torchvision's classification models; --layers ARCH: names for freeze and groups", _models
    ),
    "recipes": Command("[NAME]", "the recipes that come with this package; NAME: print one", _recipes),
    "new": Command("NAME --data PATH", "a recipe for your images, chosen and explained; --from RECIPE: a copy", _new),
    "init-profile": Command("[NAME]", "ask this SLURM cluster what it has, and write a profile for it", _init_profile),
    "tune": Command("RECIPE", "measure batch sizes on this machine, and show what was measured", _tune),
    "lr-find": Command("RECIPE", "a learning rate to begin with, by a short training that is thrown away", _lr_find),
    "augment": Command("RECIPE", "a picture of training images before and after augmentation", _augment),
    "check": Command("DATA", "look through an image folder: bad files, classes, images that are there twice", _check),
    "doctor": Command("", "check this machine; --nodes N: nodes of a cluster and their network", _doctor),
    "completion": Command("bash|zsh|fish", "what your shell needs to complete commands, recipes and keys", _completion),
    "schema": Command("", "the JSON Schema of a recipe, for editors", _schema),
}

if __name__ == "__main__":
    sys.exit(main())
