"""``launch predict``: what a trained model says of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.parser import parser_of
from launcher.errors import EXIT_FAILED, EXIT_OK, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from launcher.tools.explain import Explainer

EXPLAINED = "explained"
"""The folder of the pictures of --explain, where none is named."""


def main(argv: Sequence[str]) -> int:
    """Run ``launch predict``; return its exit code."""
    parser = parser_of("predict", "Classify images with a run's model or an exported ONNX file (which needs no torch).")
    parser.add_argument("model", metavar="RUN|FILE", help="a run directory, or an ONNX file of its exports")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders, patterns, or - (paths by line)")
    parser.add_argument(
        "--top", type=int, metavar="K", help="classes of each image (5; all of a model of several classes)"
    )
    parser.add_argument("--batch", default="auto", metavar="N", help="images that are computed at once (auto)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", dest="as_json", help="a JSON object in each line")
    form.add_argument("--csv", action="store_true", help="a table")
    form.add_argument("--parquet", metavar="FILE", help="a table, by pyarrow")
    parser.add_argument("--explain", action="store_true", help="write where the model looked too (of a run, by captum)")
    parser.add_argument("--out", metavar="FOLDER", help="for the pictures of --explain (explained)")
    args = parser.parse_args(argv)
    if args.out and not args.explain:
        raise UsageError("--out is where --explain writes its pictures; answers go to standard output")
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Classify; what cannot be read is told and passed over.

    Raises:
        UsageError: a number is none, the model or an image is not there.
    """
    if args.top is not None and args.top < 1:
        raise UsageError(f"--top: found {args.top}; valid: a whole number >= 1")
    if args.batch != "auto" and not (args.batch.isdigit() and int(args.batch)):
        raise UsageError(f"--batch: found {args.batch!r}; valid: a whole number >= 1, or auto")
    from rich.console import Console
    from rich.progress import track

    from launcher.tools import predict, trained_model

    images = list(predict.find_images(args.images, sys.stdin))
    model = trained_model.load(args.model, many=len(images) > 1)
    top = min(args.top or model.usual_top, len(model.classes))
    batch_size = None if args.batch == "auto" else int(args.batch)
    counts = {"read": 0, "unread": 0}
    is_shown = sys.stderr.isatty() and not sys.stdout.isatty()  # else the answers themselves show how far it is
    watched = track(images, "images", console=Console(stderr=True), disable=not is_shown)
    explainer = _explainer(args) if args.explain else None
    told = predict.counted(model.stream(watched, top=top, batch_size=batch_size), counts)
    if explainer:
        told = explainer.each(told, model)
    if args.parquet:
        predict.write_parquet(told, Path(args.parquet), top=top)
    elif args.csv:
        predict.write_csv(told, sys.stdout, top=top)
    else:
        (predict.write_json if args.as_json else predict.write_text)(told, sys.stdout)
    if args.explain:
        print(f"pictures of what the model looked at: {args.out or EXPLAINED}/", file=sys.stderr)
    if counts["unread"]:
        print(f"{counts['unread']} of {len(images)} images cannot be read", file=sys.stderr)
    return EXIT_OK if counts["read"] or not images else EXIT_FAILED


def _explainer(args: argparse.Namespace) -> Explainer:
    from launcher.tools import explain

    return explain.Explainer(args.model, Path(args.out or EXPLAINED))
