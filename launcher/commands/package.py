"""``launch package``: a folder that serves a run's model anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch package``; return its exit code."""
    parser = parser_of(
        "package", "Make a folder with a run's model, the code that serves it and a Dockerfile: no torch."
    )
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--to", metavar="FOLDER", help="instead of RUN/package")
    parser.add_argument("--format", metavar="NAME", help="of the model (the fastest ONNX file that passed its gate)")
    args = parser.parse_args(argv)
    from launcher.tools import package

    folder, row = package.package(RunDir.existing(args.run_dir), Path(args.to) if args.to else None, args.format)
    shown = os.path.relpath(folder)
    print(f"{shown}: {row['file']}, the code that serves it, requirements.txt, Dockerfile, README.md")
    print(f"serve:   (cd {shown} && python -m launcher serve {row['file']})")
    print(f"image:   docker build {shown}")
    return EXIT_OK
