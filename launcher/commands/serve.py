"""``launch serve``: answers requests over HTTP with a trained model."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from dataclasses import Field

NEEDED = ("uvicorn", "starlette", "python_multipart", "prometheus_client")
MAX_PORT = 65535
OPTIONS = {
    "host": "address to listen at (127.0.0.1: for this machine only; 0.0.0.0: for all)",
    "port": "0: any that is free",
    "workers": "processes, which share the cores",
    "max_batch": "images that a core computes at once at most; 1: one by one, by all cores",
    "max_wait_ms": "the first image of a batch waits so long for others at most",
    "max_queue": "images of a process that are under way at most; more are refused with 503",
    "max_body_mb": "a larger body is refused with 413",
    "max_pixels": "an image of more pixels is refused with 413",
    "timeout_s": "a request that takes longer is answered with 504",
    "drain_s": "told to stop, go on answering for so long, while /ready says 503",
}
"""What each option means; it is a field of the server's Settings, which has its type and default."""
KINDS: dict[str, type] = {"int": int, "float": float, "str": str}
MAY_BE_0 = ("port", "max_wait_ms", "drain_s")


def main(argv: Sequence[str]) -> int:
    """Run ``launch serve``; return its exit code."""
    parser = parser_of("serve", "Serve a run's model, or an exported ONNX file (which needs no torch), over HTTP.")
    parser.add_argument("model", metavar="RUN|FILE", help="a run directory, or an ONNX file of its exports")
    for name, field in _fields().items():
        kind, default = KINDS[str(field.type)], field.default
        shown = f"{default:g}" if isinstance(default, float) else default
        metavar = "ADDRESS" if kind is str else "N"
        parser.add_argument(
            _option(name), type=kind, default=default, metavar=metavar, help=f"{OPTIONS[name]} ({shown})"
        )
    return run(parser.parse_args(argv))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fields() -> dict[str, Field[Any]]:
    from launcher.tools.serving.settings import Settings

    return {field.name: field for field in fields(Settings) if field.name in OPTIONS}


def run(args: argparse.Namespace) -> int:
    """Serve until a signal says to stop.

    Raises:
        UsageError: a number is none, the model is not there, the address is taken, or the extra is not installed.
    """
    problems = list(_problems(args))
    if problems:
        raise UsageError("\n".join(problems))
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UsageError('launch serve needs its extra: pip install "finetune-launcher[serve]"')
    _look(args.model)
    from launcher.tools.serving import server, workers
    from launcher.tools.serving.settings import Settings

    settings = Settings(**vars(args))
    listening = server.listen(settings)
    where = server.address(listening)

    def tell() -> None:
        print(f"serving {args.model} at {where} (Ctrl-C stops; the page to try it is {where}/)", flush=True)

    if settings.workers > 1:
        return workers.serve(settings, listening, tell)
    server.serve(settings, listening, tell)
    return EXIT_OK


def _problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the numbers."""
    found = []
    for name in (name for name in OPTIONS if name != "host"):
        value = getattr(args, name)
        if not (0 <= value < math.inf if name in MAY_BE_0 else 0 < value < math.inf):
            found.append(f"{_option(name)} {value:g}: give {'0 or more' if name in MAY_BE_0 else 'more than 0'}")
    if args.port > MAX_PORT:
        found.append(f"--port {args.port}: ports end at {MAX_PORT}")
    return found


def _look(model: str) -> None:
    """Refuse what is no model before anything is started."""
    from launcher.runs.run_dir import RunDir

    place = Path(model)
    if place.suffix == ".onnx" and not place.is_file():
        raise UsageError(f"{model}: no such file")
    if not place.is_file():
        RunDir.existing(model)
