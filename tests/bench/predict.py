"""Images a second of `launch predict` against the loop of a tutorial, on the same cores, in turn.

    python -m tests.bench.predict --photos FOLDER [--weights FILE] [--images 1000] [--rounds 3] [--size 224]

The tutorial's loop: eager PyTorch, each photo by Pillow and torchvision's transforms, batches of 32, all cores for the
network. Ours: `launch predict model.onnx FOLDER --csv`. Both are mobilenet_v2 with the same weights, each a process of
its own whose start counts, and say the same of nearly all photos, which is printed. The photos are repeated until there
are as many as asked for. Printed: seconds by the clock and of the CPU (which other programs change less), and the
ratios of each round.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLASSES = [f"class {number}" for number in range(10)]
LOOP = """
import csv, sys
from pathlib import Path
import torch, torchvision
from PIL import Image
from torchvision import transforms

weights, folder, size = sys.argv[1:4]
steps = [transforms.Resize(int(size) * 8 // 7), transforms.CenterCrop(int(size)), transforms.ToTensor()]
transform = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
model = torchvision.models.mobilenet_v2(num_classes=10)
model.load_state_dict(torch.load(weights))
model.eval()
files, out = sorted(Path(folder).iterdir()), csv.writer(sys.stdout)
for start in range(0, len(files), 32):
    part = files[start : start + 32]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in part])
    with torch.no_grad():
        found = model(images).softmax(dim=1).topk(5)
    for file, values, indices in zip(part, found.values.tolist(), found.indices.tolist()):
        out.writerow([str(file), *(f"class {index}" for index in indices), *values])
"""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with JPEG files, at any depth")
    parser.add_argument("--weights", type=Path, help="mobilenet_v2's, as safetensors; else they are random")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=224, help="pixels of what the network sees")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link_photos(args.photos, folder / "photos", args.images)
        write_models(folder, args.weights, args.size)
        python, photos = sys.executable, str(folder / "photos")
        sides = {
            "loop": [python, "-c", LOOP, str(folder / "weights.pth"), photos, str(args.size)],
            "ours": [python, "-m", "launcher", "predict", str(folder / "model.onnx"), photos, "--csv"],
        }
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(args.rounds):
            for side, command in sides.items():
                times[side].append(timed(command, folder / f"{side}.csv"))
            ratios = [a / b for a, b in zip(times["loop"][-1], times["ours"][-1], strict=True)]
            print(
                f"round {number + 1}: loop / ours {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of the CPU", flush=True
            )
        report(times, args.images)
        print(f"the same answer: {same_answers(folder):.1%} of the photos")


def link_photos(photos: Path, folder: Path, num: int) -> None:
    """As many photos as asked for, those of the folder again and again."""
    folder.mkdir()
    found = sorted(photos.rglob("*.jpg"))
    for number in range(num):
        (folder / f"{number:05d}.jpg").symlink_to(found[number % len(found)].absolute())


def write_models(folder: Path, weights: Path | None, size: int) -> None:
    """The same network for both sides."""
    import torch

    from launcher.engine.model import build_model, build_preprocessing
    from launcher.recipe.schema import ModelConfig, Recipe
    from launcher.recipe.schema_data import DataConfig
    from launcher.tools import evaluate, formats

    data = DataConfig(path=str(folder), image_size=size)
    recipe = Recipe(name="bench", model=ModelConfig(arch="mobilenet_v2", weights=None), data=data)
    torch.manual_seed(0)
    module = build_model(recipe, num_classes=len(CLASSES), image_size=size, with_weights=False).module.eval()
    if weights is not None:
        from safetensors.torch import load_file

        module.load_state_dict(load_file(weights), strict=False)
    torch.save(module.state_dict(), folder / "weights.pth")
    (folder / "model.safetensors").touch()
    best = evaluate.BestModel(
        module=module,
        recipe=recipe,
        classes=CLASSES,
        preprocessing=build_preprocessing(recipe.model, recipe.data, num_classes=len(CLASSES)),
        state={"step": 0},
        folder=folder,
        left_out=frozenset(),
    )
    formats.write_onnx(folder / "model.onnx", best)


def timed(command: list[str], output: Path) -> tuple[float, float]:
    """Seconds of a command by the clock, and of the CPU."""
    before, start = os.times(), time.perf_counter()
    with output.open("w") as file:
        subprocess.run(command, check=True, cwd=ROOT, stdout=file)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def report(times: dict[str, list[tuple[float, float]]], num: int) -> None:
    """Medians of all rounds."""
    medians = {
        side: [statistics.median(values) for values in zip(*found, strict=True)] for side, found in times.items()
    }
    for side, (clock, cpu) in medians.items():
        print(f"{side}: {clock:.1f} s by the clock ({num / clock:.0f} images/s), {cpu:.1f} s of the CPU")
    ratios = [a / b for a, b in zip(medians["loop"], medians["ours"], strict=True)]
    print(f"loop / ours: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of the CPU")


def same_answers(folder: Path) -> float:
    """The fraction of photos that both sides say the same of."""
    with (folder / "loop.csv").open() as loop, (folder / "ours.csv").open() as ours:
        theirs = {row[0]: row[1] for row in csv.reader(loop)}
        own = {row["image"]: row["class_1"] for row in csv.DictReader(ours)}
    return statistics.mean(own[name] == answer for name, answer in theirs.items())


if __name__ == "__main__":
    main()
