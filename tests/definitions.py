"""Every definition of a third-party structure, by name."""

from importlib import import_module

from definitions_base import DEFINITIONS, Definition

__all__ = ["DEFINITIONS", "Definition"]

# Each registers its own.
for _part in ("residual", "copies", "ported", "variants", "other"):
    import_module(f"definitions_{_part}")
