"""``launch report``: writes a run's report.html, report.json and model_card.md again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch report``; return its exit code."""
    parser = parser_of("report", "Write report.html, report.json and model_card.md of a run.")
    parser.add_argument("run_dir", metavar="RUN")
    run = RunDir.existing(parser.parse_args(argv).run_dir)
    from launcher.report import build as report

    report.write_report(run)
    print(run.report_html)
    return EXIT_OK
