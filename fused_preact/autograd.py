"""The autograd Functions: what is saved, which operations run, what comes back.

One Function serves a single site and a whole residual unit (:mod:`fused_preact.schedule`), a second one the
network's head. Saved are the raw inputs of the sites, per-channel vectors and the parameters.

The closed-form backward is not differentiable itself: with ``create_graph=True`` the gradients are those of the same
unit composed of PyTorch's operations (:mod:`composite`), made again from what is saved. A backward that Dynamo
traced refuses that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import composite, ops
from .arguments import BatchNorm, Convolution
from .collective import Group, merged, summed
from .schedule import (
    Conv,
    SiteSaved,
    SiteTensors,
    Unit,
    UnitNeeds,
    unit_backward,
    unit_forward,
    values_per_channel,
)

__all__ = ["ConvolutionFunction", "HeadFunction", "UnitFunction"]

_library = torch.library.Library("fused_preact", "FRAGMENT")
_library.define("first_order(Tensor(a) dy) -> Tensor(a)")


def _first_order(dy: Tensor) -> Tensor:
    """``dy``; RuntimeError where it has a history: somebody makes a graph of the backward.

    Of a backward that Dynamo traced, which runs without gradients whatever is asked for, and would leave the second
    derivative out without a word. AOTAutograd makes nothing of it, and refuses by itself.
    """
    if dy.requires_grad:
        raise RuntimeError(
            "create_graph=True: the backward of a forward that torch.compile traced has no second derivative; "
            "allowed is the model without torch.compile"
        )
    return dy


_library.impl("first_order", _first_order, "CompositeImplicitAutograd")

Update = Callable[[Sequence[Tensor]], None] | None
"""Takes the statistics that a forward has made; None where its caller takes them from the results."""


class ConvolutionFunction(torch.autograd.Function):
    """A convolution whose epilogue reduces the statistics of its output, for the BN behind it: y, mean, var.

    Only y carries a gradient: the site that normalises with the statistics has their part in its own. Backward is
    PyTorch's, and so twice differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, conv: Conv, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        k = ops.table(backend, x)
        y, mean, var = k.conv_fprop(x, None, None, weight, bias, None, *conv, True)
        ctx.conv = conv
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: None) -> Any:
        if dy is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.conv
        sizes, mask = [weight.shape[0]], ctx.needs_input_grad[2:]
        grads = torch.ops.aten.convolution_backward(
            dy, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return (None, None, *grads)


class UnitFunction(torch.autograd.Function):
    """A chain of BN -> ReLU (or nothing) -> convolution sites with its shortcut; see :func:`schedule.unit_forward`.

    Tensor arguments, in order: ``x``; ``residual``; the projection's weight and bias; then per site gamma,
    beta, W, bias; then per site mean and var (None where they are made here). Returns y;
    with ``unit.output_stats`` the mean and variance of y; then those of every site whose statistics were made here,
    with the number of their values where they were merged over a process group.
    Only y carries a gradient. ``memo`` is what :func:`ops.run` takes; ``update`` is called with what is returned
    beside y before anything is saved for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        backend: str,
        memo: dict[Any, Any] | None,
        update: Update,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(unit.sites)
        x = tensors[0]
        assert x is not None
        y, *rest = ops.run(ops.table(backend, x), memo, "forward", _forward, unit, tensors)
        kept = 7 * count + 1
        made = rest[kept:]
        if update is not None:
            update(made)  # type: ignore[arg-type]

        ctx.unit, ctx.backend, ctx.memo = unit, backend, memo
        # For a differentiable backward, which Dynamo has not: the projection's bias, gamma, beta and bias of each
        # site. Not saved as the others are: plain PyTorch does not mind that a bias has changed meanwhile.
        end = 4 + 4 * count
        vectors = tensors[3], tensors[4:end:4], tensors[5:end:4], tensors[7:end:4]
        ctx.vectors = None if torch.compiler.is_compiling() else vectors
        # Of gamma, beta and the biases backward knows all it needs from ``needs_input_grad`` and their dtypes.
        ctx.dtypes = [
            tuple(None if t is None else t.dtype for t in tensors[i : i + 2]) for i in range(4, end, 4)
        ]
        ctx.save_for_backward(*rest[:kept])
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        return (y, *made)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: None) -> Any:
        unit: Unit = ctx.unit
        count = len(unit.sites)
        if dy is None:
            return (None,) * (8 + 6 * count)
        kept = ctx.saved_tensors
        asked = ctx.needs_input_grad[4:]
        if torch.compiler.is_compiling():
            dy = torch.ops.fused_preact.first_order(dy)
        if torch.is_grad_enabled():  # create_graph=True
            result = _differentiable(unit, ctx.vectors, kept, dy, asked)
        else:
            k = ops.table(ctx.backend, dy)
            constants = unit, ctx.dtypes, asked
            result = ops.run(k, ctx.memo, asked, _backward, constants, (dy, *kept))
        return (None, None, None, None, *result, *(None,) * (2 * count))


def _differentiable(
    unit: Unit, vectors: Any, kept: Sequence[Tensor | None], dy: Tensor, asked: Sequence[bool]
) -> list[Tensor | None]:
    """What :func:`_backward` returns, as a function that can be differentiated again."""
    projection_bias, gammas, betas, biases = vectors
    projection_weight, x, *rest = kept
    assert x is not None
    sites, inputs = [], [x, None, projection_weight, projection_bias]
    for index, (site, gamma, beta, bias) in enumerate(zip(unit.sites, gammas, betas, biases, strict=True)):
        mean, _, _, rstd, _, weight = rest[7 * index : 7 * index + 6]
        assert mean is not None
        assert rstd is not None
        assert weight is not None
        running = (None, None) if site.batch_stats else (mean, rstd.pow(-2) - site.eps)
        bn = BatchNorm(
            gamma, beta, running[0], running[1], None, site.batch_stats, 0.0, site.eps, site.group, site.relu
        )
        sites.append((bn, Convolution(weight, bias, *site.conv)))
        inputs += [gamma, beta, weight, bias]
    projection = None
    if projection_weight is not None and unit.projection is not None:
        projection = Convolution(projection_weight, projection_bias, *unit.projection)
    y = composite.unit(x, sites, projection, unit.identity, None)
    grads = _gradients(y, inputs, dy, asked)
    grads[1] = dy if asked[1] else None  # the residual's
    return grads


def _gradients(
    y: Tensor, inputs: Sequence[Tensor | None], dy: Tensor, asked: Sequence[bool]
) -> list[Tensor | None]:
    """Differentiable gradients of ``y`` with respect to those ``inputs`` that are ``asked`` for."""
    wanted = [t if needed else None for t, needed in zip(inputs, asked, strict=False)]
    found = iter(
        torch.autograd.grad(y, [t for t in wanted if t is not None], dy, create_graph=True, allow_unused=True)
    )
    return [None if t is None else next(found) for t in wanted]


def _forward(k: Any, unit: Unit, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """y; what backward needs: the projection's weight and of each site x, mean, scale, shift, rstd, total and W;
    then what is returned beside y.
    """
    count = len(unit.sites)
    x, residual, projection_weight, projection_bias = tensors[:4]
    assert x is not None
    end = 4 + 4 * count
    sites = [SiteTensors(*tensors[i : i + 4]) for i in range(4, end, 4)]  # type: ignore[arg-type]
    given = [_pair(*tensors[i : i + 2]) for i in range(end, end + 2 * count, 2)]
    projection = None if projection_weight is None else (projection_weight, projection_bias)
    result = unit_forward(k, unit, x, given, sites, projection, residual)
    found = [result.y, projection_weight]
    for saved, site in zip(result.saved, sites, strict=True):
        found += (*saved, site.weight)
    found += result.output_stats if unit.output_stats else ()
    for pair, saved, was in zip(result.statistics, result.saved, given, strict=True):
        if saved.total is not None:
            found += (*pair, saved.total)
        elif was is None:
            found += pair
    return found


def _backward(k: Any, constants: Any, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of x, the residual, the projection and of each site's gamma, beta, W and bias."""
    unit, dtypes, asked = constants
    count = len(unit.sites)
    dy, projection_weight, *kept = tensors
    assert dy is not None
    saved = [SiteSaved(*kept[i : i + 6]) for i in range(0, 7 * count, 7)]  # type: ignore[arg-type]
    needs = UnitNeeds(asked[0], [asked[i : i + 4] for i in range(4, 4 + 4 * count, 4)], asked[2:4])
    grads = unit_backward(k, unit, saved, kept[6::7], dtypes, projection_weight, dy, needs)  # type: ignore[arg-type]
    return [grads.x, dy if asked[1] else None, *grads.projection, *(g for site in grads.sites for g in site)]


class HeadFunction(torch.autograd.Function):
    """BN -> ReLU -> global average pool, [N,C,H,W] -> [N,C].

    With the given statistics, or those of the batch, which are then returned too; with ``group`` both are merged with
    those of the other ranks, and returned with the number of their values. ``update`` as in :class:`UnitFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        batch_stats: bool,
        group: Group | None,
        backend: str,
        update: Update,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> tuple[Tensor, ...]:
        k = ops.table(backend, x)
        made: tuple[Tensor, ...] = ()
        total = None
        if mean is None or var is None:
            made = mean, var = k.bn_stats(x)
        if group is not None:
            made = mean, var, total = merged(mean, var, values_per_channel(x.shape), eps, group)
        ctx.mark_non_differentiable(*made)
        if update is not None:
            update(made)
        scale, shift, rstd = k.bn_scale_shift(mean, var, gamma, beta, eps)
        ctx.batch_stats, ctx.backend, ctx.eps, ctx.group = batch_stats, backend, eps, group
        ctx.save_for_backward(x, mean, scale, shift, rstd, total, gamma, beta)
        return k.bn_relu_avg_pool(x, scale, shift), *made

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: None) -> Any:
        x, mean, scale, shift, rstd, total, gamma, beta = ctx.saved_tensors
        asked = ctx.needs_input_grad[5:8]
        if torch.compiler.is_compiling():
            dy = torch.ops.fused_preact.first_order(dy)
        if torch.is_grad_enabled():  # create_graph=True
            running = (None, None) if ctx.batch_stats else (mean, rstd.pow(-2) - ctx.eps)
            bn = BatchNorm(
                gamma, beta, running[0], running[1], None, ctx.batch_stats, 0.0, ctx.eps, ctx.group
            )
            grads = _gradients(composite.bn_relu_avg_pool(x, bn), (x, gamma, beta), dy, asked)
            return (None, None, None, None, None, *grads, None, None)
        k = ops.table(ctx.backend, x)
        need_x, need_gamma, need_beta = asked
        sum_g, sum_gx = k.bn_relu_avg_pool_reduce(dy, x, scale, shift, mean)
        dgamma = (rstd * sum_gx).to(gamma.dtype) if need_gamma else None
        dbeta = sum_g.to(beta.dtype) if need_beta else None
        dx = None
        if need_x:
            if ctx.group is not None:
                sum_g, sum_gx = summed(sum_g, sum_gx, values_per_channel(x.shape), total, ctx.group)
            dx = k.bn_relu_avg_pool_apply(dy, x, scale, shift, mean, rstd, sum_g, sum_gx, ctx.batch_stats)
        return (None, None, None, None, None, dx, dgamma, dbeta, None, None)


def _pair(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mean is None or var is None else (mean, var)
