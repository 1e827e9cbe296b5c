"""How accurate it becomes: fine-tuning against a new head alone, EMA, the plain DDP loop, decoding, mixing, balance.

    python -m tests.bench.accuracy --photos FOLDER --weights FILE [--only NAME …] [--seeds 0 1 2] [--folder RUNS]

Photos are a folder with train/CLASS and val/CLASS, weights those of mobilenet_v2. Each side is trained once a seed, by
2 ranks of a thread each on the CPU. Of each study a table is printed: the metric of the best epoch of each seed, its
mean and standard deviation, the same of the last epoch, and by how much the best epochs are above those of the first
side, seed by seed. ``--folder`` keeps runs; those that are there are not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tests.bench.accuracy.studies import STUDIES, Bench, Study


def main() -> None:
    """Print a table of each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="train/CLASS and val/CLASS; without, only what needs none")
    parser.add_argument("--weights", type=Path, help="of mobilenet_v2, for --photos")
    parser.add_argument("--only", nargs="+", choices=[*STUDIES], default=[*STUDIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="where runs are kept; without, they are not")
    options = parser.parse_args()
    if (options.photos is None) != (options.weights is None):
        parser.error("--photos and --weights go together")
    with tempfile.TemporaryDirectory() as name:
        photos, weights = options.photos or Path(), options.weights or Path()
        bench = Bench(
            folder=(options.folder or Path(name)).absolute(), photos=photos.absolute(), weights=str(weights.absolute())
        )
        for study in (STUDIES[only] for only in options.only):
            if study.needs_photos and not options.photos:
                print(f"left out, for want of --photos and --weights: {study.title}\n")
                continue
            print(table(study, bench, options.seeds), flush=True)


def table(study: Study, bench: Bench, seeds: list[int]) -> str:
    """Train all sides, a seed after the other, and compare them."""
    found: dict[str, list[list[float]]] = {name: [] for name in study.sides}
    for seed in seeds:
        for name, side in study.sides.items():
            found[name].append(bench.measure(side, seed, study.metric))
    lines = [
        f"{study.title}",
        "",
        f"| | {study.metric}, {', '.join(f'seed {seed}' for seed in seeds)} | mean | last epoch | above the first |",
        "|---|---|---|---|---|",
    ]
    first = [max(epochs) for epochs in next(iter(found.values()))]
    for name, runs in found.items():
        best, last = [max(epochs) for epochs in runs], [epochs[-1] for epochs in runs]
        above = "" if name == next(iter(found)) else spread([a - b for a, b in zip(best, first, strict=True)], "+")
        each = ", ".join(f"{value:.3f}" for value in best)
        lines.append(f"| {name} | {each} | {spread(best)} | {spread(last)} | {above} |")
    return "\n".join([*lines, ""])


def spread(values: list[float], sign: str = "") -> str:
    """``0.807 ± 0.004``: mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


if __name__ == "__main__":
    main()
