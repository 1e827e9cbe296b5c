"""Which keys of a recipe may change when a run is resumed: a row for each key, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, RecipeError, UsageError
from launcher.images.listing import Listing
from launcher.recipe import catalog, user_code
from launcher.recipe import images as recipe_images
from launcher.recipe import load as recipes
from launcher.recipe import paths as recipe_paths
from launcher.recipe.keys import flat, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir

FIXED = {
    "seed": "the order of the samples follows from it: some would come twice in an epoch, others never",
    "model.arch": "the checkpoint's weights are those of the other",
    "model.weights": "training began from the other, and goes on from the checkpoint's weights",
    "model.head": "the checkpoint's head is of the other kind",
    "model.num_classes": "the checkpoint's head has the other number of outputs",
    "data.image_size": "the best checkpoint so far was chosen, and would be exported, at the other size",
    "data.crop_pct": "the best checkpoint so far was chosen, and would be exported, with the other crop",
    "data.mean": "the best checkpoint so far was chosen, and would be exported, with the other values",
    "data.std": "the best checkpoint so far was chosen, and would be exported, with the other values",
    "data.interpolation": "the best checkpoint so far was chosen, and would be exported, with the other",
    "data.background": "the best checkpoint so far was chosen, and would be exported, on the other background",
    "data.channels": "the best checkpoint so far was chosen, and would be exported, with the other number",
    "data.grey_range": "the best checkpoint so far was chosen, and would be exported, with other grey values",
    "data.task": "the checkpoint's outputs mean something else",
    "data.balance": "the order of the samples and what their losses count follow from it",
    "optim.name": "the checkpoint holds the other's state",
}
"""Keys that must not change, each with the reason."""
SAME_GLOBAL_BATCH = "the global batch stays that of the run; batch.global_size=N changes it"
OTHER_LOSS = "a best checkpoint by the loss is chosen anew from the next validation on"
SAME_IMAGES = "the training images have to be the same"
OPEN = {
    "name": "",
    "model.freeze": "",
    "model.unfreeze": "",
    "model.factory": "",
    "model.factory_args": "",
    "model.dropout": "",
    "model.stochastic_depth": "",
    "model.sync_batchnorm": "",
    "data.name": SAME_IMAGES,
    "data.path": SAME_IMAGES,
    "data.train": SAME_IMAGES,
    "data.val": "the best checkpoint so far was chosen on the other images",
    "data.test": "it is measured when training is over, if it was not",
    "data.val_fraction": SAME_IMAGES,
    "data.group": SAME_IMAGES,
    "data.columns": SAME_IMAGES,
    "data.separator": SAME_IMAGES,
    "data.classes": SAME_IMAGES,
    "data.dataset": SAME_IMAGES,
    "data.dataset_args": SAME_IMAGES,
    "data.transform": "the best checkpoint is chosen anew from the next validation on",
    "data.transform_args": "",
    "data.augment": "",
    "data.decode": "",
    "data.cache": "",
    "data.crop_scale": "",
    "data.flip": "",
    "data.rotate": "",
    "data.auto_augment": "",
    "data.magnitude": "",
    "data.color_jitter": "",
    "data.erase": "",
    "data.mixup": "",
    "data.cutmix": "",
    "data.workers": "",
    "data.threshold": "a best checkpoint by F1 was chosen at the other threshold",
    "data.on_bad_image": "",
    "data.missing_val_classes": "",
    "batch.size": SAME_GLOBAL_BATCH,
    "batch.objective": "",
    "batch.tune_budget": "",
    "batch.global_size": "",
    "batch.accumulate": SAME_GLOBAL_BATCH,
    "optim.lr": "",
    "optim.momentum": "",
    "optim.weight_decay": "",
    "optim.decay_norms": "",
    "optim.schedule": "",
    "optim.end_factor": "",
    "optim.step_epochs": "",
    "optim.step_factor": "",
    "optim.power": "",
    "optim.cycles": "",
    "optim.cycle_growth": "",
    "optim.warmup_epochs": "",
    "optim.lr_batch_size": "",
    "optim.groups": "",
    "optim.layer_decay": "",
    "precision": "",
    "train.epochs": "",
    "train.phases": "what has begun goes on in the phase that its epoch is in now",
    "train.channels_last": "",
    "train.compile": "",
    "train.batchnorm_recompute": "",
    "train.feature_views": "",
    "train.ema": "an average that the checkpoint has goes on, a new one begins with the next step",
    "train.swa": "a mean that the checkpoint has goes on, or begins anew where its first epoch is yet to come",
    "train.clip_grad_norm": "",
    "train.clip_grad_value": "",
    "train.loss": OTHER_LOSS,
    "train.loss_args": OTHER_LOSS,
    "train.label_smoothing": "",
    "train.checkpoint.every_steps": "",
    "train.checkpoint.every_minutes": "",
    "train.checkpoint.keep": "",
    "train.early_stopping.metric": "the best checkpoint is chosen anew from the next validation on",
    "train.early_stopping.mode": "",
    "train.early_stopping.patience": "",
    "train.early_stopping.min_delta": "",
    "train.on_nan": "",
    "train.hang_timeout_s": "",
    "train.listeners": "",
    "metrics": "",
    "tracking.backends": "",
    "tracking.wandb.mode": "",
    "tracking.wandb.project": "",
    "tracking.wandb.entity": "",
    "tracking.wandb.group": "",
    "tracking.wandb.tags": "",
    "tracking.wandb.notes": "",
    "tracking.mlflow.uri": "",
    "tracking.mlflow.experiment": "",
    "tracking.log_every": "",
    "tracking.pictures": "",
    "post.enabled": "",
    "post.calibrate": "",
    "post.bake_preprocessing": "",
    "post.export": "",
    "post.quantize": "",
    "post.qat_steps": "",
    "post.profile": "",
    "post.max_top1_drop": "",
    "post.min_agreement": "",
    "post.target": "",
    "launch.nodes": "",
    "launch.spares": "",
    "launch.gpus": "",
    "launch.procs": "",
    "launch.threads": "",
    "launch.keep_freed_memory": "",
    "launch.device": "",
    "launch.backend": "",
    "launch.profile": "",
    "launch.preflight": "",
    "launch.max_restarts": "",
}
"""Keys that may change, each with a note for the user."""
TUNED = (
    *(
        "model.",
        "batch.",
        "precision",
        "train.phases",
        "train.loss",
        "train.ema",
        "train.swa",
        "train.channels_last",
        "train.clip_grad",
        "optim.momentum",
    ),
    *(
        "data.workers",
        "data.augment",
        "data.auto_augment",
        "data.decode",
        "data.cache",
        "data.dataset",
        "data.transform",
    ),
    *("data.crop_scale", "data.rotate", "data.magnitude", "data.color_jitter", "data.erase"),
    *("launch.threads", "launch.keep_freed_memory"),
)
"""Beginnings of keys that measured batch sizes and shares of cores depend on: a change has them measured again."""

_REFERENCES = {seam.key for seam in user_code.SEAMS}
_SAME_PLACE = ("data.path", "data.classes", "launch.profile", "post.profile")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key whose value differs from what the run was trained with so far."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        note = OPEN.get(self.key, "")
        return f"{self.key}: {show(self.old)} -> {show(self.new)}{f' ({note})' if note else ''}"

    @property
    def is_measured(self) -> bool:
        """Whether batch sizes have to be measured again for the new value."""
        return self.key.startswith(TUNED)


def find(run: RunDir, recipe: Recipe, where: Callable[[str], str]) -> list[Change]:
    """What ``recipe`` changes for a run that has a checkpoint; reads files and writes none.

    The recipe that the checkpoint was trained with is in its ``state.json``; where an earlier version wrote that, it is
    the run's own. A run without a checkpoint can go on with any recipe.

    Args:
        run: there may be none yet.
        recipe: to go on with.
        where: from a key to the place that its value comes from.

    Raises:
        RecipeError: the run cannot go on with it; names all keys that must not change.
        UsageError: the run's own recipe cannot be read.
    """
    state = run.newest_state()
    if state is None:
        return []
    before = _trained_with(run, state)
    changes = list(_compare(before, recipe_paths.absolute(recipe), len(state["classes"])))
    problems = [
        Problem(
            key=change.key,
            where=where(change.key),
            message=f"found {show(change.new)}, but the run has been trained with {show(change.old)} and cannot go on "
            f"with another: {FIXED[change.key]}; take the old value, or begin a new run in another --run-dir",
        )
        for change in changes
        if change.key in FIXED
    ]
    if problems:
        raise RecipeError(problems)
    return changes


def _trained_with(run: RunDir, state: dict[str, Any]) -> Recipe:
    import yaml

    try:
        return recipes.from_recorded(state["recipe"]) if "recipe" in state else recipes.read_resolved(run.recipe)
    except (yaml.YAMLError, ValueError, TypeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{run}: the recipe that it was trained with cannot be read: {first}") from None


def _compare(before: Recipe, now: Recipe, num_classes: int) -> Iterator[Change]:
    new_values = dict(flat(now))
    for key, old in flat(before):
        new = new_values[key]
        if _meaning(key, old, before, num_classes) == _meaning(key, new, now, num_classes):
            continue
        if key == "model.weights" and _has_moved(before, now):
            continue
        yield Change(key=key, old=old, new=new)


def _meaning(key: str, value: Any, recipe: Recipe, num_classes: int) -> Any:
    """What a value means, so that two ways to write the same value are not a change."""
    if key in ("model.weights", "model.head"):
        return _weights(recipe) if key == "model.weights" else _kind_of_head(recipe)
    if key == "data.image_size" and value == "auto" and not recipe.model.factory:
        return catalog.image_size(recipe.model.arch, recipe.model.weights)
    if key == "model.num_classes" and value == "auto":
        return _num_classes(recipe) or num_classes
    if key in _REFERENCES:
        return user_code.get(user_code.rewrite(recipe, lambda _, text: user_code.as_in_run(text)), key)
    if key in _SAME_PLACE and value is not None:
        return Path(value).resolve()
    return list(value.items()) if isinstance(value, dict) else value  # the first pattern that matches counts


def _weights(recipe: Recipe) -> Any:
    model = recipe.model
    if model.weights_file is not None:
        return model.weights_file.resolve()
    if model.factory:
        return None
    return model.weights and catalog.find_model(model.arch).find_weights(model.weights).name


def _kind_of_head(recipe: Recipe) -> str:
    """A list says which layers the head is, and not of what kind."""
    head = recipe.model.head
    return "auto" if isinstance(head, list) or head == "linear" else head


def _has_moved(before: Recipe, now: Recipe) -> bool:
    """Whether both start from a file of one name, or of one run, which is not read any more."""
    old, new = before.model.weights_file, now.model.weights_file
    return old is not None and new is not None and (old.name == new.name or new in old.parents)


def _num_classes(recipe: Recipe) -> int | None:
    if recipe.data.dataset:
        return None
    try:
        return len(Listing(recipe_images.source_of(recipe)).classes)
    except UsageError:  # they are gone
        return None
