"""The schema of a recipe: plain dataclasses, against which pydantic checks values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from launcher.recipe.schema_data import DataConfig
from launcher.recipe.schema_model import ModelConfig
from launcher.recipe.schema_post import PostConfig
from launcher.recipe.schema_train import MetricConfig, Schedule, TrainConfig
from launcher.recipe.types import (
    STRICT,
    Auto,
    Count,
    CountOrZero,
    Fraction,
    NodeRange,
    NonNegative,
    Positive,
)


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

    name: Literal["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adafactor", "muon"] = "sgd"
    """SGD with Nesterov momentum, or another of torch's. sgd, adam and adamw are fused; a step of the others waits for
    the GPU once. muon is for matrices of hidden layers (transformers, ConvNeXt), with AdamW for all else, as
    convolutions and the head; its rates are those that AdamW would have."""
    lr: Positive = 0.01
    """Peak learning rate of what no group names."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd, rmsprop and muon; the others do not use it."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of every parameter that learns; of sgd, adam and rmsprop as a part of the gradient (L2), else
    decoupled from it (Loshchilov & Hutter 2019)."""
    decay_norms: bool = True
    """Whether weight decay is also of normalisations, biases (Swin's tables of them, too), layer scales, a class token
    and position embeddings."""
    schedule: Schedule = "cosine"
    """After warm-up, counted in optimizer steps. cosine: down by a half cosine; linear: by a line; polynomial: by a
    power of it; step: by step_factor at step_epochs; cosine_restarts: by cycles half cosines (SGDR); constant.
    one_cycle: up and down by a half cosine, up from 1/25 over warmup_epochs, or 30 % of training where these are 0."""
    end_factor: Fraction = 0.0
    """Fraction of the peak rates that cosine, linear, polynomial, one_cycle and cosine_restarts end at."""
    step_epochs: Positive | Annotated[list[Positive], Field(min_length=1)] | Auto = "auto"
    """With schedule: step: after how many epochs the rates drop, again and again, or a list of the epochs at which they
    do, counted from the beginning of training or of the phase; auto: after each third of it."""
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
    group: str | None = None
    """Runs shown together; null: `WANDB_RUN_GROUP`, or the sweep that the run is one of."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by, in MLflow too."""
    notes: str | None = None
    """What the run is for, in MLflow too."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """MLflow."""

    __pydantic_config__ = STRICT

    uri: str | None = None
    """Its server, or a file:// folder; null: `MLFLOW_TRACKING_URI`, or the folder mlflow/ of the run."""
    experiment: str | None = None
    """Experiment; null: `MLFLOW_EXPERIMENT_NAME`, or finetune-launcher."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is recorded of training, and where."""

    __pydantic_config__ = STRICT

    backends: list[Literal["wandb", "tensorboard", "mlflow"]] = field(default_factory=lambda: ["wandb"])
    """Who is told of the run while it trains; tensorboard and mlflow are extras (docs/tracking.md)."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    """MLflow."""
    log_every: Count = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    pictures: bool = True
    """Whether small pictures of validation images, the surest mistakes, are sent to them, too."""


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
