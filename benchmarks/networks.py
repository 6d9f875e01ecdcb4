"""The sites, units and bare convolutions of a network, with the shapes they have in it."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_preact
from fused_preact.modules import IdentityProjection, _PreActUnit

from .measure import Candidate

CHANNELS_LAST = torch.channels_last


def image_size(model: str) -> int:
    """Height and width of the images that the network was made for."""
    return 32 if model.startswith("cifar") else 224


def classes(model: str) -> int:
    """The number of classes of its data set."""
    return 10 if model.startswith("cifar") else 1000


def create(model: str, *, fused: bool = False) -> nn.Module:
    """The network with the weights of seed 0."""
    torch.manual_seed(0)
    return fused_preact.models.create(model, num_classes=classes(model), fused=fused)


class SiteCase(NamedTuple):
    """One BN -> ReLU -> convolution [+ addition] site: [c,h,h] -> [k,out,out]."""

    c: int
    k: int
    h: int
    kernel: int
    stride: int
    adds: bool

    @property
    def out(self) -> int:
        """Height and width of the output."""
        return (self.h - 1) // self.stride + 1

    @property
    def name(self) -> str:
        """Such as "3x3/2 64->64 @56+id"."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        added = "+id" if self.adds else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.c}->{self.k} @{self.h}{added}"

    def module(self, fused: bool) -> fused_preact.PreActConv2d:
        """The site as a module."""
        return fused_preact.PreActConv2d(
            self.c, self.k, self.kernel, self.stride, self.kernel // 2, bias=False, fused=fused
        )


class UnitCase(NamedTuple):
    """One residual unit (the plain module, to be copied) and the size of its input."""

    unit: _PreActUnit
    h: int

    @property
    def c(self) -> int:
        """Channels of the input."""
        return self.unit.bn1.num_features

    @property
    def sites(self) -> list[SiteCase]:
        """Its sites in order; the projection is not among them."""
        h, found = self.h, []
        pairs = list(self.unit.sites())
        for index, (_, conv) in enumerate(pairs):
            adds = index + 1 == len(pairs)
            site = SiteCase(conv.in_channels, conv.out_channels, h, conv.kernel_size[0], conv.stride[0], adds)
            found.append(site)
            h = site.out
        return found

    @property
    def projection(self) -> SiteCase | None:
        """The shortcut's convolution, where it has one."""
        shortcut = self.unit.shortcut
        if shortcut is None:
            return None
        weight: Any = shortcut.weight
        stride: Any = shortcut.stride
        return SiteCase(weight.shape[1], weight.shape[0], self.h, 1, stride[0], False)

    @property
    def name(self) -> str:
        """Such as "bottleneck 64->256 @56 B" (B: projection, A: zero padding, id: identity)."""
        first, last = self.sites[0], self.sites[-1]
        stride = self.h // last.out
        kind = "basic" if len(self.sites) == 2 else "bottleneck"
        shortcut = {type(None): "id", IdentityProjection: "A"}.get(type(self.unit.shortcut), "B")
        return f"{kind}{f'/{stride}' if stride > 1 else ''} {first.c}->{last.k} @{self.h} {shortcut}"


@functools.cache
def unit_cases(model: str) -> list[UnitCase]:
    """Every unit of the network in order. The shapes come from a run on meta tensors, which costs nothing."""
    net, size = create(model), image_size(model)
    shadow = copy.deepcopy(net).to("meta")
    heights: list[int] = []
    for module in shadow.modules():
        if isinstance(module, _PreActUnit):
            module.fused = False
            module.register_forward_pre_hook(lambda _, args: heights.append(args[0].shape[2]))
    shadow(torch.empty(2, 3, size, size, device="meta"))
    units = [m for m in net.modules() if isinstance(m, _PreActUnit)]
    return [UnitCase(unit, h) for unit, h in zip(units, heights, strict=True)]


def distinct_units(cases: list[UnitCase]) -> list[tuple[UnitCase, int]]:
    """The units that differ, each with how often it stands in the network."""
    counted: dict[str, tuple[UnitCase, int]] = {}
    for case in cases:
        first, count = counted.get(case.name, (case, 0))
        counted[case.name] = first, count + 1
    return list(counted.values())


def distinct_sites(cases: list[UnitCase]) -> list[tuple[SiteCase, int]]:
    """The sites that differ, projections among them, each with how often it stands in the network."""
    counted: dict[SiteCase, int] = {}
    for case in cases:
        for site in [*case.sites, *([case.projection] if case.projection else [])]:
            counted[site] = counted.get(site, 0) + 1
    return list(counted.items())


class BareConv(NamedTuple):
    """A convolution alone: the library's, on inputs that somebody else activated."""

    c: int
    k: int
    h: int
    kernel: int
    stride: int
    needs_dx: bool = True

    @property
    def padding(self) -> int:
        """Keeps the size at stride 1."""
        return self.kernel // 2


def bare_convs(sites: list[SiteCase]) -> list[BareConv]:
    """The convolutions of the given sites."""
    return [BareConv(s.c, s.k, s.h, s.kernel, s.stride) for s in sites]


@functools.cache
def network_convs(model: str) -> list[BareConv]:
    """All convolutions of the network: the stem's, the units', the projections'."""
    net = create(model)
    stem: Any = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    first = BareConv(
        stem.in_channels,
        stem.out_channels,
        image_size(model),
        stem.kernel_size[0],
        stem.stride[0],
        needs_dx=False,
    )
    sites = []
    for case in unit_cases(model):
        sites += case.sites
        # Zero padding (shortcut A) needs no convolution; its 1x1 form is ours alone.
        if case.projection and not isinstance(case.unit.shortcut, IdentityProjection):
            sites.append(case.projection)
    return [first, *bare_convs(sites)]


def bare_candidate(
    name: str,
    convs: list[BareConv],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    copies: int = 1,
    *,
    backward: bool = True,
) -> Candidate:
    """The convolutions one after the other, library only: no BN, no ReLU, no addition, nothing kept.

    The floor without fusion. Equal shapes share their tensors: every call reads them from memory again, since one
    pass over all the others lies between (a single convolution rotates through ``copies``).
    """
    tensors: dict[BareConv, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for conv in convs:
        if conv in tensors:
            continue
        x = torch.randn(batch, conv.c, conv.h, conv.h, dtype=dtype, device=device)
        weight = torch.randn(conv.k, conv.c, conv.kernel, conv.kernel, dtype=dtype, device=device) * 0.05
        x, weight = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, weight))
        dy = torch.randn_like(F.conv2d(x, weight, None, conv.stride, conv.padding))
        copied = [(x.clone(), weight.clone(), dy.clone()) for _ in range(copies - 1)]
        tensors[conv] = [(x, weight, dy), *copied]

    @torch.no_grad()
    def run_forward(i: int) -> None:
        for conv in convs:
            x, weight, _ = tensors[conv][i % copies]
            F.conv2d(x, weight, None, conv.stride, conv.padding)

    @torch.no_grad()
    def run_backward(i: int, _: None) -> None:
        for conv in convs:
            x, weight, dy = tensors[conv][i % copies]
            torch.ops.aten.convolution_backward(
                dy,
                x,
                weight,
                None,
                [conv.stride] * 2,
                [conv.padding] * 2,
                [1, 1],
                False,
                [0, 0],
                1,
                [conv.needs_dx, True, False],
            )

    return Candidate(name, run_forward, run_backward if backward else None)
