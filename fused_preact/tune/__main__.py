"""``python -m fused_preact.tune``."""

from __future__ import annotations

import importlib
import importlib.util
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("triton") is None:
        sys.exit("fused_preact.tune: the package triton is not installed, and only its kernels can be tuned")
    sys.exit(importlib.import_module("fused_preact.tune.cli").main())
