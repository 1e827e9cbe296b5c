"""Where a plan is carried out. Each module is one backend; imported at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.plan.launch_plan import LaunchPlan


def load(plan: LaunchPlan) -> Callable[[LaunchPlan], int]:
    """What carries out a plan whose run directory is written, and returns the exit code.

    It raises a LaunchError where that failed or was interrupted.
    """
    if plan.backend == "local":
        from launcher.backends import local

        return local.submit
    if plan.backend == "slurm":
        from launcher.backends.slurm import submit

        return submit.submit
    from launcher.backends import torchrun

    return torchrun.detach if plan.detach else torchrun.submit
