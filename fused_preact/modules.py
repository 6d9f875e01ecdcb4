"""Drop-in modules: plain ``nn.BatchNorm2d`` and ``nn.Conv2d`` children, read in one fused call.

The children own the parameters and buffers, so state dicts, weight-decay filters, per-BN eps and momentum,
``requires_grad`` and ``.to()`` work as in any model. ``fused=False`` (or setting ``module.fused = False``) runs
the same children one by one: that is the plain model, with the same state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import composite
from .calls import has_hooks, observed, recomputing, runs, runs_batch_norm, runs_convolution
from .functional import BatchNorm, Convolution, Statistics, preact_site, residual_unit

__all__ = [
    "IdentityProjection",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActConv2d",
    "PreActSequential",
    "PreActSingleBlock",
    "Stem",
    "Unit",
]


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int, dilation: int = 1, **kwargs: Any
) -> nn.Conv2d:
    """A convolution without bias whose padding keeps the size at stride 1."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False, **kwargs)


def _child(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, by the short way where it is a child."""
    child = module._modules.get(name)
    return getattr(module, name) if child is None else child


def activated(bn: nn.Module, x: Tensor, relu: bool = True) -> Tensor:
    """``relu(bn(x))`` or ``bn(x)``, whose running statistics checkpointing updates once, as those of fused calls."""
    if recomputing() and bn.training and runs_batch_norm(bn):
        return composite.activated(x, BatchNorm.of(bn, relu))  # type: ignore[arg-type]
    z: Tensor = bn(x)
    return F.relu(z) if relu else z


Folded = Callable[[Tensor], Tensor | None]
"""What :mod:`fused_preact.inference` hangs on a unit or a sequence of them: runs it with folded weights, or returns
None where the modules have to run."""


class Stem(nn.Sequential):
    """What comes before the first unit: a convolution, and max-pooling or nothing. [N,C,H,W] -> [N,K,H',W']."""

    _folded: Folded | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self._folded is not None and not torch.compiler.is_compiling():
            output = self._folded(input)
            if output is not None:
                return output
        return super().forward(input)


class PreActConv2d(nn.Module):
    """``conv(relu(bn(x))) [+ residual]``: one pre-activation site with children ``bn`` and ``conv``.

    Takes the arguments of ``nn.Conv2d`` and, by keyword, ``eps``, ``momentum``, ``affine`` and
    ``track_running_stats`` of ``nn.BatchNorm2d``; with ``relu=False`` it is ``conv(bn(x)) [+ residual]``.
    [N,C,H,W] -> [N,K,OH,OW], in the memory format of the input; dtypes and errors as in
    :func:`fused_preact.functional.preact_conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        relu: bool = True,
        fused: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm2d(in_channels, eps, momentum, affine, track_running_stats, **factory)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **factory
        )
        self.relu = relu
        self.fused = fused

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        bn, conv = _child(self, "bn"), _child(self, "conv")
        if not self.fused or observed(input) or not (runs_batch_norm(bn) and runs_convolution(conv)):
            y = self.conv(activated(self.bn, input, self.relu))
            return y if residual is None else y + residual
        return preact_site(input, BatchNorm.of(bn, self.relu), Convolution.of(conv), residual)


class IdentityProjection(nn.Module):
    """The parameter-free shortcut of the paper's option A, as a 1x1 convolution with a constant weight.

    Subsamples by ``stride`` and appends zero channels. With equal widths and stride 1 it is the identity, but of
    the *activated* tensor: the first unit of a network shares its activation between both paths (He et al.
    2016, appendix). The weight is a buffer outside the state dict.
    """

    weight: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels: got {out_channels}, allowed are {in_channels} (in_channels) or more"
            )
        weight = torch.eye(out_channels, in_channels, device=device, dtype=dtype)
        self.register_buffer("weight", weight[:, :, None, None], persistent=False)
        self.stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), stride=self.stride)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, stride={self.stride}"


_PROJECT = IdentityProjection.forward


def is_identity_projection(module: nn.Module) -> bool:
    """Whether ``module`` is an :class:`IdentityProjection` and nothing that somebody made of it."""
    return type(module) is IdentityProjection and runs(module, _PROJECT)


def _shortcut(
    kind: str | None, in_channels: int, out_channels: int, stride: int, factory: dict[str, Any]
) -> nn.Module | None:
    """The shortcut of a unit: None (identity), "A" (zero padding) or "B" (1x1 projection)."""
    if kind == "auto":
        kind = None if stride == 1 and in_channels == out_channels else "B"
    if kind is None:
        if stride != 1 or in_channels != out_channels:
            raise ValueError(
                f"shortcut: got None (identity) for {in_channels} -> {out_channels} channels at stride {stride}, "
                "allowed there are 'A' (zero padding) and 'B' (projection)"
            )
        return None
    if kind == "A":
        return IdentityProjection(in_channels, out_channels, stride, **factory)
    if kind == "B":
        return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **factory)
    raise ValueError(f"shortcut: got {kind!r}, allowed are None, 'A', 'B' and 'auto'")


class Unit(nn.Module):
    """A residual unit: may take the statistics of its input and hand on those of its output."""

    def forward(self, input: Tensor) -> Tensor:
        return self.forward_with_statistics(input, None, False)[0]

    def forward_with_statistics(
        self, input: Tensor, statistics: Statistics | None, return_statistics: bool = True
    ) -> tuple[Tensor, Statistics | None]:
        """Forward that takes the statistics of its input and hands on those of its output.

        Statistics are None where there are none to take or none wanted; they are then computed by the next
        reader of the tensor.
        """
        raise NotImplementedError


class _PreActUnit(Unit):
    """What the three units below share; a subclass adds its sites, their names and ``shortcut``."""

    shortcut: nn.Module | None
    _names: tuple[tuple[str, str], ...]
    _folded: Folded | None = None

    def sites(self) -> Iterator[tuple[nn.BatchNorm2d, nn.Conv2d]]:
        """The unit's (bn, conv) pairs, in order."""
        for bn, conv in self._names:
            yield _child(self, bn), _child(self, conv)

    def forward_with_statistics(
        self, input: Tensor, statistics: Statistics | None, return_statistics: bool = True
    ) -> tuple[Tensor, Statistics | None]:
        """As in :class:`Unit`."""
        if self._folded is not None and not torch.compiler.is_compiling():
            output = self._folded(input)
            if output is not None:
                return output, None
        sites = list(self.sites())
        shortcut: Any = self.shortcut
        if not self.fused or observed(input) or not self._may_fuse(sites, shortcut):
            return self._plain(input), None
        projection = None
        if isinstance(shortcut, nn.Conv2d):
            projection = Convolution.of(shortcut)
        elif shortcut is not None:
            weight = shortcut.weight.to(sites[0][1].weight.dtype)
            projection = Convolution(weight, stride=shortcut.stride)
        return residual_unit(
            input,
            [(BatchNorm.of(bn), Convolution.of(conv)) for bn, conv in sites],
            projection,
            statistics=statistics,
            return_statistics=return_statistics,
        )

    def _may_fuse(self, sites: list[tuple[nn.BatchNorm2d, nn.Conv2d]], shortcut: nn.Module | None) -> bool:
        """Whether a fused call computes what the children do, and nobody listens to them."""
        for bn, conv in sites:
            if not (runs_batch_norm(bn) and runs_convolution(conv)):
                return False
        return (
            shortcut is None
            or runs_convolution(shortcut)
            or (is_identity_projection(shortcut) and not has_hooks(shortcut))
        )

    def _plain(self, input: Tensor) -> Tensor:
        """The definition, child by child."""
        pairs = iter(self.sites())
        bn, conv = next(pairs)
        a = activated(bn, input)
        y = conv(a)
        for bn, conv in pairs:
            y = conv(activated(bn, y))
        return y + (input if self.shortcut is None else self.shortcut(a))


class PreActSingleBlock(_PreActUnit):
    """Pre-activation unit of one 3x3 convolution, of the paper's ResNet-110 (1-layer): children bn1, conv1.

    Otherwise as :class:`PreActBasicBlock`.
    """

    expansion = 1
    _names = (("bn1", "conv1"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        shortcut: str | None = "auto",
        fused: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **factory)
        self.conv1 = _conv(in_channels, out_channels, 3, stride, dilation, **factory)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride, factory)
        self.fused = fused


class PreActBasicBlock(_PreActUnit):
    """Pre-activation unit of two 3x3 convolutions (He et al. 2016, figure 4e): children bn1, conv1, bn2, conv2.

    [N,in_channels,H,W] -> [N,out_channels,H/stride,W/stride]. ``shortcut`` is "auto" (identity where the shapes
    allow it, else "B"), None (identity of the raw input), "A" (zero padding) or "B" (1x1 projection); A and B
    read the activated input. Dtypes and errors as in :func:`fused_preact.functional.residual_unit`.
    """

    expansion = 1
    _names = (("bn1", "conv1"), ("bn2", "conv2"))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        shortcut: str | None = "auto",
        fused: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **factory)
        self.conv1 = _conv(in_channels, out_channels, 3, stride, dilation, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, **factory)
        self.conv2 = _conv(out_channels, out_channels, 3, 1, dilation, **factory)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride, factory)
        self.fused = fused


class PreActBottleneck(_PreActUnit):
    """Pre-activation bottleneck, 1x1 -> 3x3 -> 1x1: children bn1, conv1, bn2, conv2, bn3, conv3.

    The inner width is ``out_channels // 4``. The stride is on the 3x3, or with ``stride_on_1x1`` on the first 1x1
    as in the paper's CIFAR code. Otherwise as :class:`PreActBasicBlock`.
    """

    expansion = 4
    _names = (("bn1", "conv1"), ("bn2", "conv2"), ("bn3", "conv3"))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        shortcut: str | None = "auto",
        stride_on_1x1: bool = False,
        fused: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        if out_channels % self.expansion:
            raise ValueError(f"out_channels: got {out_channels}, allowed are multiples of {self.expansion}")
        width = out_channels // self.expansion
        first, second = (stride, 1) if stride_on_1x1 else (1, stride)
        self.bn1 = nn.BatchNorm2d(in_channels, **factory)
        self.conv1 = _conv(in_channels, width, 1, first, **factory)
        self.bn2 = nn.BatchNorm2d(width, **factory)
        self.conv2 = _conv(width, width, 3, second, dilation, **factory)
        self.bn3 = nn.BatchNorm2d(width, **factory)
        self.conv3 = _conv(width, out_channels, 1, 1, **factory)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride, factory)
        self.fused = fused


class PreActSequential(nn.Sequential):
    """Units in a row, each handing the statistics of its output to the next.

    By arguments and results, where converted models attach them to the tensor (:mod:`.convert.runtime`): a block of
    somebody else's returns its tensor and nothing more, and ``torch.compile``, which cannot trace the comparison of
    a tensor's version, follows ours.

    A module whose call is not just the forward of our units or of this class (a subclass with its own, hooks)
    takes and returns the tensor alone; whoever reads its output next computes the statistics again.
    """

    _folded: Folded | None = None

    def forward(self, input: Tensor) -> Tensor:
        return self.forward_with_statistics(input, None, False)[0]

    def forward_with_statistics(
        self, input: Tensor, statistics: Statistics | None = None, return_statistics: bool = True
    ) -> tuple[Tensor, Statistics | None]:
        """Forward that takes the statistics of its input and hands on those of its output, None where unknown."""
        if self._folded is not None and not torch.compiler.is_compiling():
            output = self._folded(input)
            if output is not None:
                return output, None
        x, modules = input, list(self)
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            # A reader that normalises with running statistics has no use for the batch's.
            wanted = return_statistics if following is None else following.training
            x, statistics = call_with_statistics(module, x, statistics, wanted)
        return x, statistics


# As they are now: somebody may put others there.
_UNIT, _SEQUENCE = Unit.forward, PreActSequential.forward


def takes_statistics(module: nn.Module) -> bool:
    """Whether calling ``module`` runs a forward of this file that hands statistics on, hooks apart."""
    if isinstance(module, Unit):
        return runs(module, _UNIT)
    return isinstance(module, PreActSequential) and runs(module, _SEQUENCE)


def call_with_statistics(
    module: nn.Module, x: Tensor, statistics: Statistics | None, return_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    """``module(x)``, and statistics to it and from it where its call is nothing but the forward that takes them."""
    if takes_statistics(module) and not has_hooks(module) and not observed(x):
        return module.forward_with_statistics(x, statistics, return_statistics)  # type: ignore[operator]
    return module(x), None
