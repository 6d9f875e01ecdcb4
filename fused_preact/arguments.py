"""What a fused call is given: BN, convolution and statistics as tuples, and the checks of them.

Errors are ValueError (shape, value) and TypeError (dtype, type), each naming the argument, what came and what is
allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import even_padding
from .collective import Group, group_of
from .reference import conv_output_size, statistics_dtype
from .schedule import Conv, Site, Unit, values_per_channel

__all__ = [
    "BatchNorm",
    "ConvKind",
    "Convolution",
    "NormKind",
    "Statistics",
    "check_head",
    "check_unit",
    "checked",
    "kind",
    "values_per_channel",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Statistics(NamedTuple):
    """Per-channel statistics of one tensor, handed on with it: mean and biased variance, each [C]."""

    mean: Tensor
    var: Tensor


class BatchNorm(NamedTuple):
    """The arguments of ``torch.nn.functional.batch_norm`` for one site; see :meth:`of`."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: Group | None = None
    """Over whose values statistics of the batch are taken: this process' alone, or those of a process group."""
    relu: bool = True
    """Whether a ReLU follows in front of the convolution. The one field that ``batch_norm`` does not know."""

    @classmethod
    def of(cls, module: nn.modules.batchnorm._BatchNorm, relu: bool = True) -> BatchNorm:
        """The arguments that ``module`` would normalise with in its present mode, with a ReLU behind it or without.

        It is an ``nn.BatchNorm2d``, or an ``nn.SyncBatchNorm`` (which may have a group to share with).
        As in PyTorch, a module in eval mode without running statistics uses those of the batch, and a module
        in training mode with ``track_running_stats=False`` (whenever that was set) updates nothing. A cumulative
        average (``momentum=None``) without a counter stays where it is.
        """
        parameters, buffers = module._parameters, module._buffers
        counter, momentum = _held(module, buffers, "num_batches_tracked"), module.momentum
        mean, var = _held(module, buffers, "running_mean"), _held(module, buffers, "running_var")
        if module.training and not module.track_running_stats:
            mean = var = counter = None
        if momentum is None and counter is None:
            momentum = 0.0
        return cls(
            _held(module, parameters, "weight"),
            _held(module, parameters, "bias"),
            mean,
            var,
            counter,
            module.training,
            momentum,
            module.eps,
            group_of(module) if isinstance(module, nn.SyncBatchNorm) else None,
            relu,
        )

    @property
    def batch_stats(self) -> bool:
        """Whether the batch's own statistics normalise: in training, or where no running ones exist."""
        return self.training or self.running_mean is None or self.running_var is None


class Convolution(NamedTuple):
    """The arguments of ``torch.nn.functional.conv2d`` for one site; see :meth:`of`."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Conv2d) -> Convolution:
        """The arguments of ``module``; raises ValueError for a padding that is not zeros."""
        if module.padding_mode != "zeros":
            raise ValueError(f"padding_mode: got {module.padding_mode!r}, allowed is 'zeros'")
        padding = module.padding
        if isinstance(padding, str):
            padding = _named_padding(padding, module)
        parameters = module._parameters
        weight, bias = _held(module, parameters, "weight"), _held(module, parameters, "bias")
        return cls(weight, bias, module.stride, padding, module.dilation, module.groups)


_PLAIN = nn.BatchNorm2d, nn.Conv2d, nn.SyncBatchNorm


def _held(module: nn.Module, held: dict[str, Any], name: str) -> Any:
    """``getattr(module, name)`` for a parameter or buffer, by the short way where that finds the same.

    ``nn.Module`` looks into ``held`` last: after what a class (a parametrisation's property) or the instance may
    have under the name.
    """
    if name in held and name not in module.__dict__ and type(module) in _PLAIN:
        return held[name]
    return getattr(module, name)


def _named_padding(name: str, module: nn.Conv2d) -> tuple[int, int]:
    if name == "valid":
        return 0, 0
    if not even_padding(module):
        raise ValueError(
            f"padding: got 'same' with kernel_size {module.kernel_size} and dilation {module.dilation}, "
            "allowed is a padding that is the same on both sides"
        )
    height, width = (d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return height, width


# --- checks -----------------------------------------------------------------------------------------------

# The checks read shapes, dtypes, devices and constants only, so what passed once need not be checked again: a step of
# ResNet-1001 would check a thousand sites that it checked in the step before.

Kind = tuple[torch.Size, torch.dtype, torch.device]
"""What is checked of a tensor."""


def kind(t: Tensor) -> Kind:
    return t.shape, t.dtype, t.device


class NormKind(NamedTuple):
    """What is checked of a :class:`BatchNorm`."""

    weight: Kind | None
    bias: Kind | None
    running_mean: Kind | None
    running_var: Kind | None
    counted: bool
    training: bool
    cumulative: bool
    eps: float
    group: Group | None
    relu: bool

    @classmethod
    def of(cls, bn: BatchNorm) -> NormKind:
        weight, bias, mean, var, counter, training, momentum, eps, group, relu = bn
        return cls(
            None if weight is None else (weight.shape, weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            None if mean is None else (mean.shape, mean.dtype, mean.device),
            None if var is None else (var.shape, var.dtype, var.device),
            counter is not None,
            training,
            momentum is None,
            eps,
            group,
            relu,
        )


Pair = int | tuple[int, ...]


class ConvKind(NamedTuple):
    """What is checked of a :class:`Convolution`."""

    weight: Kind
    bias: Kind | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, conv: Convolution) -> ConvKind:
        weight, bias, stride, padding, dilation, groups = conv
        return cls(
            (weight.shape, weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            stride if isinstance(stride, int) else tuple(stride),
            padding if isinstance(padding, int) else tuple(padding),
            dilation if isinstance(dilation, int) else tuple(dilation),
            groups,
        )


class _Plan(NamedTuple):
    """What the checks found."""

    unit: Unit
    counts: tuple[int, ...]
    """Values per channel of each site's input."""
    memo: dict[Any, Any] | None
    """For :func:`ops.run`: what a backend remembers of units of these shapes and dtypes; nothing of those that call
    other processes."""


def checked(check: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``check`` of the kind of ``x`` and ``args``, remembered.

    Not while tracing, nor of a subclass: sizes may be symbols there.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return check(kind(x), *args)
    return _remembered(check, kind(x), *args)


@functools.lru_cache(maxsize=8192)
def _remembered(check: Callable[..., Any], *args: Any) -> Any:
    return check(*args)


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}: got {value!r}, allowed is an integer or two, each at least {least}")
    return pair[0], pair[1]


def _check_input(x: Kind) -> None:
    shape, dtype, _ = x
    if len(shape) != 4:
        raise ValueError(f"input: got shape {tuple(shape)}, allowed is four dimensions, [N,C,H,W]")
    if dtype not in _DTYPES:
        raise TypeError(f"input: got dtype {dtype}, allowed are {', '.join(map(str, _DTYPES))}")


def _check_same_kind(name: str, tensor: Kind, x: Kind, also: torch.dtype | None = None) -> None:
    """Same device as the input, and its dtype (or the other one allowed)."""
    _, dtype, device = tensor
    if device != x[2]:
        raise ValueError(f"{name}: got device {device}, allowed is that of input, {x[2]}")
    if dtype not in (x[1], also):
        allowed = f"{x[1]} as input has" + ("" if also in (None, x[1]) else f", or {also}")
        raise TypeError(f"{name}: got dtype {dtype}, allowed is {allowed}")


def _check_added(name: str, shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    if tuple(shape) != out_shape:
        raise ValueError(f"{name}: got shape {tuple(shape)}, allowed is the output's, {out_shape}")


def _check_batch_norm(x: Kind, bn: NormKind, prefix: str, shape: tuple[int, ...]) -> None:
    wide, expected = statistics_dtype(x[1]), (shape[1],)
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    for field, tensor in zip(NormKind._fields, tensors, strict=False):
        if tensor is None:
            continue
        # preact_conv2d has one argument list for both: there the BN's weight is called bn_weight.
        name = f"{prefix}{field}" if prefix or field.startswith("running") else f"bn_{field}"
        _check_same_kind(name, tensor, x, also=wide)
        if tuple(tensor[0]) != expected:
            raise ValueError(
                f"{name}: got shape {tuple(tensor[0])}, allowed is ({shape[1]},), "
                "one value per channel of its input"
            )
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(
            f"{prefix}running_mean, {prefix}running_var: got one of them, allowed are both or neither"
        )
    if bn.training and bn.cumulative and bn.running_mean is not None and not bn.counted:
        raise ValueError(
            f"{prefix}num_batches_tracked: got None with momentum=None, allowed there is the counter tensor "
            "that the cumulative average divides by"
        )
    if bn.group is not None and not bn.training:
        raise ValueError(
            f"{prefix}group: got {bn.group!r} with training=False, allowed there is None: only training synchronises"
        )
    if bn.group is None and (bn.training or bn.running_mean is None) and values_per_channel(shape) == 1:
        # PyTorch's own words, so that code which catches them goes on working.
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def _check_convolution(
    x: Kind, shape: tuple[int, ...], conv: ConvKind, prefix: str
) -> tuple[Conv, tuple[int, ...]]:
    """The convolution's constants and the shape of its output."""
    _check_same_kind(f"{prefix}weight", conv.weight, x)
    weight = tuple(conv.weight[0])
    if len(weight) != 4:
        raise ValueError(f"{prefix}weight: got shape {weight}, allowed is four dimensions, [K,C/groups,R,S]")
    out_channels, in_channels = weight[:2]
    if conv.groups < 1 or out_channels % conv.groups or in_channels * conv.groups != shape[1]:
        raise ValueError(
            f"{prefix}weight: got shape {weight} with groups {conv.groups}, allowed is "
            f"[K,{shape[1]}/groups,R,S] with K a multiple of groups, for an input of {shape[1]} channels"
        )
    if conv.bias is not None:
        _check_same_kind(f"{prefix}bias", conv.bias, x)
        if tuple(conv.bias[0]) != (out_channels,):
            raise ValueError(f"{prefix}bias: got shape {tuple(conv.bias[0])}, allowed is ({out_channels},)")
    spec = Conv(
        _pair(f"{prefix}stride", conv.stride, 1),
        _pair(f"{prefix}padding", conv.padding, 0),
        _pair(f"{prefix}dilation", conv.dilation, 1),
        conv.groups,
    )
    size = conv_output_size(shape[2:], weight[2:], spec.stride, spec.padding, spec.dilation)
    if min(size) < 1:
        raise ValueError(
            f"input: got height and width {tuple(shape[2:])}, allowed are sizes of which the convolution leaves "
            f"at least 1x1 (kernel {weight[2:]}, padding {spec.padding}, dilation {spec.dilation})"
        )
    return spec, (shape[0], out_channels, *size)


def check_unit(
    x: Kind,
    sites: tuple[tuple[NormKind, ConvKind], ...],
    projection: ConvKind | None,
    identity: bool,
    residual: Kind | None,
    return_statistics: bool,
) -> _Plan:
    """Everything that the unit's arguments must be, and its constants."""
    _check_input(x)
    named = identity or projection is not None or len(sites) > 1
    constants, counts = [], []
    shape = tuple(x[0])
    for index, (bn, conv) in enumerate(sites):
        prefix = f"sites[{index}]." if named else ""
        _check_batch_norm(x, bn, prefix and f"{prefix}bn.", shape)
        counts.append(values_per_channel(shape))
        spec, shape = _check_convolution(x, shape, conv, prefix and f"{prefix}conv.")
        batch_stats = bn.training or bn.running_mean is None
        constants.append(Site(spec, bn.eps, batch_stats, bn.group, bn.relu))
    projection_spec = None
    if projection is not None:
        projection_spec, projected = _check_convolution(x, tuple(x[0]), projection, "projection.")
        _check_added("projection's output", projected, shape)
    if identity:
        _check_added("input (the identity shortcut)", x[0], shape)
    if residual is not None:
        _check_same_kind("residual", residual, x)
        _check_added("residual", residual[0], shape)
    unit = Unit(tuple(constants), projection_spec, identity, return_statistics)
    return _Plan(unit, tuple(counts), None if any(site.group for site in constants) else {})


def check_convolution(x: Kind, conv: ConvKind) -> Conv:
    """The constants of a convolution without a BN before it."""
    _check_input(x)
    return _check_convolution(x, tuple(x[0]), conv, "")[0]


def check_head(x: Kind, bn: NormKind) -> None:
    if not bn.relu:
        raise ValueError("bn.relu: got False, allowed in front of the pooling is True")
    _check_input(x)
    _check_batch_norm(x, bn, "bn.", tuple(x[0]))
