"""The part of the schema of a recipe that says which network is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from launcher.recipe.run_weights import best_of_run
from launcher.recipe.types import STRICT, Argument, Auto, Count, CountOrZero

WEIGHT_NAMES = ("DEFAULT", "IMAGENET1K_")
"""How torchvision's names of weights begin."""
HeadKind = Annotated[
    str,
    Field(
        pattern=r"^(auto|linear|mlp\([1-9][0-9]{0,4}\)|dropout\(0?\.[0-9]{1,6}\))$",
        description="auto, linear, mlp(256), dropout(0.2)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, from which weights, and what of it learns."""

    __pydantic_config__ = STRICT

    arch: str = "resnet50"
    """A torchvision classification model by name; `launch models` lists them."""
    weights: str | None = "DEFAULT"
    """Where training starts: DEFAULT (torchvision's best), a name such as IMAGENET1K_V2, a file that torch or
    safetensors wrote, also another trainer's checkpoint or timm's, a run of one's own (runs/NAME: its best checkpoint),
    or null (random)."""
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
    head: list[str] | HeadKind = "auto"
    """auto: the architecture's own last layer; linear: the same, which must be a linear layer; mlp(256): a hidden layer
    of so many features before it; dropout(0.2): features are left out before it. With factory also a list: the layers
    that are new for a new number of classes, by name, where auto (as the model says (timm), else its fc, classifier,
    head or heads, else its last linear layer) does not find them."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How often each dropout layer of the architecture leaves a feature out; an architecture without any is refused.
    null: as the architecture has it."""
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How often the last block is left out in training, earlier blocks in proportion less often; an architecture
    without stochastic depth is refused. null: as the architecture has it."""
    sync_batchnorm: bool = False
    """BatchNorm of the images of all ranks together, for ranks with few images each; all ranks then take a step in as
    many parts, and wait for each other in each BatchNorm."""
    unfreeze: Annotated[
        dict[CountOrZero, list[str] | str], Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}})
    ] = field(default_factory=dict)
    """From which epoch (from 0) which layers learn again, as in {3: layer1}; the same patterns as freeze. freeze and
    unfreeze are short for train.phases whose learning rates have one course together."""

    @property
    def label(self) -> str:
        """The model in words: its architecture, or the user's own factory."""
        return self.factory or self.arch

    @property
    def weights_file(self) -> Path | None:
        """The local file that weights names, of a run the one in its best checkpoint; None: torchvision's, or none."""
        if self.weights is None:
            return None
        path, is_path = Path(self.weights).expanduser(), bool(set("/.") & set(self.weights))
        if (run_weights := best_of_run(path)) is not None:
            return run_weights
        is_file = is_path or (not self.weights.startswith(WEIGHT_NAMES) and path.is_file())
        return path if is_file else None
