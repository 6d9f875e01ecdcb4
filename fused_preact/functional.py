"""The public functions: argument checks, autocast, memory format; then the autograd Functions.

Errors are ValueError (shape, value), TypeError (dtype, type) and RuntimeError (backend), each naming the
argument, what came and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .autograd import HeadFunction, UnitFunction
from .reference import conv_output_size, memory_format_of, statistics_dtype
from .schedule import Conv, Site, Unit

__all__ = [
    "BatchNorm",
    "Convolution",
    "Statistics",
    "bn_relu_avg_pool2d",
    "preact_conv2d",
    "residual_unit",
    "to_native_format",
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

    @classmethod
    def of(cls, module: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
        """The arguments that ``module`` (an ``nn.BatchNorm2d``) would normalise with in its present mode.

        As in PyTorch, a module in eval mode without running statistics uses those of the batch, and a module
        in training mode with ``track_running_stats=False`` updates nothing.
        """
        return cls(
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            module.num_batches_tracked,
            module.training,
            module.momentum,
            module.eps,
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
        return cls(module.weight, module.bias, module.stride, padding, module.dilation, module.groups)


def _named_padding(name: str, module: nn.Conv2d) -> tuple[int, int]:
    if name == "valid":
        return 0, 0
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        raise ValueError(
            f"padding: got 'same' with kernel_size {module.kernel_size} and dilation {module.dilation}, "
            "allowed is a padding that is the same on both sides"
        )
    return totals[0] // 2, totals[1] // 2


def preact_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """``conv2d(relu(batch_norm(input)), weight, bias) + residual`` without storing the activated tensor.

    ``input`` [N,C,H,W] in float32, bfloat16, float16 or float64; ``weight`` [K,C/groups,R,S] of the same dtype
    (under autocast both are cast); the BN parameters [C] of that dtype or float32; ``residual`` [N,K,OH,OW].
    Returns [N,K,OH,OW] in the memory format of ``input``. With ``training``, ``running_mean`` and
    ``running_var`` are updated in place, the latter with the unbiased variance; ``momentum=None`` is the
    cumulative average and needs ``num_batches_tracked``, which is counted up.

    ``statistics`` are the mean and biased variance of ``input`` where its producer has them; without them
    one more read of ``input`` computes them.

    Equations: He et al. 2016 (arXiv:1603.05027); :mod:`fused_preact.reference` has them. Raises ValueError
    for a wrong shape or value, TypeError for a dtype mix, RuntimeError for a backend that is not there.
    """
    bn = BatchNorm(
        bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
    )
    conv = Convolution(weight, bias, stride, padding, dilation, groups)
    y, _ = _unit(input, [(bn, conv)], None, False, residual, statistics, False)
    return y


def residual_unit(
    input: Tensor,
    sites: Sequence[tuple[BatchNorm, Convolution]],
    projection: Convolution | None = None,
    *,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """A whole pre-activation residual unit: ``x + F(x)``, or ``projection(relu(bn(x))) + F(x)``.

    F is the chain of ``sites``, each BN -> ReLU -> convolution. An identity shortcut adds the raw ``input``; a
    projection reads the first site's activation, as in the paper. ``input`` [N,C,H,W] -> [N,K,OH,OW].

    ``statistics`` are those of ``input``; with ``return_statistics`` the last epilogue reduces those of the
    output, for the next unit's ``statistics``; otherwise None is returned in their place. Running statistics
    of BNs in training mode are updated in place. Raises as :func:`preact_conv2d`.
    """
    if not sites:
        raise ValueError("sites: got none, allowed are one or more (BatchNorm, Convolution) pairs")
    return _unit(input, list(sites), projection, projection is None, None, statistics, return_statistics)


def bn_relu_avg_pool2d(input: Tensor, bn: BatchNorm, statistics: Statistics | None = None) -> Tensor:
    """The network's head: mean over H and W of ``relu(batch_norm(input))``, [N,C,H,W] -> [N,C].

    The activated map is never stored, forward or backward. Dtypes, ``statistics`` and errors as in
    :func:`preact_conv2d`.
    """
    _check_input(input)
    _check_batch_norm(input, bn, "bn.", tuple(input.shape))
    backend = ops.requested_backend()
    input = to_native_format(input)
    mean, var = _first_statistics(input, bn, statistics, backend)
    out = HeadFunction.apply(bn.eps, bn.batch_stats, backend, input, bn.weight, bn.bias, mean, var)
    _update_running_statistics(bn, mean, var, _values_per_channel(input), backend)
    return out


def _unit(
    x: Tensor,
    sites: list[tuple[BatchNorm, Convolution]],
    projection: Convolution | None,
    identity: bool,
    residual: Tensor | None,
    statistics: Statistics | None,
    return_statistics: bool,
) -> tuple[Tensor, Statistics | None]:
    _check_input(x)
    x, sites, projection, residual = _autocast(x, sites, projection, residual)
    specs, shapes = _check_sites(x, sites, named=identity or projection is not None)
    out_shape = shapes[-1]
    projection_spec = None
    if projection is not None:
        projection_spec, projected = _check_convolution(x, tuple(x.shape), projection, "projection.")
        _check_added("projection's output", projected, out_shape)
    if identity:
        _check_added("input (the identity shortcut)", tuple(x.shape), out_shape)
    if residual is not None:
        _check_same_kind("residual", residual, x)
        _check_added("residual", tuple(residual.shape), out_shape)

    backend = ops.requested_backend()
    outer_format = memory_format_of(x)
    x = to_native_format(x)
    first = _first_statistics(x, sites[0][0], statistics, backend)
    given: list[Tensor | None] = [*first]
    for bn, _ in sites[1:]:
        given += [None, None] if bn.batch_stats else [bn.running_mean, bn.running_var]
    unit = Unit(
        tuple(Site(spec, bn.eps, bn.batch_stats) for spec, (bn, _) in zip(specs, sites, strict=True)),
        projection_spec,
        identity,
        return_statistics,
    )
    parameters = [t for bn, conv in sites for t in (bn.weight, bn.bias, conv.weight, conv.bias)]
    shortcut = (None, None) if projection is None else (projection.weight, projection.bias)
    y, mean, var, *made = UnitFunction.apply(unit, backend, x, residual, *shortcut, *parameters, *given)

    _update_running_statistics(sites[0][0], *first, _values_per_channel(x), backend)
    for (bn, _), shape in zip(sites[1:], shapes, strict=False):
        if bn.batch_stats:
            _update_running_statistics(bn, made[0], made[1], shape[0] * shape[2] * shape[3], backend)
            made = made[2:]
    y = y.contiguous(memory_format=outer_format)
    return y, Statistics(mean, var) if return_statistics else None


# --- statistics -------------------------------------------------------------------------------------------


def _values_per_channel(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _first_statistics(
    x: Tensor, bn: BatchNorm, statistics: Statistics | None, backend: str
) -> tuple[Tensor, Tensor]:
    """What the BN that reads ``x`` normalises with."""
    if not bn.batch_stats:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        wide = statistics_dtype(x.dtype)
        return bn.running_mean.to(wide), bn.running_var.to(wide)
    if statistics is not None:
        for field, tensor in zip(Statistics._fields, statistics, strict=True):
            if tensor.shape != (x.shape[1],) or tensor.dtype != statistics_dtype(x.dtype):
                raise ValueError(
                    f"statistics.{field}: got shape {tuple(tensor.shape)} and dtype {tensor.dtype}, allowed are "
                    f"({x.shape[1]},) and {statistics_dtype(x.dtype)}"
                )
        return statistics
    with torch.no_grad():
        return ops.table(backend).bn_stats(x.detach())


def _update_running_statistics(bn: BatchNorm, mean: Tensor, var: Tensor, count: int, backend: str) -> None:
    """What ``nn.BatchNorm2d`` does to its buffers in training; nothing in eval mode or where there are none."""
    if not bn.training or bn.running_mean is None or bn.running_var is None:
        return
    with torch.no_grad():
        ops.table(backend).bn_update_running(
            mean, var, bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.momentum, count
        )


# --- autocast and memory format ---------------------------------------------------------------------------


def _autocast(
    x: Tensor,
    sites: list[tuple[BatchNorm, Convolution]],
    projection: Convolution | None,
    residual: Tensor | None,
) -> tuple[Tensor, list[tuple[BatchNorm, Convolution]], Convolution | None, Tensor | None]:
    """Cast what a convolution would cast under autocast; BN parameters and statistics stay float32."""
    device = x.device.type
    if (
        x.dtype == torch.float64
        or not torch.amp.is_autocast_available(device)
        or not torch.is_autocast_enabled(device)
    ):
        return x, sites, projection, residual
    dtype = torch.get_autocast_dtype(device)

    def cast(conv: Convolution) -> Convolution:
        bias = None if conv.bias is None else conv.bias.to(dtype)
        return conv._replace(weight=conv.weight.to(dtype), bias=bias)

    return (
        x.to(dtype),
        [(bn, cast(conv)) for bn, conv in sites],
        None if projection is None else cast(projection),
        None if residual is None else residual.to(dtype),
    )


def to_native_format(x: Tensor) -> Tensor:
    """``x`` in the memory format that its backend works in: channels_last for kernels, as it is for the reference.

    Every function here converts at its own boundary and back; a network that calls this once at its start
    spares its units that.
    """
    if ops.serving_backend(x) == "reference":
        return x
    return x.contiguous(memory_format=torch.channels_last)


# --- checks -----------------------------------------------------------------------------------------------


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2:
        # What every nn.Conv2d has, at every call of every site.
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return first, second
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}: got {value!r}, allowed is an integer or two, each at least {least}")
    return pair[0], pair[1]


def _check_input(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"input: got shape {tuple(x.shape)}, allowed is four dimensions, [N,C,H,W]")
    if x.dtype not in _DTYPES:
        raise TypeError(f"input: got dtype {x.dtype}, allowed are {', '.join(map(str, _DTYPES))}")


def _check_same_kind(name: str, tensor: Tensor, x: Tensor, also: torch.dtype | None = None) -> None:
    """Same device as the input, and its dtype (or the other one allowed)."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: got device {tensor.device}, allowed is that of input, {x.device}")
    if tensor.dtype not in (x.dtype, also):
        allowed = f"{x.dtype} as input has" + ("" if also in (None, x.dtype) else f", or {also}")
        raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed is {allowed}")


def _check_added(name: str, shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    if shape != out_shape:
        raise ValueError(f"{name}: got shape {shape}, allowed is the output's, {out_shape}")


def _check_batch_norm(x: Tensor, bn: BatchNorm, prefix: str, shape: tuple[int, ...]) -> None:
    wide, expected = statistics_dtype(x.dtype), (shape[1],)
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    for field, tensor in zip(BatchNorm._fields, tensors, strict=False):
        if tensor is None or (
            tensor.shape == expected and tensor.dtype in (x.dtype, wide) and tensor.device == x.device
        ):
            continue
        # preact_conv2d has one argument list for both: there the BN's weight is called bn_weight.
        name = f"{prefix}{field}" if prefix or field.startswith("running") else f"bn_{field}"
        _check_same_kind(name, tensor, x, also=wide)
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, allowed is ({shape[1]},), "
            "one value per channel of its input"
        )
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(
            f"{prefix}running_mean, {prefix}running_var: got one of them, allowed are both or neither"
        )
    if bn.training and bn.momentum is None and bn.running_mean is not None and bn.num_batches_tracked is None:
        raise ValueError(
            f"{prefix}num_batches_tracked: got None with momentum=None, allowed there is the counter tensor "
            "that the cumulative average divides by"
        )
    if bn.training and shape[0] * shape[2] * shape[3] == 1:
        # PyTorch's own words, so that code which catches them goes on working.
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def _check_convolution(
    x: Tensor, shape: tuple[int, ...], conv: Convolution, prefix: str
) -> tuple[Conv, tuple[int, ...]]:
    """The convolution's constants and the shape of its output."""
    _check_same_kind(f"{prefix}weight", conv.weight, x)
    if conv.weight.dim() != 4:
        raise ValueError(
            f"{prefix}weight: got shape {tuple(conv.weight.shape)}, allowed is four dimensions, [K,C/groups,R,S]"
        )
    out_channels, in_channels = conv.weight.shape[:2]
    if conv.groups < 1 or out_channels % conv.groups or in_channels * conv.groups != shape[1]:
        raise ValueError(
            f"{prefix}weight: got shape {tuple(conv.weight.shape)} with groups {conv.groups}, allowed is "
            f"[K,{shape[1]}/groups,R,S] with K a multiple of groups, for an input of {shape[1]} channels"
        )
    if conv.bias is not None:
        _check_same_kind(f"{prefix}bias", conv.bias, x)
        if conv.bias.shape != (out_channels,):
            raise ValueError(
                f"{prefix}bias: got shape {tuple(conv.bias.shape)}, allowed is ({out_channels},)"
            )
    spec = Conv(
        _pair(f"{prefix}stride", conv.stride, 1),
        _pair(f"{prefix}padding", conv.padding, 0),
        _pair(f"{prefix}dilation", conv.dilation, 1),
        conv.groups,
    )
    size = conv_output_size(shape[2:], conv.weight.shape[2:], spec.stride, spec.padding, spec.dilation)
    if min(size) < 1:
        raise ValueError(
            f"input: got height and width {tuple(shape[2:])}, allowed are sizes of which the convolution leaves "
            f"at least 1x1 (kernel {tuple(conv.weight.shape[2:])}, padding {spec.padding}, dilation {spec.dilation})"
        )
    return spec, (shape[0], out_channels, *size)


def _check_sites(
    x: Tensor, sites: list[tuple[BatchNorm, Convolution]], named: bool
) -> tuple[list[Conv], list[tuple[int, ...]]]:
    """The convolutions' constants and the shape of each site's output."""
    specs, shapes = [], []
    shape = tuple(x.shape)
    for index, (bn, conv) in enumerate(sites):
        prefix = f"sites[{index}]." if named else ""
        _check_batch_norm(x, bn, prefix and f"{prefix}bn.", shape)
        spec, shape = _check_convolution(x, shape, conv, prefix and f"{prefix}conv.")
        specs.append(spec)
        shapes.append(shape)
    return specs, shapes
