"""Fusing other people's models: ``fuse``, ``unfuse`` and ``explain``, and the backend for ``torch.compile``."""

from .eager import fuse, unfuse

__all__ = ["fuse", "unfuse"]
