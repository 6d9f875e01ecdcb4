"""``python -m fused_preact.propagation``."""

import sys

from .cli import main

sys.exit(main())
