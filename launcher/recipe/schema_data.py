"""The schema of a recipe's ``data``: which images, and how they reach the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from launcher.images.datasets import DATASETS
from launcher.recipe.types import STRICT, Argument, Auto, Channels, CountOrZero, Fraction, NonNegative, Positive

COLOURS = {"white": "#ffffff", "black": "#000000", "grey": "#808080"}
if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model."""

    __pydantic_config__ = STRICT

    name: DatasetName = "imagefolder"
    """imagefolder: what path holds; digits: scikit-learn's 1,797 images of digits; or one of torchvision's data sets by
    its class: downloaded, or read from path (docs/images.md)."""
    path: str | None = None
    """Images: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, a folder of classes with val_fraction, a list
    (.csv, .jsonl, .parquet: a row an image), or WebDataset shards (a folder of .tar files, or a pattern of them, as in
    "/data/train-{000..127}.tar"). Your own dataset gets it as it is."""
    train: str | None = None
    """The folder of the training images in path, or the list of them; null: train."""
    val: str | None = None
    """The same of validation; null: val, valid or validation, and where there is none of these, test."""
    test: str | None = None
    """The same of a test set, as test or holdout; null: none. It is measured once, when training is over, with the best
    checkpoint, and has no part in what is chosen. Your own dataset is called with split=test."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of images that are not divided: the part of each class that is for validation. Which images follows from seed and
    their paths, on every machine alike."""
    group: str | None = None
    """With val_fraction: what keeps images that belong together on one side: a regular expression whose groups (or
    all that it matches) say so in each image's path, as in "patient_(\\d+)", or a column of a list."""
    columns: dict[str, str] = field(default_factory=dict)
    """What a list calls its columns path, label, split, group and weight, as in {path: file, label: breed}; braces put
    together what several say, as in {path: "images/{id}.jpg"}."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """With task: multi_label, what parts the classes of an image in a list; null: `;` or `|`. (A list in JSON, as in
    ["a", "b"], needs none.)"""
    classes: str | None = None
    """File with the names of the classes, one a line, in the order of the logits; null: those of the training images,
    sorted. Labels of a list or of shards that are numbers, from 0, mean its lines."""
    dataset: str | None = None
    """Your own data set, `file.py:name` or `package.module:name`: what is called with split="train" and split="val"
    (and path, where it names that) and returns an object with classes, __len__, __getitem__, key and label
    (docs/extending.md). null: name."""
    dataset_args: dict[str, Argument] = field(default_factory=dict)
    """Further arguments of dataset by name."""
    transform: str | None = None
    """Your own transform in place of resizing, augment and normalisation: what is called with train=True and with
    train=False (and image_size, mean, std, interpolation, where it names them) and returns what makes an image a float
    tensor of 3 x image_size x image_size. null: crop_pct, augment and what follows it but mixup and cutmix."""
    transform_args: dict[str, Argument] = field(default_factory=dict)
    """Further arguments of transform by name."""
    image_size: Annotated[int, Field(ge=16)] | Auto = "auto"
    """Height and width in pixels that the model sees; auto: what the model's weights were trained at, or 224."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Validation takes the centre crop of this fraction of the resized image's short side."""
    mean: Annotated[list[float], Field(min_length=1, max_length=3)] | Auto = "auto"
    """Of the channels, from 0 to 1, which is subtracted; auto: what the model's weights were trained with (of grey
    images the mean of their colours'), of a file what torchvision's own were: many of timm's had 0.5, and std too."""
    std: Annotated[list[Positive], Field(min_length=1, max_length=3)] | Auto = "auto"
    """Of the channels, from 0 to 1, which is divided by; auto: as of mean."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """Of resizing; auto: what the model's weights were trained with."""
    augment: Literal["none", "light", "standard"] = "standard"
    """Training images: none (as in validation), light (random crop of 64 to 100 % of the area), standard (25 to 100 %,
    and mirrored). The keys from crop_scale to erase change that."""
    crop_scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] | Auto = "auto"
    """Fractions of the area that random crops of training images take, from the least to the most; auto: as augment
    says."""
    flip: Fraction | Auto = "auto"
    """How often training images are mirrored; auto: half of them with augment: standard, else none."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees up to which training images are turned, either way."""
    auto_augment: Literal["none", "randaugment", "trivialaugment", "augmix"] = "none"
    """Random changes of colour and shape: RandAugment (two of them, of one magnitude), TrivialAugment (one, of any) or
    AugMix."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """How strong the changes of randaugment are, up to 30."""
    color_jitter: Fraction = 0.0
    """By which fraction, at most, brightness, contrast and saturation of training images change."""
    erase: Fraction = 0.0
    """How often a rectangle of a training image is erased, 2 to 33 % of its area."""
    mixup: NonNegative = 0.0
    """Training images are mixed in pairs, and so are their losses, by a share of Beta(mixup, mixup); 0: not. Often 0.2.
    What is mixed depends on seed and step, not on the number of ranks."""
    cutmix: NonNegative = 0.0
    """Rectangles of training images are replaced by their partners', of a share of Beta(cutmix, cutmix); 0: not. Often
    1. With mixup as well, each step takes one of the two."""
    balance: Literal["none", "weights", "sampler"] = "none"
    """Of classes with different numbers of training images. weights: a loss counts by one over its class's number;
    sampler: an epoch has as many images as ever, but each class as often as any other (images of small ones several
    times, each time augmented anew; of large ones not all, but by turns)."""
    decode: Literal["fast", "exact"] = "fast"
    """Training images. fast: a large JPEG file is decoded 2, 4 or 8 times smaller where its random crop has pixels
    enough; exact: whole, as validation and exports always read it (docs/images.md)."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Decoded pixels of all images, kept once a node for its ranks and for later runs: ram (/dev/shm) or disk (the
    launcher's cache folder). Where they do not fit, a line says so and the run goes on without (docs/images.md)."""
    workers: CountOrZero | Auto = "auto"
    """Loader processes per rank; auto: the rank's cores but one; measured with batch.size: auto."""
    on_bad_image: Literal["error", "quarantine"] = "error"
    """Images that cannot be decoded are looked for before training. error: nothing is started; quarantine: they are
    left out from the beginning, and listed in bad_images.json and the report."""
    missing_val_classes: Literal["error", "allow"] = "error"
    """Classes without an image in val/. error: nothing is started; allow: they are learned and not measured."""
    background: Annotated[
        str, Field(pattern=r"^(white|black|grey|#[0-9A-Fa-f]{6})$"), 'white, black, grey or "#rrggbb"'
    ] = "white"
    """Colour behind what is transparent, in training, validation and exports: white, black, grey or "#rrggbb"."""
    channels: Channels = 3
    """3: colours; 1: all images are made grey (ITU-R 601), in training, validation and exports, and the model has one
    input: the weights of its first convolution for the three colours are added up."""
    grey_range: Annotated[list[float], Field(min_length=2, max_length=2)] | Auto = "auto"
    """Which values are black and white in grey images of more than 8 bits, as in [0, 4095]; what is beyond is cut off.
    auto: 0 and 65535 of 16 bits, 0 and 1 of floats; where the images' values do not fit that, they are refused."""

    task: Literal["single_label", "multi_label"] = "single_label"
    """single_label: an image has one class. multi_label: an image has any number of them, each with a probability of
    its own (train.loss: binary_cross_entropy): of a list whose labels name several (`a;b`), or of your own
    dataset, whose label() gives a list of numbers."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With task: multi_label: the probability from which on an image is said to have a class, in validation's F1 and in
    predictions."""

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """Red, green and blue of background."""
        red, green, blue = bytes.fromhex(COLOURS.get(self.background, self.background).removeprefix("#"))
        return red, green, blue

    @property
    def grey_limits(self) -> tuple[float, float] | None:
        """Black and white of grey_range; None: auto."""
        return None if self.grey_range == "auto" else (self.grey_range[0], self.grey_range[1])
