"""Fusing other people's models: ``fuse``, ``unfuse`` and ``explain``, and the backend for ``torch.compile``."""

from .eager import fuse, unfuse
from .report import explain

__all__ = ["explain", "fuse", "unfuse"]
