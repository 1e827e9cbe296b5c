"""Images per second in training: `launch` against what people write or use now, on the same images, in turn.

    python -m tests.bench.peers [--data DIR] [--model resnet18] [--px 64] [--head-only] [--ranks 2] [--rounds 5]
                                [--sides launch ddp accelerate lightning timm] [--json FILE]

The plain DDP loop, accelerate and Lightning train torchvision's model (its weights random, as ours) on an ImageFolder
with Pillow and torchvision's transforms; timm is its own train script with its own model of that name. They live in an
environment of their own in the launcher's cache folder, which is made at the first use, with this environment's torch.

All sides are measured alike: images between the first counted step and the last of each epoch, by the wall clock; the
first steps of an epoch (`--skip`), validation and checkpoints do not count. CPU seconds are those of all processes of a
side in that time: other work on the machine changes them less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.bench.peers import environment, sides
from tests.bench.peers.sides import SIDES, Speed, Work


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/*.jpg; by default photos of noise")
    parser.add_argument("--model", default="resnet18", help="of torchvision")
    parser.add_argument("--px", type=int, default=64, help="height and width that the model sees")
    parser.add_argument("--batch", type=int, default=16, help="images per rank and step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="of an epoch; the images are as many as they need")
    parser.add_argument("--skip", type=int, default=3, help="steps at the beginning of each epoch that do not count")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each rank of the peers")
    parser.add_argument("--head-only", action="store_true", help="freeze all but the head (timm's script cannot)")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES], default=[*SIDES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe, for launch")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    if options.steps % options.skip or options.steps <= options.skip:
        parser.error(f"--steps {options.steps} must be a multiple of --skip {options.skip}, and more")
    if options.head_only and "timm" in options.sides:
        options.sides.remove("timm")
    return options


def main() -> None:
    """Run all sides in turn, and print how they compare."""
    options = parse()
    python = environment.prepare(options.sides)
    if "timm" in options.sides and not environment.timm_script(python):
        print("timm is left out: its train script cannot be had (TIMM_TRAIN=/path/to/train.py names a copy)")
        options.sides.remove("timm")
    found: dict[str, list[Speed]] = {name: [] for name in options.sides}
    with tempfile.TemporaryDirectory() as name:
        work = Work.prepare(Path(name), options, python)
        for number in range(options.rounds):
            for side in options.sides[:: 1 if number % 2 == 0 else -1]:
                found[side].append(sides.measure(side, work))
                print(f"round {number + 1}: {side:<10} {found[side][-1]}", flush=True)
    print(table(options, found))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "data")}
        speeds = {side: [asdict(one) for one in runs] for side, runs in found.items()}
        options.json.write_text(json.dumps({"settings": settings, "speeds": speeds}, indent=1) + "\n")


def table(options: argparse.Namespace, found: dict[str, list[Speed]]) -> str:
    """Medians over the rounds; of each round's ratio the median, least and most."""
    learns = "the head" if options.head_only else "all weights"
    ranks = f"{options.ranks} ranks, batch {options.batch} each, {options.rounds} rounds"
    lines = [
        f"{options.model} at {options.px} px, {learns}: {ranks}",
        "",
        "| side | images/s | launch is faster by | images per CPU second | launch needs less by |",
        "|---|---|---|---|---|",
    ]
    ours = found.get("launch", [])
    for side, runs in found.items():
        wall, cpu = (statistics.median(values) for values in zip(*(one.both for one in runs), strict=True))
        ratios = ["", ""]
        if ours and side != "launch":
            pairs = [[a / b for a, b in zip(o.both, t.both, strict=True)] for o, t in zip(ours, runs, strict=True)]
            ratios = [spread(list(column)) for column in zip(*pairs, strict=True)]
        lines.append(f"| {side} | {wall:.1f} | {ratios[0]} | {cpu:.1f} | {ratios[1]} |")
    peers = {side: statistics.median(one.images_per_s for one in runs) for side, runs in found.items()}
    if ours and len(peers) > 1:
        speed = peers.pop("launch")
        best = max(peers, key=lambda side: peers[side])
        lines += ["", f"launch takes {speed / peers[best]:.2f} times the images a second of {best}, the best of them"]
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    """``1.42 (1.38 to 1.47)``."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
