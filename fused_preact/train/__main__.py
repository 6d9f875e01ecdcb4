"""``python -m fused_preact.train``."""

import sys

from .cli import main

sys.exit(main())
