"""Where a plan is carried out. Each module is one backend, with ``submit``; plan.BACKENDS names them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from launcher.plan.plan import BACKENDS

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
    """Import a backend by name, at first use."""
    return cast("Backend", importlib.import_module(BACKENDS[name]))
