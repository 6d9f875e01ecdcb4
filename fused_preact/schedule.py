"""The schedule of a site and of a whole residual unit over any backend's operations.

A backend is anything with the functions of :mod:`fused_preact.reference`; the forward and the closed-form
backward below chain them. With ``reference`` as the backend they are the reference of a unit.

Schedule "c2": each convolution's epilogue reduces the statistics of what it stores for the next BN and the
identity is added in the last epilogue. In backward there is one operation per site; what it hands to the site
before it is the masked g, and that site applies the BN gradient on load. Only at the unit's input is the BN
gradient applied and stored, with the identity's gradient added. Kept between forward and backward are ``x``,
the raw convolution outputs inside the unit, per-channel vectors and the parameters; nothing else has the size
of an activation.

Where a BN is synchronised, its statistics and the two sums of its backward are merged with those of the other ranks
between two operations, on [C] vectors: no operation knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .collective import Group, merged, summed


class Conv(NamedTuple):
    """The constants of one convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Site(NamedTuple):
    """The constants of one BN -> ReLU (or nothing) -> convolution site."""

    conv: Conv
    eps: float
    batch_stats: bool
    """Whether BN normalises with the statistics of the batch (training) or with given, constant ones."""
    group: Group | None = None
    """Whose batch that is: this process' alone, or that of a group of them together."""
    relu: bool = True


class Unit(NamedTuple):
    """The constants of a chain of sites. A single site is a unit of one."""

    sites: tuple[Site, ...]
    projection: Conv | None
    identity: bool
    output_stats: bool


class SiteTensors(NamedTuple):
    """The parameters of one site."""

    gamma: Tensor | None
    beta: Tensor | None
    weight: Tensor
    bias: Tensor | None


class SiteSaved(NamedTuple):
    """What a site's backward needs beside the parameters: its raw input and [C] vectors."""

    x: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    rstd: Tensor
    total: Tensor | None = None
    """[1]: over how many values a channel all ranks have together, of a synchronised BN."""


class UnitResult(NamedTuple):
    """The output of a unit's forward."""

    y: Tensor
    output_stats: tuple[Tensor, Tensor]
    statistics: list[tuple[Tensor, Tensor]]
    """Mean and variance that each site normalised with."""
    saved: list[SiteSaved]


def unit_forward(
    k: Any,
    unit: Unit,
    x: Tensor,
    statistics: list[tuple[Tensor, Tensor] | None],
    sites: list[SiteTensors],
    projection: tuple[Tensor, Tensor | None] | None,
    residual: Tensor | None,
) -> UnitResult:
    """Run the sites one after the other and add the shortcut in the last epilogue.

    ``statistics`` holds (mean, var) per site: those of ``x`` for the first, the running ones for a site in
    eval mode, None for a site that takes them from the epilogue before it, or, the first, computes them. Given,
    made and returned ones are of this process' own batch; a synchronised site merges them.
    """
    h = x
    # Nobody handed them on: one read of x.
    produced: tuple[Tensor, Tensor] | None = k.bn_stats(x) if statistics[0] is None else None
    vectors: tuple[Tensor, Tensor, Tensor] | None = None
    used: list[tuple[Tensor, Tensor]] = []
    saved: list[SiteSaved] = []
    for index, (site, tensors) in enumerate(zip(unit.sites, sites, strict=True)):
        normalised_with = statistics[index] or produced
        assert normalised_with is not None, "a convolution makes the statistics that the next site asks for"
        mean, var = normalised_with
        total = None
        if site.group is not None:
            mean, var, total = merged(mean, var, values_per_channel(h.shape), site.eps, site.group)
        if vectors is None:
            vectors = k.bn_scale_shift(mean, var, tensors.gamma, tensors.beta, site.eps)
        scale, shift, rstd = vectors
        used.append((mean, var))
        saved.append(SiteSaved(h, mean, scale, shift, rstd, total))

        if index + 1 < len(unit.sites):
            following, its = unit.sites[index + 1], sites[index + 1]
            if following.batch_stats and following.group is None:
                h, new_mean, new_var, *made = k.conv_fprop_bn(
                    h,
                    scale,
                    shift,
                    tensors.weight,
                    tensors.bias,
                    *site.conv,
                    its.gamma,
                    its.beta,
                    following.eps,
                    site.relu,
                )
                produced, vectors = (new_mean, new_var), (made[0], made[1], made[2])
            else:
                reduces = following.batch_stats
                h, new_mean, new_var = k.conv_fprop(
                    h, scale, shift, tensors.weight, tensors.bias, None, *site.conv, reduces, False, site.relu
                )
                produced, vectors = (new_mean, new_var), None
            continue
        added = x if unit.identity else residual
        if projection is not None and unit.projection is not None:
            # The projection reads the activation of the first site, recomputed by the same prologue.
            first, relu = saved[0], unit.sites[0].relu
            added, _, _ = k.conv_fprop(
                x, first.scale, first.shift, *projection, None, *unit.projection, False, False, relu
            )
        stats = unit.output_stats
        h, new_mean, new_var = k.conv_fprop(
            h, scale, shift, tensors.weight, tensors.bias, added, *site.conv, stats, False, site.relu
        )
        produced = (new_mean, new_var)
    assert produced is not None, "a unit has at least one site"
    return UnitResult(h, produced, used, saved)


class UnitNeeds(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    sites: list[tuple[bool, ...]]
    """Of each site's gamma, beta, weight and bias."""
    projection: tuple[bool, ...]
    """Of the projection's weight and bias."""


class UnitGrads(NamedTuple):
    """The gradients, None where not asked for."""

    x: Tensor | None
    sites: list[list[Tensor | None]]
    projection: tuple[Tensor | None, Tensor | None]


def unit_backward(
    k: Any,
    unit: Unit,
    saved: list[SiteSaved],
    weights: list[Tensor],
    dtypes: list[tuple[torch.dtype | None, torch.dtype | None]],
    projection: Tensor | None,
    dy: Tensor,
    needs: UnitNeeds,
) -> UnitGrads:
    """Closed-form backward of :func:`unit_forward`; ``dy`` is never written to.

    ``weights`` are the sites' and ``projection`` is the projection's; ``dtypes`` those of each site's gamma and beta.
    """
    grads: list[list[Tensor | None]] = [[None] * 4 for _ in weights]
    dprojection: tuple[Tensor | None, Tensor | None] = (None, None)
    dx: Tensor | None = None

    first = saved[0]
    if projection is not None and unit.projection is not None:
        relu = unit.sites[0].relu
        dprojection = (
            k.conv_wgrad(dy, first.x, first.scale, first.shift, projection, *unit.projection, relu)
            if needs.projection[0]
            else None,
            dy.sum((0, 2, 3)) if needs.projection[1] else None,
        )

    grad = dy
    pending: list[Tensor] = []
    for index in reversed(range(len(weights))):
        site, weight, s = unit.sites[index], weights[index], saved[index]
        need_gamma, need_beta, need_weight, need_bias = needs.sites[index]
        need_input = needs.x or any(any(flags) for flags in needs.sites[:index])
        need_g = need_gamma or need_beta or need_input
        if pending and (need_bias or not need_g):
            grad, pending = _applied(k, grad, pending), []
        if need_bias:
            grads[index][3] = grad.sum((0, 2, 3))
        if not need_g:
            if need_weight:
                grads[index][2] = k.conv_wgrad(grad, s.x, s.scale, s.shift, weight, *site.conv, site.relu)
            break

        da = None
        if index == 0 and projection is not None and unit.projection is not None:
            # Two users of one activation: their gradients meet before the mask.
            da, _, _ = k.conv_dgrad(dy, projection, s.x, None, None, None, None, *unit.projection)
        # The sums of the other ranks are needed before a synchronised BN's gradient can be applied.
        apply = index == 0 and need_input and site.group is None
        grad, sum_g, sum_gx, dweight, dgamma = k.conv_backward(
            grad,
            pending,
            weight,
            s.x,
            [s.scale, s.shift, s.mean, s.rstd],
            da,
            dy if apply and unit.identity else None,
            *site.conv,
            site.batch_stats,
            apply,
            need_weight,
            site.relu,
        )
        if need_weight:
            grads[index][2] = dweight
        gamma_dtype, beta_dtype = dtypes[index]
        if need_gamma and gamma_dtype is not None:
            grads[index][0] = _as(dgamma, gamma_dtype)
        if need_beta and beta_dtype is not None:
            grads[index][1] = _as(sum_g, beta_dtype)
        if not need_input:
            break
        if site.group is not None:
            assert s.total is not None
            sum_g, sum_gx = summed(sum_g, sum_gx, values_per_channel(s.x.shape), s.total, site.group)
        pending = [s.x, s.mean, s.scale, s.rstd, *([sum_g, sum_gx] if site.batch_stats else [])]
        if index == 0:
            dx = grad if apply else _applied(k, grad, pending, dy if unit.identity else None)
    return UnitGrads(dx, grads, dprojection)


def _as(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """``vector.to(dtype)``, whose call would cost more than the comparison where there is nothing to do."""
    return vector if vector.dtype == dtype else vector.to(dtype)


def _applied(k: Any, g: Tensor, pending: list[Tensor], residual_grad: Tensor | None = None) -> Tensor:
    """The gradient that ``g`` and ``pending`` (see :func:`reference.conv_backward`) stand for."""
    x, mean, scale, rstd, *sums = pending
    sum_g, sum_gx = sums or (mean, mean)
    dx: Tensor = k.bn_backward_apply(g, x, mean, scale, rstd, sum_g, sum_gx, bool(sums), residual_grad)
    return dx


def values_per_channel(shape: Sequence[int]) -> int:
    """N H W of an image's shape."""
    return shape[0] * shape[2] * shape[3]
