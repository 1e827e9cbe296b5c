"""This machine, or one of several that are started by hand: the node supervisor, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import node

if TYPE_CHECKING:
    from launcher.plan import LaunchPlan


def submit(plan: LaunchPlan) -> int:
    """Run the plan's command here: the same function that ``python -m launcher.node`` calls."""
    return node.main(plan.command[3:])
