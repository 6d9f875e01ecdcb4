"""Counted bytes and FLOPs of each schedule, and the least time that they could take.

Every kernel takes at least max(bytes / bandwidth, FLOPs / rate); kernels run one after the other; each tensor that a
kernel touches moves exactly once between memory and chip, and nothing stays in the cache from one kernel to the next.
Schedules:

    eager      BN statistics, BN apply, ReLU, convolution and addition are kernels of their own
    pointwise  BN-ReLU fused, the next BN's statistics taken while adding; library convolutions (a good compiler)
    c1         activation on load, addition and statistics on store; backward: ReLU mask and BN sums in the dgrad,
               one apply pass per BN, wgrad activates on load
    c2         as c1, with the apply inside a unit moved into the loads of the next dgrad and wgrad
    conv       the convolutions alone

On small inputs the cache holds what is counted as memory traffic, so a result may pass 100 % of this floor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from . import networks
from .networks import SiteCase, UnitCase

SCHEDULES = ("eager", "pointwise", "c1", "c2", "conv")


class Kernel(NamedTuple):
    """One launch: what it moves and computes."""

    phase: str
    kind: str
    bytes: float
    flops: float = 0.0


class Ceilings(NamedTuple):
    """What the machine reaches: bytes per second of a copy (read and write), FLOP/s of a large GEMM."""

    bandwidth: float
    rate: float

    def ms(self, kernels: Iterable[Kernel], phase: str = "both", kind: str | None = None) -> float:
        """The least milliseconds of the kernels of one phase."""
        chosen = (k for k in kernels if phase in ("both", k.phase) and kind in (None, k.kind))
        return 1e3 * sum(max(k.bytes / self.bandwidth, k.flops / self.rate) for k in chosen)


class _Site(NamedTuple):
    """Bytes of a site's tensors and the FLOPs of its convolution."""

    x: float
    touched: float
    weight: float
    y: float
    flops: float


def _count(site: SiteCase, batch: int, item: int) -> _Site:
    x = batch * site.c * site.h**2 * item
    # A strided 1x1 convolution reads only the pixels it lands on.
    touched = batch * site.c * site.out**2 * item if site.kernel < site.stride else x
    taps = site.c * site.k * site.kernel**2
    y = batch * site.k * site.out**2
    return _Site(x, touched, taps * item, y * item, 2.0 * batch * site.out**2 * taps)


def _conv_kernels(s: _Site, dy: float, fprop: float = 0, dgrad: float = 0, wgrad: float = 0) -> list[Kernel]:
    """The three convolutions of a site; the last arguments are bytes moved beside the plain operands."""
    return [
        Kernel("forward", "conv", s.touched + s.weight + s.y + fprop, s.flops),
        Kernel("backward", "conv", dy + s.weight + s.x + dgrad, s.flops),
        Kernel("backward", "conv", dy + s.touched + s.weight + wgrad, s.flops),
    ]


def site_kernels(site: SiteCase, batch: int, item: int, schedule: str) -> list[Kernel]:
    """One site in training, alone: given statistics of x for c1, made ones otherwise."""
    s = _count(site, batch, item)
    if schedule in ("c1", "c2"):
        convs = _conv_kernels(s, s.y, fprop=s.y if site.adds else 0, dgrad=s.x)
        return [*convs, Kernel("backward", "bn", 3 * s.x)]
    kernels = _conv_kernels(s, s.y)
    if schedule == "conv":
        return kernels
    if schedule == "eager":
        kernels += [Kernel("forward", "bn", 3 * s.x), Kernel("forward", "relu", 2 * s.x)]
        kernels += [Kernel("backward", "relu", 3 * s.x), Kernel("backward", "bn", 5 * s.x)]
    else:
        kernels += [Kernel("forward", "bn", 3 * s.x), Kernel("backward", "bn", 5 * s.x)]
    if site.adds:
        kernels.append(Kernel("forward", "add", 3 * s.y))
    return kernels


def unit_kernels(unit: UnitCase, batch: int, item: int, schedule: str, first: bool = False) -> list[Kernel]:
    """One unit in training inside a network; ``first``: nothing before it made the statistics of its input."""
    sites = [_count(site, batch, item) for site in unit.sites]
    projected = _count(unit.projection, batch, item) if unit.projection else None
    x, o = sites[0].x, sites[-1].y
    kernels: list[Kernel] = []

    def forward(kind: str, size: float) -> None:
        kernels.append(Kernel("forward", kind, size))

    def backward(kind: str, size: float) -> None:
        kernels.append(Kernel("backward", kind, size))

    if schedule in ("eager", "pointwise", "conv"):
        for s in [*sites, *([projected] if projected else [])]:
            kernels += _conv_kernels(s, s.y)
        if schedule == "conv":
            return kernels
        for index, s in enumerate(sites):
            if schedule == "eager":
                forward("bn", s.x), forward("bn", 2 * s.x), forward("relu", 2 * s.x)
                backward("relu", 3 * s.x), backward("bn", 2 * s.x), backward("bn", 3 * s.x)
            else:
                if index or first:
                    forward("bn", s.x)  # of the others the addition before made the statistics
                forward("bn", 2 * s.x)
                # At the unit's entrance: sums over (both) gradients, and the identity's gradient added on applying.
                backward("bn", (3 if projected else 2) * s.x if index == 0 else 2 * s.x)
                backward("bn", (4 if index == 0 else 3) * s.x)
        forward("add", 3 * o)
        if schedule == "eager":
            backward("add", 3 * x)
        return kernels

    if first:
        forward("bn", x)
    for index, s in enumerate(sites):
        last = index + 1 == len(sites)
        # c2 makes dy from (g, raw y) on load inside the unit; at its end dy is stored.
        dy = s.y if last or schedule == "c1" else 2 * s.y
        extra = projected.touched if index == 0 and projected else 0.0
        kernels += _conv_kernels(s, dy, fprop=s.y if last else 0, dgrad=s.x + extra)
        if index == 0:
            backward("bn", (3 if projected else 4) * x)
        elif schedule == "c1":
            backward("bn", 3 * s.x)
    if projected:
        p = projected
        kernels.append(Kernel("forward", "conv", p.touched + p.weight + p.y, p.flops))
        kernels.append(Kernel("backward", "conv", p.y + p.weight + p.touched, p.flops))
        kernels.append(Kernel("backward", "conv", p.y + p.weight + p.touched, p.flops))
    return kernels


@functools.cache
def _outline(model: str) -> tuple[int, bool]:
    """How many parameters the network has, and whether its stem pools."""
    net = networks.create(model)
    return sum(p.numel() for p in net.parameters()), any(isinstance(m, nn.MaxPool2d) for m in net.modules())


def network_kernels(model: str, batch: int, item: int, schedule: str) -> list[Kernel]:
    """A whole training step: stem, units, head, classifier and SGD with momentum."""
    units = networks.unit_cases(model)
    kernels = _stem_kernels(model, units[0], batch, item, schedule)
    for index, unit in enumerate(units):
        kernels += unit_kernels(unit, batch, item, schedule, first=index == 0)
    if schedule == "conv":
        return kernels
    last = units[-1].sites[-1]
    o = batch * last.k * last.out**2 * item
    if schedule == "eager":
        kernels += [Kernel("forward", "bn", n * o) for n in (1, 2, 2, 1)]
        kernels += [Kernel("backward", "bn", n * o) for n in (1, 3, 2, 3)]
    else:
        kernels += [Kernel("forward", "bn", o), Kernel("backward", "bn", o), Kernel("backward", "bn", 2 * o)]
    weights = last.k * networks.classes(model)
    kernels.append(Kernel("forward", "fc", weights * item, 2.0 * batch * weights))
    kernels.append(Kernel("backward", "fc", 2 * weights * item, 4.0 * batch * weights))
    # Weight and momentum in float32 read and written, the gradient read, the working copy written.
    parameters, _ = _outline(model)
    kernels.append(Kernel("backward", "optimiser", parameters * (16 + 2 * item)))
    return kernels


def _stem_kernels(model: str, unit: UnitCase, batch: int, item: int, schedule: str) -> list[Kernel]:
    conv = networks.network_convs(model)[0]
    stem = _count(SiteCase(conv.c, conv.k, conv.h, conv.kernel, conv.stride, False), batch, item)
    kernels = [
        Kernel("forward", "conv", stem.x + stem.weight + stem.y, stem.flops),
        Kernel("backward", "conv", stem.x + stem.weight + stem.y, stem.flops),
    ]
    if schedule != "conv" and _outline(model)[1]:
        pooled = batch * unit.c * unit.h**2
        # PyTorch keeps 64-bit indices; a compiler needs one byte for a 3x3 window.
        moved = stem.y + pooled * item + pooled * (8 if schedule == "eager" else 1)
        kernels += [Kernel("forward", "pool", moved), Kernel("backward", "pool", moved)]
    return kernels


def inference_kernels(model: str, batch: int, item: int, schedule: str) -> list[Kernel]:
    """A forward pass in eval mode. "pointwise" fuses add-BN-ReLU; "c1" also folds and activates on load."""
    units = networks.unit_cases(model)
    kernels = [k for k in _stem_kernels(model, units[0], batch, item, schedule) if k.phase == "forward"]
    for index, unit in enumerate(units):
        sites = [_count(site, batch, item) for site in unit.sites]
        o = sites[-1].y
        for s in [*sites, *([_count(unit.projection, batch, item)] if unit.projection else [])]:
            kernels.append(Kernel("forward", "conv", s.touched + s.weight + s.y, s.flops))
        if schedule == "eager":
            kernels += [Kernel("forward", kind, 2 * s.x) for s in sites for kind in ("bn", "relu")]
            kernels.append(Kernel("forward", "add", 3 * o))
        elif schedule == "pointwise":
            kernels += [Kernel("forward", "bn", 2 * s.x) for i, s in enumerate(sites) if i or not index]
            kernels.append(Kernel("forward", "add", 4 * o))
        elif schedule != "conv":
            last = kernels.pop(-2 if unit.projection else -1)
            kernels.append(last._replace(bytes=last.bytes + o))
    if schedule != "conv":
        site = units[-1].sites[-1]
        kernels.append(Kernel("forward", "bn", batch * site.k * site.out**2 * item))
        weights = site.k * networks.classes(model)
        kernels.append(Kernel("forward", "fc", weights * item, 2.0 * batch * weights))
    return kernels
