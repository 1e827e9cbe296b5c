"""The settings that `launch new` chooses, each with its reason, and the recipe file that it writes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipe.keys import show
from launcher.runs.findings import IMBALANCE
from launcher.system.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.commands.new_data import Found
    from launcher.plan.topology import Topology

SMALL_PX = 64
"""Images of at most so many pixels show too little for weights that were trained on photos."""
FROM_SCRATCH = 1000
"""With so many small images a network learns from random weights."""
HEAD_STEPS = 400
"""A new head on a frozen backbone has learned what it can after about so many steps."""
MIN_EPOCHS, MAX_EPOCHS = 8, 40
CPU_PX, GPU_PX = 160, 224
GRID_PX = 32
"""Networks halve an image five times."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One key of the recipe."""

    key: str
    """Dotted."""
    value: Any
    """Chosen."""
    why: str = ""
    """A comment for the user; empty where the line above says it."""


def choose(found: Found, machine: Topology) -> list[Choice]:
    """Settings for a data set on a machine, section by section."""
    has_gpu = machine.num_gpus > 0
    from_scratch = found.short_side <= SMALL_PX and found.train.total() >= FROM_SCRATCH
    procs, batch = min(2, machine.num_cores), _batch_size(found)
    chosen = [*_data(found), *_image_size(found, has_gpu=has_gpu, from_scratch=from_scratch)]
    if from_scratch:
        chosen += _small_images(found, batch)
    elif has_gpu:
        chosen += _whole_network(found)
    else:
        chosen += _new_head(found, batch, procs)
    chosen += _stopping(found)
    if not has_gpu:
        chosen += [
            Choice(key="launch.device", value="cpu", why="this machine has no GPU; without this line: a GPU if any"),
            Choice(key="launch.procs", value=procs, why=f"workers; {plural(machine.num_cores, 'core')} here"),
        ]
    return chosen


def _data(found: Found) -> Iterator[Choice]:
    source, train, scan = found.source, found.train, found.scan
    num = f"{plural(train.total(), 'training image')} in {plural(len(train), 'class')}"
    yield Choice(key="data.path", value=str(Path(source.label).expanduser().absolute()), why=num)
    if source.train:
        yield Choice(key="data.train", value=source.train, why="the folder of the training images")
    if source.val:
        yield Choice(key="data.val", value=source.val, why="the folder of the validation images")
    if source.columns:
        yield Choice(key="data.columns", value=dict(source.columns), why="what the list calls its columns")
    if source.val_fraction:
        why = "nothing says which images are for validation: so many of each class"
        yield Choice(key="data.val_fraction", value=source.val_fraction, why=why)
    if found.lacks_classes:
        why = "some classes have no validation image: they are learned and not measured"
        yield Choice(key="data.missing_val_classes", value="allow", why=why)
    if scan.bad:
        why = f"{plural(len(scan.bad), 'file')} cannot be decoded: left out, and listed in the report"
        yield Choice(key="data.on_bad_image", value="quarantine", why=why)
    if found.skew > IMBALANCE:
        why = f"the largest class has {found.skew:.0f} times the images of the smallest: each is seen as often"
        yield Choice(key="data.balance", value="sampler", why=why)


def _image_size(found: Found, *, has_gpu: bool, from_scratch: bool) -> Iterator[Choice]:
    most = GPU_PX if has_gpu else CPU_PX
    size = max(GRID_PX, min(most, -(-found.short_side // GRID_PX) * GRID_PX)) if from_scratch else most
    why = f"pixels; the images' shorter side is {found.short_side} (median)"
    if not has_gpu and not from_scratch:
        why += "; 224 is slower and a little more accurate"
    yield Choice(key="data.image_size", value=size, why=why)
    if from_scratch:
        yield Choice(key="data.crop_pct", value=1.0, why="small images are validated whole")


def _batch_size(found: Found) -> int:
    """Images per worker and step: at least some ten steps an epoch."""
    size = 32
    while size > 2 and size * 10 > found.train.total():  # noqa: PLR2004 - BatchNorm needs two images
        size //= 2
    return size


def _small_images(found: Found, batch: int) -> Iterator[Choice]:
    why = f"{found.short_side} px show too little for weights that were trained on photos; there are images enough"
    yield Choice(key="model.arch", value="resnet18", why=why)
    yield Choice(key="model.weights", value=None)
    yield Choice(key="data.augment", value="light", why="standard also mirrors, which digits and letters do not bear")
    yield Choice(key="batch.size", value=batch, why="images per worker and step")
    yield Choice(key="optim.lr", value=0.05, why="high, since nothing was learned before")
    yield Choice(key="train.epochs", value=15, why="more may learn more; early stopping ends it")


def _new_head(found: Found, batch: int, procs: int) -> Iterator[Choice]:
    steps = max(1, found.train.total() // (procs * batch))
    epochs = min(MAX_EPOCHS, max(MIN_EPOCHS, round(HEAD_STEPS / steps)))
    yield Choice(key="model.arch", value="mobilenet_v2", why="small: it is quick on a CPU")
    yield Choice(key="model.weights", value="DEFAULT", why="downloaded once; offline: a path of a file")
    why = "a new head alone learns: each image's features are computed once, and later epochs take no time"
    yield Choice(key="model.freeze", value=["backbone"], why=why)
    yield Choice(key="data.augment", value="light", why="few views of each image are kept")
    yield Choice(key="batch.size", value=batch, why="images per worker and step")
    yield Choice(key="optim.name", value="adamw", why="with its usual rate for a new head")
    yield Choice(key="optim.lr", value=0.002)
    yield Choice(key="train.epochs", value=epochs, why=f"about {epochs * steps:,} steps")
    yield Choice(key="train.feature_views", value=2, why="of each training image")
    yield Choice(key="train.label_smoothing", value=0.1, why="some labels are wrong in most data sets")


def _whole_network(found: Found) -> Iterator[Choice]:
    yield Choice(key="model.arch", value="resnet50", why="`launch models` lists others")
    yield Choice(key="model.weights", value="DEFAULT", why="downloaded once; offline: a path of a file")
    yield Choice(key="data.augment", value="standard", why="random crops, mirrored")
    yield Choice(key="batch.size", value="auto", why="measured on every GPU")
    yield Choice(key="optim.lr", value=0.001, why="of the middle; the groups below have their own")
    yield Choice(key="optim.lr_batch_size", value=256, why="what the rates are meant for; they follow the batch")
    why = "the new head learns fast, what was learned before changes slowly"
    yield Choice(key="optim.groups", value={"head": 0.01, "layer4": 0.001, "*": 0.0001}, why=why)
    yield Choice(key="train.epochs", value=20 if found.train.total() > FROM_SCRATCH else MAX_EPOCHS)
    yield Choice(key="train.label_smoothing", value=0.1, why="some labels are wrong in most data sets")


def _stopping(found: Found) -> Iterator[Choice]:
    metric = "val/f1" if found.skew > IMBALANCE else "val/top1"
    why = "all classes count alike" if metric == "val/f1" else f"on {plural(found.num_val, 'validation image')}"
    stopping = {"metric": metric, "mode": "max", "patience": 5}
    yield Choice(key="train.early_stopping", value=stopping, why=why)


def write(name: str, head: Sequence[str], chosen: Sequence[Choice]) -> str:
    """The recipe file: comments, then the chosen values by section, each with its reason."""
    lines = [*(f"# {line}".rstrip() for line in head), f"name: {show(name)}"]
    sections: dict[str, list[Choice]] = {"model": [], "data": []}
    for choice in chosen:
        sections.setdefault(choice.key.partition(".")[0], []).append(choice)
    for section, choices in sections.items():
        lines.append(f"{section}:")
        for choice in choices:
            lines += [f"  # {choice.why}"] if choice.why else []
            lines.append(f"  {choice.key.partition('.')[2]}: {show(choice.value)}")
    return "\n".join(lines) + "\n"
