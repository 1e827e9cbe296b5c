"""A listener that leaves a test the time to do something to a run, on a machine that is busy with others."""

from __future__ import annotations

import time
from pathlib import Path

PAUSE_S = 0.05
SLOWLY = f'train.listeners=[{{listener: "{Path(__file__)}:Slowly"}}]'
"""A change of a recipe: the same bits, a little later."""


class Slowly:
    """Waits after every step."""

    def step(self, step):
        """One was taken."""
        time.sleep(PAUSE_S)
