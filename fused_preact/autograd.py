"""The autograd Functions: what is saved, which operations run, what comes back.

One Function serves a single site and a whole residual unit (:mod:`fused_preact.schedule`), a second one the
network's head. Saved are the raw inputs of the sites, per-channel vectors and the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .schedule import SiteSaved, SiteTensors, Unit, UnitNeeds, unit_backward, unit_forward

__all__ = ["HeadFunction", "UnitFunction"]


class _NoDoubleBackward(torch.autograd.Function):
    """Identity on gradients that raises when somebody differentiates through them."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "fused_preact: double backward (create_graph=True) is not implemented for the fused operations; "
            "use the plain model (fused=False) where second derivatives are needed"
        )


def _forbid_double_backward(grads: tuple[Any, ...], *sources: Tensor | None) -> tuple[Any, ...]:
    """Tie ``grads`` to what they depend on, so that a second differentiation fails instead of being wrong."""
    if not torch.is_grad_enabled():
        return grads
    return _NoDoubleBackward.apply(len(grads), *grads, *sources)


class UnitFunction(torch.autograd.Function):
    """A chain of BN -> ReLU -> convolution sites with its shortcut; see :func:`schedule.unit_forward`.

    Tensor arguments, in order: ``x``; ``residual``; the projection's weight and bias; then per site gamma,
    beta, W, bias; then per site mean and var (None where the previous site's epilogue makes them). Returns y;
    the mean and variance of y; then those of every site whose statistics were made here. Only y carries a
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, unit: Unit, backend: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        count = len(unit.sites)
        x, residual, projection_weight, projection_bias = tensors[:4]
        assert x is not None
        sites = _sites(tensors[4 : 4 + 4 * count])
        given = tensors[4 + 4 * count :]
        statistics = [_pair(given[2 * i], given[2 * i + 1]) for i in range(count)]
        projection = None if projection_weight is None else (projection_weight, projection_bias)

        result = unit_forward(ops.table(backend), unit, x, statistics, sites, projection, residual)

        ctx.unit, ctx.backend = unit, backend
        vectors = [t for s in result.saved for t in s[1:]]
        inputs = [s.x for s in result.saved]
        parameters = tensors[4 : 4 + 4 * count]
        ctx.save_for_backward(*inputs, *vectors, projection_weight, projection_bias, *parameters)
        made = [
            t for pair, was in zip(result.statistics, statistics, strict=True) if was is None for t in pair
        ]
        ctx.mark_non_differentiable(*result.output_stats, *made)
        ctx.set_materialize_grads(False)
        return (result.y, *result.output_stats, *made)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: None) -> Any:
        unit: Unit = ctx.unit
        count = len(unit.sites)
        total = 6 + 6 * count
        if dy is None:
            return (None,) * total
        saved = ctx.saved_tensors
        inputs, vectors = saved[:count], saved[count : 5 * count]
        sites_saved = [SiteSaved(inputs[i], *vectors[4 * i : 4 * i + 4]) for i in range(count)]
        projection_weight, projection_bias = saved[5 * count : 5 * count + 2]
        projection = None if projection_weight is None else (projection_weight, projection_bias)
        sites = _sites(saved[5 * count + 2 :])

        asked = ctx.needs_input_grad[2:]
        flags = asked[4 : 4 + 4 * count]
        needs = UnitNeeds(
            asked[0],
            [(flags[4 * i], flags[4 * i + 1], flags[4 * i + 2], flags[4 * i + 3]) for i in range(count)],
            (asked[2], asked[3]),
        )
        with torch.no_grad():
            grads = unit_backward(ops.table(ctx.backend), unit, sites_saved, sites, projection, dy, needs)
        site_grads = [g for site in grads.sites for g in site]
        result = (grads.x, dy if asked[1] else None, *grads.projection, *site_grads)
        result = _forbid_double_backward(result, dy, inputs[0], *(s.weight for s in sites))
        return (None, None, *result, *(None,) * (2 * count))


class HeadFunction(torch.autograd.Function):
    """BN -> ReLU -> global average pool, [N,C,H,W] -> [N,C], with the given statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        batch_stats: bool,
        backend: str,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> Tensor:
        k = ops.table(backend)
        scale, shift, rstd = k.bn_scale_shift(mean, var, gamma, beta, eps)
        ctx.batch_stats, ctx.backend = batch_stats, backend
        ctx.save_for_backward(x, mean, scale, shift, rstd, gamma, beta)
        return k.bn_relu_avg_pool(x, scale, shift)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, mean, scale, shift, rstd, gamma, beta = ctx.saved_tensors
        k = ops.table(ctx.backend)
        need_x, need_gamma, need_beta = ctx.needs_input_grad[3:6]
        with torch.no_grad():
            sum_g, sum_gx = k.bn_relu_avg_pool_reduce(dy, x, scale, shift, mean)
            dgamma = (rstd * sum_gx).to(gamma.dtype) if need_gamma else None
            dbeta = sum_g.to(beta.dtype) if need_beta else None
            dx = None
            if need_x:
                dx = k.bn_relu_avg_pool_apply(dy, x, scale, shift, mean, rstd, sum_g, sum_gx, ctx.batch_stats)
        grads = _forbid_double_backward((dx, dgamma, dbeta), dy, x, gamma)
        return (None, None, None, *grads, None, None)


def _sites(flat: tuple[Any, ...]) -> list[SiteTensors]:
    return [SiteTensors(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _pair(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mean is None or var is None else (mean, var)
