"""The public functions: argument checks, autocast, memory format; then the autograd Functions.

Errors are ValueError (shape, value), TypeError (dtype, type) and RuntimeError (backend), each naming the
argument, what came and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import composite, ops
from .arguments import (
    BatchNorm,
    ConvKind,
    Convolution,
    NormKind,
    Statistics,
    check_convolution,
    check_head,
    check_unit,
    checked,
    kind,
    values_per_channel,
)
from .autograd import ConvolutionFunction, HeadFunction, UnitFunction
from .calls import recomputing, transforming
from .reference import statistics_dtype

__all__ = [
    "BatchNorm",
    "Convolution",
    "Statistics",
    "bn_relu_avg_pool2d",
    "conv2d_with_statistics",
    "preact_chain",
    "preact_conv2d",
    "preact_site",
    "residual_unit",
    "to_native_format",
]

_TRANSPARENT = {Tensor, nn.Parameter, type(None), FakeTensor, FunctionalTensor}
"""Types of tensors whose operations are those of torch, or a tracer's."""


_NO_SITES = "sites: got none, allowed are one or more (BatchNorm, Convolution) pairs"


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
    relu: bool = True,
) -> Tensor:
    """``conv2d(relu(batch_norm(input)), weight, bias) + residual`` without storing the activated tensor.

    ``input`` [N,C,H,W] in float32, bfloat16, float16 or float64; ``weight`` [K,C/groups,R,S] of the same dtype
    (under autocast both are cast); the BN parameters [C] of that dtype or float32; ``residual`` [N,K,OH,OW].
    Returns [N,K,OH,OW] in the memory format of ``input``. With ``training``, ``running_mean`` and
    ``running_var`` are updated in place, the latter with the unbiased variance; ``momentum=None`` is the
    cumulative average and needs ``num_batches_tracked``, which is counted up.

    ``statistics`` are the mean and biased variance of ``input`` where its producer has them; without them
    one more read of ``input`` computes them. Without ``relu`` the convolution reads the normalised tensor itself.

    Equations: He et al. 2016 (arXiv:1603.05027); :mod:`fused_preact.reference` has them. Raises ValueError
    for a wrong shape or value, TypeError for a dtype mix, RuntimeError for a backend that is not there.
    """
    bn = BatchNorm(
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        None,
        relu,
    )
    return preact_site(
        input, bn, Convolution(weight, bias, stride, padding, dilation, groups), residual, statistics
    )


def preact_site(
    input: Tensor,
    bn: BatchNorm,
    conv: Convolution,
    residual: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """:func:`preact_conv2d` with its arguments in two groups: ``conv(relu(bn(input))) + residual``.

    Without the ReLU where ``bn.relu`` is False.
    """
    y, _ = _unit(input, [(bn, conv)], None, False, residual, statistics, False)
    return y


def preact_chain(
    input: Tensor,
    sites: Sequence[tuple[BatchNorm, Convolution]],
    residual: Tensor | None = None,
    *,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """Sites in a row, ``F(input)``, plus ``residual`` [N,K,OH,OW] in the last epilogue; [N,C,H,W] -> [N,K,OH,OW].

    Statistics and errors as in :func:`residual_unit`.
    """
    if not sites:
        raise ValueError(_NO_SITES)
    return _unit(input, list(sites), None, False, residual, statistics, return_statistics)


def residual_unit(
    input: Tensor,
    sites: Sequence[tuple[BatchNorm, Convolution]],
    projection: Convolution | None = None,
    *,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """A whole pre-activation residual unit: ``x + F(x)``, or ``projection(relu(bn(x))) + F(x)``.

    F is the chain of ``sites``, each BN -> ReLU (where ``bn.relu``) -> convolution. An identity shortcut adds the raw
    ``input``; a projection reads the first site's activation, as in the paper. ``input`` [N,C,H,W] -> [N,K,OH,OW].

    ``statistics`` are those of ``input``; with ``return_statistics`` the last epilogue reduces those of the
    output, for the next unit's ``statistics``; otherwise None is returned in their place. Running statistics
    of BNs in training mode are updated in place. Raises as :func:`preact_conv2d`.
    """
    if not sites:
        raise ValueError(_NO_SITES)
    return _unit(input, list(sites), projection, projection is None, None, statistics, return_statistics)


def conv2d_with_statistics(input: Tensor, conv: Convolution) -> tuple[Tensor, Statistics | None]:
    """``conv2d(input)``, and the statistics of its output for the site that reads it, from its epilogue.

    For a convolution without a BN before it, [N,C,H,W] -> [N,K,OH,OW]; dtypes, memory format and errors as in
    :func:`preact_conv2d`. Statistics are None, and left to the site, where no kernel serves or a compiler traces.
    """
    weight, bias = conv.weight, conv.bias
    if _autocasting(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    spec = checked(check_convolution, input, ConvKind.of(conv._replace(weight=weight, bias=bias)))
    if (
        torch.compiler.is_compiling()
        or _by_composite(input, weight, bias)
        or ops.serving_backend(input) == "reference"
    ):
        return F.conv2d(input, weight, bias, *spec), None
    converted = not input.is_contiguous(memory_format=torch.channels_last)
    y, mean, var = ConvolutionFunction.apply(
        spec, ops.requested_backend(), to_native_format(input), weight, bias
    )
    return y.contiguous() if converted else y, Statistics(mean, var)


def bn_relu_avg_pool2d(input: Tensor, bn: BatchNorm, statistics: Statistics | None = None) -> Tensor:
    """The network's head: mean over H and W of ``relu(batch_norm(input))``, [N,C,H,W] -> [N,C].

    The activated map is never stored, forward or backward. Dtypes, ``statistics`` and errors as in
    :func:`preact_conv2d`.
    """
    checked(check_head, input, NormKind.of(bn))
    if _by_composite(input, bn.weight, bn.bias):
        return composite.bn_relu_avg_pool(input, bn)
    backend = ops.requested_backend()
    input = to_native_format(input)
    given = _first_statistics(input, bn, statistics)
    values = values_per_channel(input.shape)

    def update(made: Sequence[Tensor]) -> None:
        _update_running_statistics([_updated(bn, made or given, values)], backend)

    early = None if torch.compiler.is_compiling() else update
    out, *made = HeadFunction.apply(
        bn.eps, bn.batch_stats, bn.group, backend, early, input, bn.weight, bn.bias, *(given or (None, None))
    )
    if early is None:
        update(made)
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
    if _autocasting(x):
        x, sites, projection, residual = _autocast(x, sites, projection, residual)
    plan = checked(
        check_unit,
        x,
        tuple((NormKind.of(bn), ConvKind.of(conv)) for bn, conv in sites),
        None if projection is None else ConvKind.of(projection),
        identity,
        None if residual is None else kind(residual),
        return_statistics,
    )
    others: list[Tensor | None] = [residual]
    others += (None, None) if projection is None else (projection.weight, projection.bias)
    for bn, conv in sites:
        others += (bn.weight, bn.bias, conv.weight, conv.bias)
    if _by_composite(x, *others):
        return composite.unit(x, sites, projection, identity, residual), None
    backend = ops.requested_backend()
    # Kernels return the format of what they read: only another one is converted, here and back.
    converted = not x.is_contiguous(memory_format=torch.channels_last)
    if converted or backend != "auto":
        x = to_native_format(x)
    given: list[Tensor | None] = [*(_first_statistics(x, sites[0][0], statistics) or (None, None))]
    for bn, _ in sites[1:]:
        given += (None, None) if bn.batch_stats else (bn.running_mean, bn.running_var)
    compiling = torch.compiler.is_compiling()
    memo = None if compiling else plan.memo
    handed_on = 2 if return_statistics else 0

    def update(made: Sequence[Tensor]) -> None:
        computed = iter(made[handed_on:])
        updates = []
        for index, (bn, _) in enumerate(sites):
            statistics = given[2 * index : 2 * index + 2]
            if bn.group is not None:
                statistics = [next(computed) for _ in range(3)]
            elif statistics[0] is None:
                statistics = [next(computed), next(computed)]
            updates.append(_updated(bn, statistics, plan.counts[index]))
        _update_running_statistics(updates, backend, memo)

    # As soon as the statistics are there: what follows, saving for backward, ends the recomputation of
    # torch.utils.checkpoint by an exception. Dynamo wants buffers written outside of the Function.
    early = None if compiling else update
    y, *made = UnitFunction.apply(plan.unit, backend, memo, early, x, *others, *given)
    if early is None:
        update(made)
    if converted:
        y = y.contiguous()
    return y, Statistics(made[0], made[1]) if return_statistics else None


def _by_composite(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's own operations serve this call: see :mod:`composite`. Subclasses bring their own."""
    return transforming() or not all(type(t) in _TRANSPARENT for t in tensors)


# --- statistics -------------------------------------------------------------------------------------------


def _first_statistics(
    x: Tensor, bn: BatchNorm, statistics: Statistics | None
) -> tuple[Tensor, Tensor] | None:
    """What the BN that reads ``x`` normalises with, None where it is to be computed."""
    if not bn.batch_stats:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        wide = statistics_dtype(x.dtype)
        return bn.running_mean.to(wide), bn.running_var.to(wide)
    if statistics is None:
        return None
    for field, tensor in zip(Statistics._fields, statistics, strict=True):
        wanted = (x.shape[1],), statistics_dtype(x.dtype), x.device
        if (tensor.shape, tensor.dtype, tensor.device) != wanted:
            raise ValueError(
                f"statistics.{field}: got shape {tuple(tensor.shape)}, dtype {tensor.dtype} and device "
                f"{tensor.device}, allowed are {wanted[0]}, {wanted[1]} and {wanted[2]}"
            )
    if statistics.mean.requires_grad or statistics.var.requires_grad:
        return statistics.mean.detach(), statistics.var.detach()
    return statistics


def _updated(bn: BatchNorm, statistics: Any, values: int) -> tuple[BatchNorm, Tensor, Tensor, int]:
    """What :func:`_update_running_statistics` takes of a BN that normalised with ``statistics``.

    Those of a process group come with the number of their values, which only the device knows.
    """
    mean, var, *totals = statistics
    if totals and bn.training and bn.running_mean is not None and bn.running_var is not None:
        total = totals[0]
        # The unbiased variance already, said to be that of one value. Where no rank has any, nothing changes.
        mean = torch.where(total > 0, mean, bn.running_mean)
        var = torch.where(total > 0, var * (total / (total - 1).clamp_min(1)), bn.running_var)
        values = 1
    return bn, mean, var, values


def _update_running_statistics(
    updates: Sequence[tuple[BatchNorm, Tensor, Tensor, int]], backend: str, memo: dict[Any, Any] | None = None
) -> None:
    """What ``nn.BatchNorm2d`` does to its buffers in training; nothing in eval mode or where there are none.

    ``updates``: BN, mean, biased variance and values per channel. One operation for those of like momentum.
    """
    if recomputing():
        return
    alike: dict[tuple[float | None, bool], list[int]] = {}
    for index, (bn, _, _, count) in enumerate(updates):
        if not bn.training:
            continue
        if count == 0 or bn.running_mean is None or bn.running_var is None:
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)  # an empty batch is counted and changes nothing else
        else:
            alike.setdefault((bn.momentum, bn.num_batches_tracked is not None), []).append(index)
    for (momentum, counted), indices in alike.items():
        tensors: list[Tensor | None] = []
        for index in indices:
            bn, mean, var, _ = updates[index]
            tensors += (mean, var, bn.running_mean, bn.running_var, bn.num_batches_tracked)
        constants = momentum, counted, [updates[index][3] for index in indices]
        k = ops.table(backend, updates[0][1])
        ops.run(k, memo, ("update", momentum, *indices), _update, constants, tensors)


def _update(k: Any, constants: Any, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``tensors``: of each BN mean, variance, running mean and variance, and counter. No results."""
    momentum, counted, counts = constants
    mean, var, running_mean, running_var, counters = (list(tensors[i::5]) for i in range(5))
    k.bn_update_running(mean, var, running_mean, running_var, counters if counted else [], momentum, counts)
    return []


# --- autocast and memory format ---------------------------------------------------------------------------


def _autocasting(x: Tensor) -> bool:
    device = x.device.type
    return (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
    )


def _autocast(
    x: Tensor,
    sites: list[tuple[BatchNorm, Convolution]],
    projection: Convolution | None,
    residual: Tensor | None,
) -> tuple[Tensor, list[tuple[BatchNorm, Convolution]], Convolution | None, Tensor | None]:
    """Cast what a convolution would cast under autocast; BN parameters and statistics stay float32."""
    dtype = torch.get_autocast_dtype(x.device.type)

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
