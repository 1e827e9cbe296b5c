"""Images a second of one core, from files to batches, against what people write by hand.

    python -m tests.bench.loaders [--photos FOLDER] [--rounds N] [--images N] [--normalize] [--augment]

In turn, ``--rounds`` times, on one core: a tutorial's Pillow with torchvision's transforms v1, torchvision's
decode_image with v2 to normalised floats, and ours: data.decode exact and fast, and data.cache. All crop 25 to 100 % of
the area to 224 px, and mirror. Photos of 0.2 megapixels (400 x 534; --photos, or made up), and the same enlarged to 12.

What is compared is CPU time: other programs on the machine change it less than the clock. The first two make normalised
floats; ours hand over bytes, which are normalised on the device; with ``--normalize`` that is counted too. Printed:
images a second, and the ratio to the first in each round: the median and the range. With ``--augment`` instead what
each kind of augmentation adds to an image.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from launcher.engine.augmenting import transforms
from launcher.engine.data import ImageDataset, Preprocessing
from launcher.engine.loading import keep_pixels, kept_pixels
from launcher.recipe.schema_data import DataConfig

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, SCALE = 224, (0.25, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32
LARGE_PIXELS = 12e6


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder with JPEG files, at any depth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--images", type=int, default=200, help="of the small ones; a twentieth of that of the large ones"
    )
    parser.add_argument("--normalize", action="store_true", help="count what ours leaves to the device, too")
    parser.add_argument("--augment", action="store_true", help="measure augmentation, not loaders")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[kept_pixels.FOLDER_VARIABLE] = f"{folder}/pixels"
        small = write_small(Path(folder) / "small", args.photos, args.images)
        if args.augment:
            report_augmentation(small, args.rounds)
            return
        report("0.2 megapixels", small, args.rounds, normalizes=args.normalize)
        large = write_large(Path(folder) / "large", small[: max(4, args.images // 20)])
        report("12 megapixels", large, args.rounds, normalizes=args.normalize)


def write_small(folder: Path, photos: Path | None, num: int) -> list[Path]:
    """Copies of the photos, or smooth pictures with some noise, about as hard to decode."""
    (folder / "train" / "a").mkdir(parents=True)
    found = sorted(photos.rglob("*.jpg"))[:num] if photos else []
    chance = np.random.default_rng(0)
    for number in range(len(found) or num):
        file = folder / "train" / "a" / f"{number:04d}.jpg"
        if found:
            file.write_bytes(found[number].read_bytes())
        else:
            rough = Image.fromarray(chance.integers(0, 256, (40, 53, 3)).astype("uint8"))
            rough.resize((534, 400), Image.Resampling.BICUBIC).save(file, quality=90)
    return sorted(folder.rglob("*.jpg"))


def write_large(folder: Path, photos: list[Path]) -> list[Path]:
    """The same pictures with 12 megapixels."""
    (folder / "train" / "a").mkdir(parents=True)
    for photo in photos:
        with Image.open(photo) as opened:
            image = opened.convert("RGB")
        factor = (LARGE_PIXELS / (image.width * image.height)) ** 0.5
        size = round(image.width * factor), round(image.height * factor)
        image.resize(size, Image.Resampling.LANCZOS).save(folder / "train" / "a" / photo.name, quality=90)
    return sorted(folder.rglob("*.jpg"))


def report(what: str, files: list[Path], rounds: int, *, normalizes: bool) -> None:
    """Measure all of them in turn, and print a row each."""
    ways = loaders(files, normalizes=normalizes)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, load in ways.items():
            began = time.process_time()
            for start in range(0, len(files), BATCH):
                load(range(start, min(start + BATCH, len(files))))
            seconds[name].append((time.process_time() - began) / len(files))
    first = next(iter(seconds))
    print(f"\n| {what}, one core | images/s | ratio to the first | range |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[first], found, strict=True))
        middle = statistics.median(ratios)
        print(
            f"| {name} | {1 / statistics.median(found):.0f} | {middle:.2f} | {ratios[0]:.2f}-{ratios[-1]:.2f} |",
            flush=True,
        )


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "`data.erase: 0.25`": {"erase": 0.25},
    "`data.color_jitter: 0.4`": {"color_jitter": 0.4},
    "`data.auto_augment: randaugment`": {"auto_augment": "randaugment"},
}


def report_augmentation(files: list[Path], rounds: int) -> None:
    """Milliseconds of an image: until it is mirrored, and of what a recipe may have come after that; a row each."""
    facts = Preprocessing(image_size=SIZE, resize_size=256, mean=MEAN, std=STD, interpolation="bilinear")
    crop = facts.transform(DataConfig())
    seen = [crop(facts.open(str(file))) for file in files]
    of_seen: dict[str, Callable[[int], Any]] = {"decode, crop, mirror": lambda i: crop(facts.open(str(files[i])))}
    for name, keys in AUGMENTATIONS.items():
        (step,) = transforms.build_steps(DataConfig(flip=0.0, **keys), MEAN)
        of_seen[name] = lambda i, step=step: step(seen[i])
    found: dict[str, list[float]] = {name: [] for name in of_seen}
    for _ in range(rounds):
        for name, do in of_seen.items():
            began = time.process_time()
            for number in range(len(files)):
                do(number)
            found[name].append(1000 * (time.process_time() - began) / len(files))
    print("\n| of an image, one core | ms | range |\n|---|---|---|")
    for name, ms in found.items():
        print(f"| {name} | {statistics.median(ms):.2f} | {min(ms):.2f}-{max(ms):.2f} |", flush=True)


def loaders(files: list[Path], *, normalizes: bool) -> dict[str, Callable[[Any], torch.Tensor]]:
    """By name: what makes a batch of the files of some numbers."""
    tutorial: Any = v1.Compose(  # type: ignore[no-untyped-call]
        [
            v1.RandomResizedCrop(SIZE, scale=SCALE),
            v1.RandomHorizontalFlip(),  # type: ignore[no-untyped-call]
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),  # type: ignore[no-untyped-call]
        ]
    )
    modern = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def by_pillow(path: Path) -> torch.Tensor:
        with path.open("rb") as stream:
            found: torch.Tensor = tutorial(Image.open(stream).convert("RGB"))
        return found

    def by_torchvision(path: Path) -> torch.Tensor:
        found: torch.Tensor = modern(decode_image(read_file(str(path)), mode=ImageReadMode.RGB))
        return found

    def stacked(one: Callable[[Path], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        return lambda numbers: torch.stack([one(files[number]) for number in numbers])

    return {
        "Pillow + transforms v1": stacked(by_pillow),
        "decode_image + v2": stacked(by_torchvision),
        "data.decode: exact": ours(files, "exact", normalizes=normalizes),
        "data.decode: fast": ours(files, "fast", normalizes=normalizes),
        "data.cache": ours(files, "fast", keeps=True, normalizes=normalizes),
    }


def ours(files: list[Path], decode: str, *, normalizes: bool, keeps: bool = False) -> Callable[[Any], torch.Tensor]:
    """A training split as a run opens it."""
    facts = Preprocessing(image_size=SIZE, resize_size=256, mean=MEAN, std=STD, interpolation="bilinear", decode=decode)
    folder, config = files[0].parents[2], DataConfig()
    read = facts.open if decode == "fast" else facts.read
    samples = ImageDataset(folder, "train", facts.transform(config), seed=0, read=read)
    if keeps:
        keeping = facts.keeping(config)
        kept = keeping.folder(Path(os.environ[kept_pixels.FOLDER_VARIABLE]), folder, "train")
        kept.mkdir(parents=True)
        keep_pixels.keep(samples, keeping, kept, in_ram=False, what="train")
        samples.use_kept("train", keeping)

    def load(numbers: Any) -> torch.Tensor:
        images = torch.stack([samples[0, number][0] for number in numbers])
        return facts.normalize(images) if normalizes else images

    return load


if __name__ == "__main__":
    main()
