"""The part of the schema of a recipe that says how it trains and what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from launcher.recipe.types import STRICT, Argument, Auto, Count, CountOrZero, Fraction, NonNegative, Positive

Schedule = Literal["cosine", "linear", "step", "one_cycle", "polynomial", "constant", "cosine_restarts"]
"""How learning rates go after warm-up."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of training is written."""

    __pydantic_config__ = STRICT

    every_steps: Count | None = None
    """Also after every so many optimizer steps; null: only at the end of an epoch, by the clock, and at a stop."""
    every_minutes: Positive | None = 10.0
    """Also after so many minutes; null: not by the clock."""
    keep: Count = 2
    """How many of the newest are kept; the best is kept besides."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Which metric says what the best checkpoint is, and when to stop waiting for a better one."""

    __pydantic_config__ = STRICT

    metric: str = "val/loss"
    """train/loss, val/loss, val/top1, val/top5 (with more than five classes), val/f1, val/f1_micro, val/f1_weighted,
    val/precision, val/balanced_accuracy, val/auroc, val/average_precision, val/ece, or val/NAME of metrics."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    patience: Count | None = 5
    """Epochs without a better value before training stops; null: never stop early."""
    min_delta: NonNegative = 0.0
    """How much better (in the metric's own unit) counts as better."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """A metric of the user's own."""

    __pydantic_config__ = STRICT

    metric: str
    """`package.module:name` or `file.py:name`: a class or an instance of torchmetrics, or a function."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=40)] | None = None
    """What it is called in every file, as in val/NAME; null: as in the reference."""
    mode: Literal["min", "max"] = "max"
    """Whether less or more of it is better."""
    args: dict[str, Argument] = field(default_factory=dict)
    """What it is made with; `num_classes: auto` is the number of the model's outputs."""


@dataclass(frozen=True, kw_only=True)
class ListenerConfig:
    """A listener of the user's own."""

    __pydantic_config__ = STRICT

    listener: str
    """`file.py:name` or `package.module:name`: a class, or a function that makes one."""
    args: dict[str, Argument] = field(default_factory=dict)
    """What it is made with, by name."""


@dataclass(frozen=True, kw_only=True)
class PhaseOptimConfig:
    """What of optim is another in a phase; null: as optim says. The optimizer itself stays, as does what it knows."""

    __pydantic_config__ = STRICT

    lr: Positive | None = None
    """Peak learning rate of what no group names."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of sgd, rmsprop and muon."""
    weight_decay: NonNegative | None = None
    """Weight decay of every parameter that learns."""
    decay_norms: bool | None = None
    """Whether weight decay is also of normalisations and biases."""
    schedule: Schedule | None = None
    """How the rates go over the phase."""
    end_factor: Fraction | None = None
    """Fraction of the peak rates that the phase ends at."""
    step_epochs: Positive | Annotated[list[Positive], Field(min_length=1)] | Auto | None = None
    """With schedule: step: after how many epochs the rates drop, or at which, from the phase's beginning."""
    step_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    """What the rates are multiplied by at each drop."""
    power: Positive | None = None
    """With schedule: polynomial."""
    cycles: Count | None = None
    """With schedule: cosine_restarts: how many half cosines the phase has."""
    cycle_growth: Annotated[float, Field(ge=1)] | None = None
    """How many times as long as the one before each of them is."""
    warmup_epochs: NonNegative | None = None
    """Epochs, from the phase's beginning, over which the rate rises."""
    groups: dict[str, NonNegative] | None = None
    """Peak learning rates by layer pattern, instead of those of optim."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """What a layer's rate is multiplied by for each layer between it and the head; 1: all alike."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A part of training in which the same layers learn in the same way."""

    __pydantic_config__ = STRICT

    epochs: Count | None = None
    """How long it is; null, of the last phase only: what is left of train.epochs."""
    freeze: list[str] = field(default_factory=list)
    """Layers that do not learn in it: patterns as in model.freeze."""
    optim: PhaseOptimConfig = field(default_factory=PhaseOptimConfig)
    """What of optim is another in it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    __pydantic_config__ = STRICT

    epochs: Count = 20
    """Passes over the training images; where it is not given and all train.phases say how long they are, their sum."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of training, one after the other, as in [{epochs: 2, freeze: [backbone], optim: {lr: 1e-2}}, {epochs: 8}],
    in place of model.freeze and model.unfreeze. Each has a course of learning rates of its own, warm-up included;
    weights, EMA, early stopping and the order of the images go on."""
    loss: str = "cross_entropy"
    """cross_entropy, binary_cross_entropy (each class by a sigmoid), focal, or your own: `file.py:name` or
    `package.module:name` (docs/extending.md)."""
    loss_args: dict[str, Argument] = field(default_factory=dict)
    """Further arguments of loss by name, as in {gamma: 1.5} of focal."""
    channels_last: bool | Auto = "auto"
    """Memory layout of images and convolutions. auto: on CUDA; on a CPU with models that have convolutions of 1 x 1
    pixels or of single channels, which were measured to be faster with it (docs/evidence.md)."""
    compile: bool = False
    """Have torch's compiler (inductor) make the network's own code at the first step of each batch size, which takes
    from seconds to minutes; without a C++ compiler (on CUDA: triton) a line says so and nothing is compiled. Dropout
    then draws other numbers."""
    batchnorm_recompute: CountOrZero | Auto = "auto"
    """Training batches that BatchNorm's running statistics are computed from before each validation; 0: the moving
    average; auto: 100, until 10 / momentum steps are taken and the average has forgotten what it began with; with
    train.swa always, for the mean."""
    feature_views: CountOrZero | Auto = "auto"
    """How many views of each training image are kept as a frozen backbone's features: epoch e takes view e, and after
    the last the first again. 0: none, nor any of validation; auto: 1 where all epochs see the same (data.augment:
    none), else none of training."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights and of BatchNorm's statistics: often 0.999 or 0.9999; at step t no more
    than (1 + t) / (10 + t), so that it spans the last ninth of a short training. It is validated beside the weights
    (val/ema_top1 …); best and the exports take the better of the two. null: none."""
    swa: CountOrZero | None = None
    """In place of ema: epochs after which the plain mean of the weights of all further steps begins (stochastic weight
    averaging, Izmailov et al. 2018; of each step, Cha et al. 2021), with BatchNorm's statistics computed anew
    (val/swa_top1 …). Often three quarters of train.epochs; it gains by rates that stay high, as by optim.end_factor:
    0.2. null: none."""
    clip_grad_norm: Positive | None = None
    """Largest norm of the whole gradient; null: not clipped."""
    clip_grad_value: Positive | None = None
    """Largest absolute value in the gradient; null: not clipped. One of the two."""
    label_smoothing: Fraction = 0.0
    """Fraction of the target that is spread over all classes, in training only, by a loss that takes it."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state of training is written."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """What the best checkpoint is, and when to stop."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """If a step's loss or gradient is NaN or infinite (it never reaches the weights): stop training; skip the step; or
    roll back to the last checkpoint and leave that step out, three times at most."""
    listeners: list[str | ListenerConfig] = field(default_factory=list)
    """Objects of your own that are told of training on rank 0 (docs/extending.md): references to classes, or mappings
    with listener and args."""
    hang_timeout_s: Positive | None = 600.0
    """Seconds without a step or a validation batch after which the workers are taken for hung: their stacks go to
    their logs, and they are started again. Before the first step three times as long, and at least 30 s. null:
    never."""
