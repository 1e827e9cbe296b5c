"""What the process that tests.warm forks from imports, once: what a supervisor does, then what runs bring in later."""

import omegaconf  # noqa: F401

from launcher import start  # noqa: F401
from launcher.commands import launch  # noqa: F401
from launcher.node import agent
from launcher.report import build  # noqa: F401

agent.prepare()

import torchmetrics.classification  # noqa: E402, F401  after torch, in the supervisor's way
