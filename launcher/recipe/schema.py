"""The schema of a recipe: plain dataclasses, against which pydantic checks values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from launcher.images.datasets import DATASETS
from launcher.recipe.schema_post import PostConfig
from launcher.recipe.schema_train import MetricConfig, TrainConfig
from launcher.recipe.types import (
    STRICT,
    Argument,
    Auto,
    Count,
    CountOrZero,
    Fraction,
    NodeRange,
    NonNegative,
    Positive,
)

WEIGHT_NAMES = ("DEFAULT", "IMAGENET1K_")
"""How torchvision's names of weights begin."""
COLOURS = {"white": "#ffffff", "black": "#000000", "grey": "#808080"}
if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, from which weights, and what of it learns."""

    __pydantic_config__ = STRICT

    arch: str = "resnet50"
    """A torchvision classification model by name; `launch models` lists them."""
    weights: str | None = "DEFAULT"
    """Where training starts: DEFAULT (torchvision's best), a name such as IMAGENET1K_V2, a file that torch or
    safetensors wrote, also another trainer's checkpoint, or null (random)."""
    num_classes: Count | Auto = "auto"
    """Outputs of the head; auto: the number of class folders."""
    freeze: list[str] = field(default_factory=list)
    """Layers that do not learn, by name or glob (`layer1`, `features.[0-4]`); `backbone` is all but the head.
    They run in eval mode: frozen BatchNorm keeps its statistics."""
    factory: str | None = None
    """Your own model, `file.py:name` or `package.module:name`: what is called with num_classes=… and returns an
    nn.Module. null: model.arch. weights may then be a file; DEFAULT and null mean what factory returns."""
    factory_args: dict[str, Argument] = field(default_factory=dict)
    """Further arguments of factory by name, as in {model_name: resnet18}."""
    head: list[str] | Auto = "auto"
    """With factory: the layers that are new for a new number of classes, by name. auto: as the model says (timm), else
    its fc, classifier, head or heads, else its last linear layer."""
    unfreeze: Annotated[
        dict[CountOrZero, list[str] | str], Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}})
    ] = field(default_factory=dict)
    """From which epoch (from 0) which layers learn again, as in {3: layer1}; the same patterns as freeze."""

    @property
    def label(self) -> str:
        """The model in words: its architecture, or the user's own factory."""
        return self.factory or self.arch

    @property
    def weights_file(self) -> Path | None:
        """The local file that weights names, or None where it names torchvision weights or nothing."""
        if self.weights is None:
            return None
        path, is_path = Path(self.weights).expanduser(), bool(set("/.") & set(self.weights))
        is_file = is_path or (not self.weights.startswith(WEIGHT_NAMES) and path.is_file())
        return path if is_file else None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model."""

    __pydantic_config__ = STRICT

    name: DatasetName = "imagefolder"
    """imagefolder: path/train/CLASS/*.jpg and path/val/CLASS/*.jpg; digits: scikit-learn's 1,797 images of digits."""
    path: str | None = None
    """Folder that holds train/ and val/; needed by imagefolder. Your own dataset gets it as it is."""
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
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] | Auto = "auto"
    """Of the colour channels, from 0 to 1, which is subtracted; auto: what the model's weights were trained with."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] | Auto = "auto"
    """Of the colour channels, from 0 to 1, which is divided by; auto: what the model's weights were trained with."""
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
    background: Annotated[str, Field(pattern=r"^(white|black|grey|#[0-9A-Fa-f]{6})$")] = "white"
    """Colour behind what is transparent, in training, validation and exports: white, black, grey or "#rrggbb"."""
    grey_range: Annotated[list[float], Field(min_length=2, max_length=2)] | Auto = "auto"
    """Which values are black and white in grey images of more than 8 bits, as in [0, 4095]; what is beyond is cut off.
    auto: 0 and 65535 of 16 bits, 0 and 1 of floats; where the images' values do not fit that, they are refused."""
    task: Literal["single_label", "multi_label"] = "single_label"
    """single_label: an image has one class. multi_label: an image has any number of them, each with a probability of
    its own (train.loss: binary_cross_entropy); so far of your own dataset, whose label() gives a list of numbers."""
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


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many images make a step."""

    __pydantic_config__ = STRICT

    size: Count | Auto = "auto"
    """Images per rank that go through the model at once; auto: measured on every rank before training."""
    objective: Literal["throughput", "memory"] = "throughput"
    """With size: auto. throughput: the smallest batch within 2 % of the most images per second; memory: the largest
    that fits."""
    global_size: Count | None = None
    """Images per optimizer step over all ranks; accumulation fills in what the ranks do not hold at once.
    null: size x ranks x accumulate."""
    accumulate: Count = 1
    """Batches per rank and optimizer step."""
    tune_budget: Fraction = 0.05
    """With size: auto. Measure for at most this fraction of the time that the run is expected to take, with two probes
    at least; `launch tune` measures as long as it takes."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights move."""

    __pydantic_config__ = STRICT

    name: Literal["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adafactor"] = "sgd"
    """SGD with Nesterov momentum, or another of torch's. sgd, adam and adamw are fused; a step of the others waits for
    the GPU once."""
    lr: Positive = 0.01
    """Peak learning rate of what no group names."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd and rmsprop; the others do not use it."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of every parameter that learns; of sgd, adam and rmsprop as a part of the gradient (L2), else
    decoupled from it (Loshchilov & Hutter 2019)."""
    decay_norms: bool = True
    """Whether weight decay is also of what has one dimension: normalisations, biases, layer scales, a class token."""
    schedule: Literal["cosine", "linear", "step", "one_cycle", "polynomial", "constant", "cosine_restarts"] = "cosine"
    """After warm-up, counted in optimizer steps. cosine: down by a half cosine; linear: by a line; polynomial: by a
    power of it; step: by step_factor at step_epochs; cosine_restarts: by cycles half cosines (SGDR); constant.
    one_cycle: up and down by a half cosine, up from 1/25 over warmup_epochs, or 30 % of training where these are 0."""
    end_factor: Fraction = 0.0
    """Fraction of the peak rates that cosine, linear, polynomial, one_cycle and cosine_restarts end at."""
    step_epochs: Positive | Annotated[list[Positive], Field(min_length=1)] | Auto = "auto"
    """With schedule: step: after how many epochs the rates drop, again and again, or a list of the epochs at which they
    do, counted from the beginning of training; auto: after each third of it."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With schedule: step: what the rates are multiplied by at each drop."""
    power: Positive = 2.0
    """With schedule: polynomial: the power; 1 is a line."""
    cycles: Count = 3
    """With schedule: cosine_restarts: how many half cosines there are; the last one ends with training."""
    cycle_growth: Annotated[float, Field(ge=1)] = 1.0
    """With schedule: cosine_restarts: how many times as long as the one before each half cosine is."""
    warmup_epochs: NonNegative = 0.0
    """Epochs (or a fraction of one) over which the rate rises linearly from near zero; it may be longer than training,
    whose end cuts it off."""
    lr_batch_size: Count | None = None
    """Global batch that lr and groups are meant for: at another one the rates are scaled, in proportion for sgd
    (Goyal et al. 2017), with the square root for all others, which are adaptive (Malladi et al. 2022). null: not
    scaled."""
    groups: dict[str, NonNegative] = field(default_factory=dict)
    """Peak learning rates by layer pattern, the first that matches counts; `head` is the new head, "*" the rest."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """What a layer's rate is multiplied by for each layer between it and the head: a block is a layer, stem and
    embeddings are the lowest (BEiT, Bao et al. 2022). Often 0.65 to 0.75 for vision transformers. null: all alike."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    __pydantic_config__ = STRICT

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where there is a key, else off. Where the server cannot be used, online and auto go on offline."""
    project: str | None = None
    """Project; null: `WANDB_PROJECT`, or finetune-launcher."""
    entity: str | None = None
    """User or team; null: `WANDB_ENTITY`, or the key's own."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is recorded of training, and where."""

    __pydantic_config__ = STRICT

    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    log_every: Count = 10
    """Optimizer steps between two lines of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the run happens."""

    __pydantic_config__ = STRICT

    nodes: Count | NodeRange = 1
    """Machines; MIN:MAX: go on while MIN of MAX are left, and take in those that come back; the global batch stays."""
    spares: CountOrZero = 0
    """Machines beyond them that wait to take the place of one that is lost."""
    gpus: Count | Auto = "auto"
    """GPUs per node, one worker each; auto: all there are. A number implies device: cuda."""
    procs: Count | Auto = "auto"
    """Workers per node; auto: one per GPU, or one on a CPU."""
    threads: Count | Auto = "auto"
    """CPU threads of each worker's computations, and of the exports'; auto: OMP_NUM_THREADS, or the node's cores shared
    out (the exports have them all); measured on a CPU with batch.size: auto."""
    keep_freed_memory: bool = True
    """On a CPU: processes of the run keep the memory that they free for the next step, and ask for huge pages. It
    was measured to give 1.36 times the images a second, for a tenth more memory at the peak (docs/evidence.md)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where a GPU is, else cpu."""
    backend: Literal["auto", "local", "torchrun", "slurm"] = "auto"
    """local: this process, for debugging (`--debug`); torchrun: this machine, by torch's elastic agent; slurm: a job;
    auto: slurm where sbatch is on PATH and a profile or more than this machine is asked for, else torchrun."""
    profile: str | None = None
    """Profile of the cluster, a name or a path: what SLURM has to be told there (`slurm/profiles/template.yaml`)."""
    preflight: bool = False
    """On SLURM: check every node and the network between them before training; bad nodes are named and left out."""
    max_restarts: CountOrZero = 3
    """How often the workers are started again from the last checkpoint after one died."""

    @property
    def max_nodes(self) -> int:
        """Machines that train where none is lost."""
        return int(str(self.nodes).rpartition(":")[2])

    @property
    def min_nodes(self) -> int:
        """With at least so many of them the run goes on; 0: only with all."""
        fewest, is_range, _ = str(self.nodes).partition(":")
        return int(fewest) if is_range and int(fewest) < self.max_nodes else 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A fine-tuning run, whole."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)] = "run"
    """Begins the run's id: letters, digits, dot, dash and underscore; where absent, the file's name."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of the samples' order, augmentation, new weights and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which network, from which weights, and what of it learns."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images, and how they reach the model."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """How many images make a step."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How the weights move."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the forward pass; weights stay fp32. auto: bf16 where the hardware of all ranks has it, else fp16 on GPUs,
    fp32 on CPUs."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    metrics: list[str | MetricConfig] = field(default_factory=list)
    """Metrics beside ours, measured in validation (docs/extending.md): references such as
    `torchmetrics.classification:MulticlassAUROC`, or mappings with metric, name, mode and args."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """What is recorded of training, and where."""
    post: PostConfig = field(default_factory=PostConfig)
    """What becomes of the best checkpoint."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Where the run happens."""
