"""``python -m launcher`` is ``launch``."""

import sys

from launcher.cli import main

sys.exit(main())
