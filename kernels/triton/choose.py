"""The chooser: fused kernel or split path, and with which launch configuration, for one convolution.

Precedence: the user's table, the shipped one (:mod:`.tables`), the heuristic of :mod:`.configs`. Nothing is timed
here, so the first step of a run never stalls; ``python -m fused_preact.tune`` measures and writes the user's table.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import common, tables
from .common import Device, device_of, dot_precision
from .configs import ConvConfig, heuristic
from .geometry import Geometry

__all__ = [
    "Call",
    "Choice",
    "Problem",
    "applies_on_load",
    "asked",
    "call_of",
    "choose",
    "chosen",
    "forced",
    "own_config",
    "planned",
]


class Problem(NamedTuple):
    """One convolution as the chooser sees it."""

    op: str
    """"fprop", "dgrad", "wgrad", or "apply": how the BN backward behind the convolution reaches the other two."""
    geometry: Geometry
    dtype: torch.dtype
    precision: str
    extras: tuple[str, ...] = ()
    """What the call adds to the plain operation: "residual", "stats", "masked", "da", and "pending", which alone is
    part of the key."""

    @property
    def key(self) -> str:
        """Its name in the tables. Batch and image size count as rows, to the next power of two."""
        g = self.geometry
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            dtype += f"-{self.precision}"
        op = f"{self.op} pending" if "pending" in self.extras else self.op
        parts = [op, dtype, f"{g.c}->{g.k}", f"{g.r}x{g.s}"]
        for name, pair in (("stride", g.stride), ("dilation", g.dilation)):
            if pair != (1, 1):
                parts.append(f"{name} {pair[0]}x{pair[1]}")
        return " ".join([*parts, f"rows 2^{(g.rows - 1).bit_length()}"])


class Choice(NamedTuple):
    """How a problem is run."""

    path: str
    """"fused" or "split"; of an "apply" problem "loaded" or "stored"."""
    config: ConvConfig | None
    """None for all but "fused"."""
    source: str
    """"cache", "shipped", "heuristic", "forced", or "groups" where only the split path serves."""


_forced: Choice | None = None
_forced_apply: Choice | None = None
_asked: list[Problem] | None = None


class Call(NamedTuple):
    """What a launch depends on of a convolution's tensors and constants."""

    x: torch.Size
    weight: torch.Size
    dtype: torch.dtype
    precision: str
    device: Device
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def geometry(self) -> Geometry:
        """The sizes."""
        return Geometry.of(self.x, self.weight, self.stride, self.padding, self.dilation, self.groups)


def call_of(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Call:
    """The call on ``x`` [N,C,H,W] and ``weight`` [K,C/groups,R,S]."""
    constants = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return Call(x.shape, weight.shape, x.dtype, dot_precision(x), device_of(x), *constants)


_Plan = TypeVar("_Plan")


def planned(make: Callable[..., _Plan]) -> Callable[..., _Plan]:
    """``make(call, ...)`` remembered for each of its arguments, until the tables or what is forced change.

    It may ask :func:`choose`, which costs more than all the rest of a launch. While :func:`asked` listens nothing is
    remembered, so that every call is heard.
    """

    @functools.lru_cache(maxsize=4096)
    def remembered(forced: Choice | None, forced_apply: Choice | None, *arguments: Any) -> _Plan:
        return make(*arguments)

    @functools.wraps(make)
    def plan(*arguments: Any) -> _Plan:
        if _asked is not None:
            return make(*arguments)
        return remembered(_forced, _forced_apply, *arguments)

    _plans.append(remembered)
    return plan


_plans: list[Any] = []


def choose(op: str, call: Call, *extras: str) -> Choice:
    """The choice for one call."""
    problem = Problem(op, call.geometry, call.dtype, call.precision, extras)
    if _asked is not None:
        _asked.append(problem)
    forced = _forced_apply if op == "apply" else _forced
    if forced is not None and call.groups == 1:
        return forced
    return chosen(problem, call.device)


@planned
def applies_on_load(call: Call, weight_grad: bool) -> bool:
    """Whether dgrad and wgrad apply the BN backward behind the convolution where they read it; else it is stored."""
    wanted = choose("apply", call, *("weight_grad",) * weight_grad).path == "loaded"
    if not wanted and _asked is None:
        return False  # the tuner wants to hear of both ways
    # A library convolution reads what is stored.
    configs = [choose("dgrad", call, "masked", "pending").config]
    if weight_grad:
        configs.append(choose("wgrad", call, "pending").config)
    return wanted and None not in configs


@functools.lru_cache(maxsize=4096)
def chosen(problem: Problem, device: Device) -> Choice:
    """The choice for a problem on a device; the same on every rank that sees the same files."""
    if problem.geometry.groups != 1:
        return Choice("split", None, "groups")
    entry = tables.entries(device.name).get(problem.key)
    if entry is not None:
        config = None if entry["config"] is None else ConvConfig(*entry["config"])
        return Choice(entry["path"], config, entry["source"])
    if problem.op == "apply":
        return Choice("loaded" if _loading_moves_less(problem, device) else "stored", None, "heuristic")
    return Choice("fused", own_config(problem, device), "heuristic")


def own_config(problem: Problem, device: Device) -> ConvConfig:
    """The heuristic's configuration of a problem, whatever the tables say."""
    pending = "pending" in problem.extras
    return heuristic(problem.op, problem.geometry, problem.dtype, problem.precision, device, pending)


def _loading_moves_less(problem: Problem, device: Device) -> bool:
    """Whether applying on load moves less than storing, in tensors of dy's size.

    Stored: the pass reads g and y and writes dy: three. Loaded: each of dgrad and wgrad reads y beside g. From memory
    that is one more tensor; from L2 one more for every time that its programs read dy, once for each tap and each
    tile of C. L2 is about twice as fast as memory, so a kernel pays the larger of 1 and reads / 2: a 1x1 site of up
    to 256 channels in tiles of 128 pays 1 a kernel, 2 < 3; a 3x3 site 4.5 a kernel.
    """
    g, paid = problem.geometry, 0.0
    for op in ("dgrad", "wgrad") if "weight_grad" in problem.extras else ("dgrad",):
        config = chosen(problem._replace(op=op, extras=("pending",)), device).config
        if config is None:
            return False
        paid += max(1.0, g.r * g.s * common.cdiv(g.c, config.block_n) / _L2_SPEED)
    return paid < 3


_L2_SPEED = 2
"""Bandwidth of L2 in those of memory, the least of the chips in ``cost``: 2.0 (B200), 2.1 (H100) to 4.7 (L40S)."""


_generation = 0


def state(x: Tensor) -> tuple[Any, ...] | None:
    """What choices for tensors like ``x`` depend on beside the call; None while somebody listens to them."""
    if _asked is not None or common.is_recording():
        return None
    return _forced, _forced_apply, _generation, dot_precision(x)


def reload() -> None:
    """Read the tables again: for the tuner, which has just written one."""
    global _generation
    _generation += 1
    tables.reload()
    for remembered in (chosen, *_plans):
        remembered.cache_clear()


@contextlib.contextmanager
def forced(path: str, config: ConvConfig | None = None) -> Iterator[None]:
    """Every convolution without groups runs this way: how the tuner and the tests reach what would not be chosen.

    ``"loaded"`` and ``"stored"`` say how a BN backward reaches dgrad and wgrad, and leave their configurations alone.
    """
    global _forced, _forced_apply
    if (path, config is None) not in (("split", True), ("loaded", True), ("stored", True), ("fused", False)):
        raise ValueError(
            f"path, config: got {path!r} and {config}, allowed are 'split', 'loaded' and 'stored' with None, "
            "'fused' with a config"
        )
    before = _forced, _forced_apply
    if path in ("loaded", "stored"):
        _forced_apply = Choice(path, None, "forced")
    else:
        _forced = Choice(path, config, "forced")
    try:
        yield
    finally:
        _forced, _forced_apply = before


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
