"""``launch why``: the first failure of a run, and its cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch why``; return its exit code."""
    parser = parser_of("why", "Show the first failure of a run's last attempt, and its cure.")
    parser.add_argument("run_dir", metavar="RUN")
    run = RunDir.existing(parser.parse_args(argv).run_dir)
    from launcher.backends import living
    from launcher.backends.slurm import job_end
    from launcher.runs import diagnose

    print(diagnose.explain(run, living.job_state(run), job_end.explain))
    return EXIT_OK
