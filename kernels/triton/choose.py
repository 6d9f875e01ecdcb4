"""The chooser: fused kernel or split path, and with which launch configuration, for one convolution.

Precedence: the user's table, the shipped one (:mod:`.tables`), the heuristic of :mod:`.configs`. Nothing is timed
here, so the first step of a run never stalls; ``python -m fused_preact.tune`` measures and writes the user's table.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import common, tables
from .common import Device, device_of, dot_precision
from .configs import ConvConfig, heuristic
from .geometry import Geometry

__all__ = ["Choice", "Problem", "asked", "choose", "chosen", "forced"]


class Problem(NamedTuple):
    """One convolution as the chooser sees it."""

    op: str
    """"fprop", "dgrad" or "wgrad"."""
    geometry: Geometry
    dtype: torch.dtype
    precision: str
    extras: tuple[str, ...] = ()
    """What the call adds to the plain operation ("residual", "stats", "masked", "da"); not part of the key."""

    @property
    def key(self) -> str:
        """Its name in the tables. Batch and image size count as rows, to the next power of two."""
        g = self.geometry
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            dtype += f"-{self.precision}"
        parts = [self.op, dtype, f"{g.c}->{g.k}", f"{g.r}x{g.s}"]
        for name, pair in (("stride", g.stride), ("dilation", g.dilation)):
            if pair != (1, 1):
                parts.append(f"{name} {pair[0]}x{pair[1]}")
        return " ".join([*parts, f"rows 2^{(g.rows - 1).bit_length()}"])


class Choice(NamedTuple):
    """How a problem is run."""

    path: str
    """"fused" or "split"."""
    config: ConvConfig | None
    """None on the split path."""
    source: str
    """"cache", "shipped", "heuristic", "forced", or "groups" where only the split path serves."""


_forced: Choice | None = None
_asked: list[Problem] | None = None


def choose(op: str, geometry: Geometry, x: Tensor, *extras: str) -> Choice:
    """The choice for one call on tensors like ``x``."""
    problem = Problem(op, geometry, x.dtype, dot_precision(x), extras)
    if _asked is not None:
        _asked.append(problem)
    if _forced is not None and geometry.groups == 1:
        return _forced
    return chosen(problem, device_of(x))


@functools.lru_cache(maxsize=4096)
def chosen(problem: Problem, device: Device) -> Choice:
    """The choice for a problem on a device; the same on every rank that sees the same files."""
    if problem.geometry.groups != 1:
        return Choice("split", None, "groups")
    entry = tables.entries(device.name).get(problem.key)
    if entry is not None:
        config = None if entry["config"] is None else ConvConfig(*entry["config"])
        return Choice(entry["path"], config, entry["source"])
    config = heuristic(problem.op, problem.geometry, problem.dtype, problem.precision, device)
    return Choice("fused", config, "heuristic")


def reload() -> None:
    """Read the tables again: for the tuner, which has just written one."""
    tables.reload()
    chosen.cache_clear()


@contextlib.contextmanager
def forced(path: str, config: ConvConfig | None = None) -> Iterator[None]:
    """Every convolution without groups runs this way: how the tuner and the tests reach what would not be chosen."""
    global _forced
    if (path, config is None) not in (("split", True), ("fused", False)):
        raise ValueError(
            f"path, config: got {path!r} and {config}, allowed are 'split' and None, 'fused' and a config"
        )
    before, _forced = _forced, Choice(path, config, "forced")
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def asked(device: Device) -> Iterator[list[Problem]]:
    """Collect the problems that a program on meta tensors would have on ``device``, in order, repeated ones too."""
    global _asked
    _asked = []
    try:
        with common.recording(device):
            yield _asked
    finally:
        _asked = None
