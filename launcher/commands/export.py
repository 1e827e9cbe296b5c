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
    parser.add_argument("overrides", metavar="data.path=FOLDER", nargs="*", help="where the images are now")
    args = parser.parse_args(argv)
    run, data_path = RunDir.existing(args.run_dir), None
    for item in args.overrides:
        key, _, data_path = item.partition("=")
        if key != "data.path" or not data_path:
            raise UsageError(f"{item}: a checkpoint is exported as its run says; only data.path=FOLDER can change")
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
        export.export_run(run, data_path, args.format)
    finally:
        if run.export_manifest.exists():
            report.write_report(run)
    print(finish.summary(run))
    return EXIT_OK
