"""``launch push``: puts a run's card and its accepted exports where others find them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_OK
from launcher.runs.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``launch push``; return its exit code."""
    parser = parser_of("push", "Share a run's model card with the exports that passed their gate.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--to", required=True, metavar="FOLDER|hub:OWNER/NAME|wandb", help="a new or an earlier place")
    parser.add_argument("--public", action="store_true", help="a new repository of the hub is for everybody to read")
    args = parser.parse_args(argv)
    run = RunDir.existing(args.run_dir)
    from launcher.tools import push

    print(f"pushed: {push.push(run, args.to, is_public=args.public)}")
    return EXIT_OK
