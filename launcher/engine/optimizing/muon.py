"""Muon (Jordan et al. 2024) for the matrices of hidden layers, and AdamW for all else, as torch documents it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from launcher.engine.model import FineTunedModel
    from launcher.recipe.schema import OptimConfig, Recipe

Groups = list[dict[str, Any]]
OF_MUON = "muon"
"""The key of a group that says which of the two it is of."""
MATRIX = 2
"""Dimensions of what torch's Muon takes; a convolution has four."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers that are one to whoever sets rates, saves and restores.

    Args:
        groups: of parameters; each says by OF_MUON whose it is.
        config: their settings.
    """

    def __init__(self, groups: Groups, config: OptimConfig) -> None:
        lr, decay = config.lr, config.weight_decay
        kinds: dict[bool, Callable[[Groups], torch.optim.Optimizer]] = {
            # Adjusted so, a matrix moves about as far as AdamW would move it: one rate is right for both.
            True: lambda groups: torch.optim.Muon(
                groups, lr=lr, weight_decay=decay, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
            ),
            False: lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True),
        }
        of_kind = {kind: [group for group in groups if group[OF_MUON] == kind] for kind in kinds}
        self._both = {kind: kinds[kind](found) for kind, found in of_kind.items() if found}
        super().__init__([group for one in self._both.values() for group in one.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each, with the groups and the state that this one has now."""
        assert closure is None  # noqa: S101
        for kind, one in self._both.items():
            one.param_groups = [group for group in self.param_groups if group[OF_MUON] == kind]
            one.state = self.state
            one.step()


def hidden_matrices(model: FineTunedModel) -> set[str]:
    """The names of the weights that are Muon's: matrices, but not those of the head and of embeddings."""
    tables = [name for name, layer in model.module.named_modules() if isinstance(layer, nn.Embedding)]
    others = tuple(f"{name}." for name in (*model.head, *tables))
    return {
        name
        for name, parameter in model.module.named_parameters()
        if parameter.ndim == MATRIX and name.endswith("weight") and not name.startswith(others)
    }


def problems(recipe: Recipe, model: FineTunedModel) -> Iterator[tuple[str, str]]:
    """Why the optimizer makes no sense for a model: the key, and words."""
    if recipe.optim.name == "muon" and not hidden_matrices(model):
        text = (
            f"found 'muon', which takes matrices outside the head, and {recipe.model.label} has none (its weights are "
        )
        yield "optim.name", f"{text}convolutions, which would all be AdamW's); use adamw"
