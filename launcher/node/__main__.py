"""``python -m launcher.node RUN``: this node's supervisor."""

import sys

from launcher.errors import exit_code_of
from launcher.node import supervisor

sys.exit(exit_code_of(supervisor.main))
