"""A node's part in a run, as torch's agent and those about it have to know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Part:
    """In a run that ends where a node is lost."""

    outlives_loss: ClassVar[bool] = False
    """Whether the run goes on without a node that is lost."""
    when_lost: ClassVar[str] = "stopping"
    """What is done then, in words."""
    hosts: Mapping[int, str] = {}
    """Names of the machines that train together now, where they are known before they meet."""
    environment: Mapping[str, str] = {}
    """Variables for the workers."""

    @property
    def is_over(self) -> bool:
        """Whether the other nodes have gone on without this one."""
        return False

    @property
    def is_saving(self) -> bool:
        """Whether a worker of this node writes a checkpoint."""
        return False

    def began(self, ranks: Sequence[str]) -> None:
        """The workers of these ranks are started on this node."""

    def heed(self, living: Sequence[int]) -> None:
        """Do what is due while these workers live; called all the while."""
