"""What a rewritten graph calls: a chain of sites, and the head, over the functions of :mod:`fused_preact.functional`.

Statistics travel as an attribute of the tensor that they describe, with its version: whoever reads another tensor, or
one that was written to, computes its own. The modules of :mod:`fused_preact.modules` hand theirs on as arguments
instead: Dynamo cannot trace a tensor's version, so what is attached is not read under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import composite, functional
from ..arguments import BatchNorm, Convolution, Statistics

__all__ = ["ChainCall", "ConvSource", "HeadCall", "NormSource"]


Given = Tensor | nn.Module | None
"""What a graph hands to a fused call beside x: modules, read from the model at each call, and tensors."""


class NormSource(NamedTuple):
    """Where a BN's arguments are among what is given: from ``at`` on, its module or its four tensors."""

    at: int
    constants: tuple[bool, float, float] | None
    """Training, momentum and eps of the function; None for a module."""
    relu: bool
    """Whether a ReLU follows."""

    def of(self, given: tuple[Given, ...]) -> BatchNorm:
        if self.constants is None:
            return BatchNorm.of(given[self.at], self.relu)  # type: ignore[arg-type]
        mean, var, weight, bias = given[self.at : self.at + 4]
        training, momentum, eps = self.constants
        return BatchNorm(weight, bias, mean, var, None, training, momentum, eps, None, self.relu)  # type: ignore[arg-type]


class ConvSource(NamedTuple):
    """Where a convolution's arguments are: its module, or its weight and bias; ``pad`` zeros come on top."""

    at: int | None
    """None: it has the identity for a weight."""
    constants: tuple[Any, ...] | None
    """Stride, padding, dilation and groups of the function; None for a module."""
    pad: tuple[int, int]

    def of(self, given: tuple[Given, ...], x: Tensor | None = None) -> Convolution:
        """``x``: what is convolved, read for its number of channels and its dtype where there is no weight."""
        conv: Convolution
        if self.at is None:
            assert x is not None
            assert self.constants is not None
            conv = Convolution(_identity(x.shape[1], x), None, *self.constants)
        elif self.constants is None:
            conv = Convolution.of(given[self.at])  # type: ignore[arg-type]
        else:
            conv = Convolution(given[self.at], given[self.at + 1], *self.constants)  # type: ignore[arg-type]
        if self.pad == (0, 0):
            return conv
        rows, columns = (conv.padding,) * 2 if isinstance(conv.padding, int) else conv.padding
        return conv._replace(padding=(rows + self.pad[0], columns + self.pad[1]))


class UnitCall(NamedTuple):
    """A chain's BNs, convolutions and projection; ``activation``: the latter passes the activation on."""

    sites: list[tuple[BatchNorm, Convolution]]
    projection: Convolution | None
    activation: bool


class ChainCall(NamedTuple):
    """A chain of sites with its shortcut: called with x, the residual (or None) and what the sources name."""

    sites: tuple[tuple[NormSource, ConvSource], ...]
    shortcut: str | None
    projection: ConvSource | None
    shared: bool
    """Whether other chains read the activation of the first site too."""
    first: bool
    """Whether this one of them comes first: it updates the first BN's running statistics."""
    last: bool
    hands_on: bool
    """Whether a BN may read the output."""

    def unit(self, given: tuple[Given, ...], x: Tensor | None = None) -> UnitCall:
        """What the chain computes with, of ``x``."""
        sites = [(norm.of(given), conv.of(given, x)) for norm, conv in self.sites]
        projection = None if self.projection is None else self.projection.of(given)
        if self.shortcut == "activation":
            projection = Convolution(
                _identity(sites[0][1].weight.shape[1] * sites[0][1].groups, sites[0][1].weight)
            )
        return UnitCall(sites, projection, self.shortcut == "activation")

    def __call__(self, x: Tensor, residual: Tensor | None, *given: Given) -> Tensor:
        sites, projection, _ = self.unit(given, x)
        first = sites[0][0]
        statistics = _statistics(x) if first.batch_stats else None
        if self.shared and first.batch_stats:
            statistics = statistics or _computed(x)
            if self.last:
                _detach(x)
            if not self.first:
                first = first._replace(running_mean=None, running_var=None, num_batches_tracked=None)
                sites[0] = first, sites[0][1]
        subsampling = self.sites[0][1]
        if subsampling.at is None and functional._autocasting(x) and x.dtype == torch.float32:
            rows, columns = subsampling.constants[0]  # type: ignore[index]
            return composite.activated(x, sites[0][0])[:, :, ::rows, ::columns]  # no convolution, so not cast
        identity = self.shortcut == "identity"
        added = x if identity else residual
        if added is not None and functional._autocasting(x) and added.dtype == torch.float32:
            return composite.unit(x, sites, projection, identity, residual)  # the sum of both is float32
        wanted = self.hands_on and any(bn.training for bn, _ in sites)
        try:
            y, made = functional._unit(x, sites, projection, identity, residual, statistics, wanted)
        except (TypeError, ValueError):
            # Not what the fused call takes (a sum that broadcasts, two dtypes): PyTorch's own operations say what is
            # right, or what is wrong.
            return composite.unit(x, sites, projection, identity, residual)
        if made is not None:
            _attach(y, made)
        return y


class HeadCall(NamedTuple):
    """BN -> ReLU -> global average pool; ``window``: pooling over a window, whose stride is ``stride``."""

    norm: NormSource
    keepdim: bool
    window: tuple[int, int] | None
    stride: Any

    def __call__(self, x: Tensor, *given: Given) -> Tensor:
        bn = self.norm.of(given)
        if x.dim() != 4 or (self.window is not None and tuple(x.shape[2:]) != self.window):
            activated = composite.activated(x, bn)
            if self.window is not None:
                return F.avg_pool2d(activated, self.window, self.stride)
            return activated.mean((-2, -1), self.keepdim)
        try:
            y = functional.bn_relu_avg_pool2d(x, bn, _statistics(x) if bn.batch_stats else None)
        except (TypeError, ValueError):
            y = composite.bn_relu_avg_pool(x, bn)
        return y[:, :, None, None] if self.keepdim else y


# --- statistics -----------------------------------------------------------------------------------------------

_ATTRIBUTE = "_fused_preact_statistics"


def _attach(y: Tensor, statistics: Statistics) -> None:
    if not (torch.compiler.is_dynamo_compiling() or y.is_inference()):
        # As plain tuples, which torch.load takes where it takes tensors.
        setattr(y, _ATTRIBUTE, (y._version, tuple(statistics)))


def _detach(x: Tensor) -> None:
    """Forget them: ``x`` may be the caller's, who may write to it by ways that PyTorch does not count."""
    if not torch.compiler.is_dynamo_compiling():
        x.__dict__.pop(_ATTRIBUTE, None)


def _statistics(x: Tensor) -> Statistics | None:
    """The statistics that came with ``x`` and still are its own."""
    if torch.compiler.is_dynamo_compiling() or x.is_inference():
        return None
    version, statistics = getattr(x, _ATTRIBUTE, (None, None))
    if version != x._version or (functional._autocasting(x) and x.dtype == torch.float32):
        return None
    return None if statistics is None else Statistics(*statistics)


def _computed(x: Tensor) -> Statistics | None:
    """The statistics of ``x``, once for several readers of its activation."""
    if type(x) is not Tensor or functional._autocasting(x) or functional.transforming():
        return None
    with torch.no_grad():
        table = functional.ops.table(functional.ops.requested_backend(), x)
        found = Statistics(*table.bn_stats(functional.to_native_format(x)))
    _attach(x, found)
    return found


def _identity(channels: int, like: Tensor) -> Tensor:
    """The 1x1 convolution that passes a tensor on, as a weight for inputs ``like`` this one."""
    return torch.eye(channels, dtype=like.dtype, device=like.device)[:, :, None, None]


Fused = Callable[..., Tensor]


def function_of(call: ChainCall | HeadCall) -> Fused:
    """``call`` as a function, which is what FX puts into code."""
    if isinstance(call, ChainCall):

        def fused_preact_chain(x: Tensor, residual: Tensor | None, *given: Given) -> Tensor:
            return call(x, residual, *given)

        fused_preact_chain.call = call  # type: ignore[attr-defined]
        return fused_preact_chain

    def fused_preact_head(x: Tensor, *given: Given) -> Tensor:
        return call(x, *given)

    return fused_preact_head
