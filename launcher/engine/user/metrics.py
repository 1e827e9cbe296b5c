"""A recipe's own metrics: objects of torchmetrics, exact over ranks; imported only where a recipe names some.

In a validation each rank's metric sees the rank's images. Then the states of all ranks are gathered and put together by
the reductions that the metric itself gave them (``add_state(…, dist_reduce_fx=…)``), on every rank alike. torchmetrics'
own exchange gathers tensor by tensor, and waits for ever where ranks hold lists of unequal length.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from launcher.engine.user import objects as user_objects
from launcher.errors import TrainingError, UsageError
from launcher.recipe import metrics as recipe_metrics
from launcher.recipe import user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.recipe.schema import Recipe
    from launcher.recipe.schema_train import MetricConfig

TRIAL_IMAGES = 24
"""Images of made-up answers that a metric is tried with, at least; two of each class where there are few."""
FEW_CLASSES = 100
TOLERANCE = 1e-4
"""By which part a metric may differ between one rank and several, for rounding."""

States = list[dict[str, Any]]
"""Of a metric and of those that it is made from, by the names of their states, on the host."""


class FunctionMetric(Metric):
    """A metric of a plain function, which is called once with the answers to all images of all ranks."""

    full_state_update = False
    probabilities: list[torch.Tensor]
    targets: list[torch.Tensor]

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self._function = function
        self.add_state("probabilities", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, probabilities: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep the answers to a batch."""
        self.probabilities.append(probabilities)
        self.targets.append(targets)

    def compute(self) -> Any:
        """Ask the function."""
        return self._function(dim_zero_cat(self.probabilities), dim_zero_cat(self.targets))


class UserMetrics:
    """A recipe's own metrics on one rank.

    Args:
        recipe: names them.
        num_classes: outputs of the model.
        device: where logits will be.
    """

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        self._several = recipe.data.task == "multi_label"
        self._metrics = {
            name: build(row, num_classes=num_classes).to(device)
            for name, row in recipe_metrics.configs(recipe.metrics).items()
        }
        for metric in self._metrics.values():
            _value_of_whole(
                metric, num_classes, device, several=self._several
            )  # an error in it comes now, not after an epoch
            for part in _parts(metric):
                if hasattr(part, "validate_args"):  # torchmetrics would look at every batch, and wait for a GPU
                    part.validate_args = False

    def reset(self) -> None:
        """Start again from nothing."""
        for metric in self._metrics.values():
            metric.reset()

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits (N x C) and labels (int64 N; of several classes an image N x C, 0 or 1)."""
        probabilities = logits.float().sigmoid() if self._several else logits.float().softmax(dim=1)
        labels = labels.long()
        for metric in self._metrics.values():
            metric.update(probabilities, labels)

    def compute(self) -> dict[str, float]:
        """The value of each over all ranks. Every rank must call it.

        Raises:
            TrainingError: one is no single number.
        """
        found = {}
        for name, metric in self._metrics.items():
            gathered: list[States | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, states_of(metric))
            put_together(metric, [states for states in gathered if states])
            found[name] = number(name, metric.compute())
        self.reset()
        return found


def build(row: MetricConfig, *, num_classes: int) -> Metric:
    """The metric of a row of the recipe, which exchanges nothing by itself.

    Raises:
        UsageError: it is no metric.
    """
    found = user_objects.build(row.metric, row.args, num_classes=num_classes, takes=2)
    if isinstance(found, Metric):
        metric: Metric = found.clone()
    elif callable(found) and not isinstance(found, torch.nn.Module):
        metric = FunctionMetric(found)
    else:
        raise UsageError(
            f"{user_code.shown(row.metric)} is {type(found).__name__}; valid: a metric of torchmetrics (a class, an "
            "object, or a function that makes one; of a collection each), or a function of probabilities and targets"
        )
    for part in _parts(metric):
        part.distributed_available_fn = _never
    return metric


def _never() -> bool:
    return False


def _parts(metric: Metric) -> list[Metric]:
    """A metric, and those that it is made from."""
    return [part for part in metric.modules() if isinstance(part, Metric)]


def states_of(metric: Metric) -> States | None:
    """What a metric has counted, on the host; None: it has seen nothing."""
    parts = _parts(metric)
    if not any(part.update_count for part in parts):
        return None
    return [{name: _to(state, torch.device("cpu")) for name, state in part.metric_state.items()} for part in parts]


def put_together(metric: Metric, gathered: Sequence[States]) -> None:
    """Have a metric hold what the ranks counted that have seen something."""
    for index, part in enumerate(_parts(metric)):
        for name, reduce in part._reductions.items():  # noqa: SLF001  what torchmetrics' own exchange goes by
            values = [states[index][name] for states in gathered]
            setattr(part, name, _to(_reduced(values, reduce), metric.device))
        part._update_count = max(1, part._update_count)  # noqa: SLF001  or it warns on a rank that has seen nothing
        part._computed = None  # noqa: SLF001  of before


def _reduced(values: Sequence[Any], reduce: Any) -> Any:
    """One state of all ranks, as torchmetrics' own exchange makes it."""
    if isinstance(values[0], list):
        every = [tensor for value in values for tensor in value]
        return every if reduce in (None, dim_zero_cat) else reduce(every)
    if reduce is dim_zero_cat:  # a list that a metric has made one tensor of
        return dim_zero_cat(list(values))
    if len(values) == 1:
        return values[0]
    return torch.stack(list(values)) if reduce is None else reduce(torch.stack(list(values)))


def _to(state: Any, device: torch.device) -> Any:
    return [one.to(device) for one in state] if isinstance(state, list) else state.to(device)


def number(name: str, value: Any) -> float:
    """A metric's value as a number.

    Raises:
        TrainingError: it is several, or none.
    """
    if problem := find_value_problem(value):
        raise TrainingError(f"metrics: {name} {problem}")
    return float(value)


def find_value_problem(value: Any) -> str | None:
    """What keeps a metric's value from being one number; words that follow its name."""
    if isinstance(value, bool | int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return None
    found = type(value).__name__
    if isinstance(value, torch.Tensor):
        found = f"a tensor of shape {tuple(value.shape)}"
    elif isinstance(value, dict):
        found = f"a dict of {', '.join(map(str, value))}"
    return f"gives {found}; a metric is one number: take a mean (as average: macro), or a function that picks one"


def find_problem(row: MetricConfig, num_classes: int, *, several: bool = False) -> str | None:
    """What is wrong with a row of the recipe, tried with made-up answers on one rank and on several.

    Raises:
        UsageError: it is no metric.
    """
    metric, name = build(row, num_classes=num_classes), user_code.shown(row.metric)
    better = getattr(metric, "higher_is_better", None)
    if better is not None and better != (row.mode == "max"):
        return f"{name}: {'more' if better else 'less'} of it is better; write mode: {'max' if better else 'min'}"
    whole = _value_of_whole(metric, num_classes, several=several)
    if problem := find_value_problem(whole):
        return f"{name} {problem}"
    spread = _value_of_spread(metric, num_classes, several=several)
    again = _value_of_whole(metric, num_classes, several=several)
    if _is_near(whole, again) and not _is_near(whole, spread):
        return (
            f"{name} is {_shown(whole)} of some answers on one rank and {_shown(spread)} of the same on three: its "
            "states cannot be put together; give each add_state() a dist_reduce_fx that makes one of them (sum, cat, "
            "min, max), or use a function of all probabilities and targets"
        )
    return None


def _is_near(one: Any, other: Any) -> bool:
    if find_value_problem(other):
        return False
    one, other = float(one), float(other)
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (math.isnan(one) and math.isnan(other))


def _shown(value: Any) -> str:
    return "several numbers" if find_value_problem(value) else f"{float(value):.6g}"


def _answers(num_classes: int, device: torch.device, *, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up probabilities, and true classes of which each occurs where there are few; ``several``: sets of them."""
    num = max(TRIAL_IMAGES, 2 * num_classes if num_classes <= FEW_CLASSES else 0)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num, num_classes, generator=generator)
    if several:
        sets = torch.randint(2, (num, num_classes), generator=generator)
        return logits.sigmoid().to(device), sets.to(device)
    return logits.softmax(dim=1).to(device), (torch.randperm(num, generator=generator) % num_classes).to(device)


def _value_of_whole(metric: Metric, num_classes: int, device: torch.device | None = None, *, several: bool) -> Any:
    """A metric's value of made-up answers; the metric itself stays as it is."""
    probabilities, targets = _answers(num_classes, device or torch.device("cpu"), several=several)
    tried = metric.clone()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tried.update(probabilities, targets)
        return tried.compute()


def _value_of_spread(metric: Metric, num_classes: int, *, several: bool) -> Any:
    """The same of answers that three ranks have in uneven parts, one of them none."""
    probabilities, targets = _answers(num_classes, torch.device("cpu"), several=several)
    owners, bounds = (0, 0, 1), (0, 5, 7, len(targets))
    ranks = [metric.clone() for _ in range(3)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for owner, start, end in zip(owners, bounds[:-1], bounds[1:], strict=True):
            ranks[owner].update(probabilities[start:end], targets[start:end])
        put_together(ranks[2], [states for one in ranks if (states := states_of(one))])
        return ranks[2].compute()
