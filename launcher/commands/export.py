"""``launch export``: exports, quantizes and measures the best checkpoint of a run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK, UsageError, did_you_mean
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch export``; return its exit code."""
    parser = parser_of("export", "Export, quantize and measure the best checkpoint of a run.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument(
        "--format", action="append", metavar="NAME", help="instead of the recipe's; may be given again: each is made"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="data.path=FOLDER: where the images are now; post.qat_steps=N: of fine-tuning, if no other int8 passes",
    )
    args = parser.parse_args(argv)
    run, (data_path, qat_steps) = RunDir.existing(args.run_dir), _read(args.overrides)
    from launcher.node import finish
    from launcher.report import build as report
    from launcher.system import console
    from launcher.tools import export

    unknown = [name for name in args.format or () if name not in export.FILES]
    if unknown:
        hint = did_you_mean(unknown[0], export.FILES)
        raise UsageError(f"--format {unknown[0]}: no such format; {hint} valid: {', '.join(export.FILES)}")
    console.protect()
    try:
        export.export_run(run, data_path, args.format, qat_steps=qat_steps)
    finally:
        if run.export_manifest.exists():
            report.write_report(run)
    print(finish.summary(run))
    return EXIT_OK


def _read(overrides: Sequence[str]) -> tuple[str | None, int | None]:
    """``data.path`` and ``post.qat_steps``; None: as the run says."""
    data_path, qat_steps = None, None
    for item in overrides:
        key, _, value = item.partition("=")
        if key == "data.path" and value:
            data_path = value
        elif key == "post.qat_steps" and value.isdecimal():
            qat_steps = int(value)
        else:
            raise UsageError(
                f"{item}: a checkpoint is exported as its run says; only data.path=FOLDER and post.qat_steps=N (a "
                "whole number) can change"
            )
    return data_path, qat_steps
