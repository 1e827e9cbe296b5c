"""Where a plan is carried out. Each module is one backend, with ``submit``; imported at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from launcher.plan.plan import LaunchPlan


class Backend(Protocol):
    """What a backend module offers."""

    def submit(self, plan: LaunchPlan) -> int:
        """Carry a plan out whose run directory is written; return the exit code.

        Raises:
            LaunchError: it failed or was interrupted.
        """


def load(name: str) -> Backend:
    """The backend ``local``, ``torchrun`` or ``slurm``."""
    if name == "local":
        from launcher.backends import local

        return local
    if name == "torchrun":
        from launcher.backends import torchrun

        return torchrun
    from launcher.backends.slurm import submit

    return submit
