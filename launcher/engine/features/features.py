"""What the training loop knows of kept features: whether there are any now, and when they are computed."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.engine.augmenting.mixing import is_mixing
from launcher.engine.features import choice, cut, table
from launcher.engine.features.fill import fill
from launcher.engine.features.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.features.cut import Cut
    from launcher.engine.listeners.recorder import Recorder
    from launcher.engine.setup import Parts

LOOKED_AT = 4
"""Training images that a cut network is compared with the whole one on."""
KINDS = {"train": "training", "val": "validation"}
"""By split, what its images are."""


class _ProblemError(Exception):
    """Why there are no features on some rank, raised on all."""


class Features:
    """Every rank has one and calls it at the same points.

    Training's and validation's features are of two cuts: in validation dropout does nothing, and comes before the cut.

    Args:
        parts: what is trained; :attr:`Parts.kept` says what its steps take.
        recorder: on rank 0.
        stop: whether this rank was asked to stop.
        poll: as of the trainer, called before each batch; may raise.
        on_disk: whether memory is short.
    """

    def __init__(
        self,
        parts: Parts,
        recorder: Recorder | None,
        *,
        stop: Callable[[], bool],
        poll: Callable[..., None],
        on_disk: bool = False,
    ) -> None:
        self._parts = parts
        self._recorder = recorder
        self._fill = functools.partial(self._fill_split, stop, poll)
        self._on_disk = on_disk
        epochs = 0 if parts.max_steps is not None else choice.frozen_epochs(parts.recipe, parts.model)
        self._last = epochs - 1
        """The last epoch with the layers frozen that are frozen at first."""
        views = choice.num_views(parts.recipe)
        self._views = {"train": views if views < epochs else 0, "val": int(epochs > 1)}
        """Of each split how many views are worth to be kept: those that are seen again."""
        if parts.recipe.train.feature_views == 0:
            self._views = dict.fromkeys(self._views, 0)
        self._kept: dict[str, Kept | None] = {}
        self._told = is_mixing(parts.recipe.data) or choice.why_random(parts.recipe) is None

    def leave(self, epoch: int) -> None:
        """Before layers are frozen for an epoch: let go of all where others learn than at first."""
        if epoch > self._last and any(self._kept.values()):
            self._say("from here on other layers learn: the kept features are given up, and steps take images")
        if epoch > self._last:
            self._kept, self._views, self._parts.kept = {}, {}, None

    def begin(self, epoch: int) -> None:
        """Before the steps of an epoch: have its view of the training images, and steps take it, where it is kept."""
        kept = self._open("train")
        if kept is None:
            self._tell_of_views()
            return
        if self._parts.kept is None:
            self._parts.kept = kept
            self._parts.wrap()
        if kept.view_of(epoch) not in kept.filled:
            self._fill("train", kept, epoch)

    def validation(self) -> Kept | None:
        """In evaluation mode: the features of the validation set; None: they are not kept."""
        kept = self._open("val")
        if kept is not None and not kept.filled:
            self._fill("val", kept, 0)
        return kept

    def _fill_split(
        self, stop: Callable[[], bool], poll: Callable[..., None], split: str, kept: Kept, epoch: int
    ) -> None:
        excluded = self._parts.schedule.excluded if split == "train" else frozenset()
        num, seconds = fill(self._parts, kept, epoch, excluded, stop=stop, poll=poll)
        if self._recorder is None:
            return
        view, views, size_mb = kept.view_of(epoch), kept.num_views, kept.num_bytes / 1e6
        fields = {"split": split, "images": num, "view": view, "views": views, "size_mb": round(size_mb, 3)}
        self._recorder.event("features_kept", **fields, place=kept.place, seconds=round(seconds, 3))
        images = f"{num:,} {KINDS[split]} images' features"
        which = f" (view {view + 1} of {views})" if views > 1 else ""
        self._recorder.say(
            f"backbone frozen: {images} kept{which}, {size_mb:,.0f} MB in {kept.place}, computed in {seconds:.1f} s"
        )

    def _open(self, split: str) -> Kept | None:
        """The features of a split, for which room is made at first; None: they are not kept."""
        if not self._views.get(split):
            return None
        if split not in self._kept:
            try:
                found = self._together(lambda: self._cut(split))
            except _ProblemError as problem:
                self._views = {}
                self._not_kept("its features", problem)
                return None
            try:
                self._kept[split] = self._make(split, found)
            except _ProblemError as problem:
                self._kept[split] = None
                self._not_kept(f"the features of {KINDS[split]} images", problem)
        return self._kept[split]

    def _make(self, split: str, found: Cut) -> Kept:
        """Make room for what comes out of a cut."""
        parts, views = self._parts, self._views[split]
        samples = parts.train_set if split == "train" else parts.val_set
        shape = {"views": views, "num_samples": len(samples)}
        num_bytes = views * len(samples) * found.bytes_of_sample
        made = self._together(lambda: self._make_room(num_bytes))
        told = self._gather((parts.ranks.node_rank, made and (made.path, made.place)))
        path, place = next(of_node for node, of_node in told if node == parts.ranks.node_rank and of_node)
        opened = self._together(lambda: table.open_table(path, found, **shape))
        if made:
            os.close(made.fd)  # all have opened it
        return Kept(samples, found, opened, place, parts.device)

    def _make_room(self, num_bytes: int) -> table.Table | None:
        """On a node's first rank."""
        return None if self._parts.ranks.local_rank else table.make(num_bytes, on_disk=self._on_disk)

    def _cut(self, split: str) -> Cut:
        parts = self._parts
        module, was_training = parts.model.module, parts.model.module.training
        numbers = [index for index in range(len(parts.train_set)) if index not in parts.schedule.excluded][:LOOKED_AT]
        images, labels = (torch.stack(found) for found in zip(*(parts.train_set[0, i] for i in numbers), strict=True))
        parts.model.train()
        moving = cut.moving_layers(module)
        try:
            if split == "val":
                parts.model.eval()
            last = bool(parts.numerics.channels_last)
            return cut.find(module, moving, parts.to_device((images, labels))[0], parts.autocast, channels_last=last)
        finally:
            (parts.model.train if was_training else parts.model.eval)()

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do something on all ranks; raises _ProblemError on all where it cannot be done on one."""
        found, problem = None, None
        try:
            found = work()
        except (cut.NoCutError, OSError, RuntimeError) as error:  # RuntimeError: torch cannot map a file
            problem = str(error)
        if problems := [one for one in self._gather(problem) if one]:
            raise _ProblemError(problems[0])
        return found

    def _gather(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self._parts.ranks.world_size
        dist.all_gather_object(every, value)
        return every

    def _tell_of_views(self) -> None:
        """Once, where random transforms are all that keeps training's features from being kept."""
        recipe = self._parts.recipe
        if self._views.get("val") and recipe.train.feature_views == "auto" and not self._told:
            self._told = True
            self._say(
                f"backbone frozen, and computed anew in every epoch, as {choice.why_random(recipe)} makes each image "
                "another one each time; train.feature_views=4 would keep four views of each, and =1 a single one"
            )

    def _not_kept(self, what: str, why: Exception) -> None:
        if self._recorder:
            self._recorder.event("features_not_kept", message=str(why))
            self._say(f"backbone frozen, but {what} are not kept, and are computed anew every time: {why}")

    def _say(self, line: str) -> None:
        if self._recorder:
            self._recorder.say(line)
