"""The schedule of a site and of a whole residual unit over any backend's operations.

A backend is anything with the functions of :mod:`fused_preact.reference`; the forward and the
closed-form backward below chain them. With ``reference`` as the backend they are the reference of a unit.

Schedule "c1": each convolution's epilogue reduces the statistics of what it stores for the next BN, the
identity is added in the last epilogue, and in backward one pass per site applies the BN gradient and adds
the identity's gradient. Kept between forward and backward are ``x``, the raw convolution outputs inside the
unit, per-channel vectors and the parameters; nothing else has the size of an activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Conv(NamedTuple):
    """The constants of one convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Site(NamedTuple):
    """The constants of one BN -> ReLU -> convolution site."""

    conv: Conv
    eps: float
    batch_stats: bool
    """Whether BN normalises with the statistics of the batch (training) or with given, constant ones."""


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
    eval mode, None for a site that takes them from the epilogue before it.
    """
    h = x
    produced: tuple[Tensor, Tensor] | None = None
    used: list[tuple[Tensor, Tensor]] = []
    saved: list[SiteSaved] = []
    for index, (site, tensors) in enumerate(zip(unit.sites, sites, strict=True)):
        mean, var = _one(statistics[index], produced)
        scale, shift, rstd = k.bn_scale_shift(mean, var, tensors.gamma, tensors.beta, site.eps)
        used.append((mean, var))
        saved.append(SiteSaved(h, mean, scale, shift, rstd))

        last = index + 1 == len(unit.sites)
        stats = unit.output_stats if last else unit.sites[index + 1].batch_stats
        added = None
        if last:
            added = x if unit.identity else residual
            if projection is not None and unit.projection is not None:
                # The projection reads the activation of the first site, recomputed by the same prologue.
                first = saved[0]
                added, _, _ = k.conv_fprop(
                    x, first.scale, first.shift, *projection, None, *unit.projection, False
                )
        h, new_mean, new_var = k.conv_fprop(
            h, scale, shift, tensors.weight, tensors.bias, added, *site.conv, stats
        )
        produced = (new_mean, new_var)
    assert produced is not None, "a unit has at least one site"
    return UnitResult(h, produced, used, saved)


def _one(
    given: tuple[Tensor, Tensor] | None, produced: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    statistics = produced if given is None else given
    assert statistics is not None, "the first site's statistics are given"
    return statistics


class UnitNeeds(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    sites: list[tuple[bool, bool, bool, bool]]
    projection: tuple[bool, bool]


class UnitGrads(NamedTuple):
    """The gradients, None where not asked for."""

    x: Tensor | None
    sites: list[list[Tensor | None]]
    projection: tuple[Tensor | None, Tensor | None]


def unit_backward(
    k: Any,
    unit: Unit,
    saved: list[SiteSaved],
    sites: list[SiteTensors],
    projection: tuple[Tensor, Tensor | None] | None,
    dy: Tensor,
    needs: UnitNeeds,
) -> UnitGrads:
    """Closed-form backward of :func:`unit_forward`; ``dy`` is never written to."""
    grads: list[list[Tensor | None]] = [[None] * 4 for _ in sites]
    dprojection: tuple[Tensor | None, Tensor | None] = (None, None)
    dx: Tensor | None = None

    first = saved[0]
    if projection is not None and unit.projection is not None:
        weight, _ = projection
        dprojection = (
            k.conv_wgrad(dy, first.x, first.scale, first.shift, weight, *unit.projection)
            if needs.projection[0]
            else None,
            dy.sum((0, 2, 3)) if needs.projection[1] else None,
        )

    grad = dy
    for index in reversed(range(len(sites))):
        site, tensors, s = unit.sites[index], sites[index], saved[index]
        need_gamma, need_beta, need_weight, need_bias = needs.sites[index]
        if need_weight:
            grads[index][2] = k.conv_wgrad(grad, s.x, s.scale, s.shift, tensors.weight, *site.conv)
        if need_bias:
            grads[index][3] = grad.sum((0, 2, 3))

        need_input = needs.x or any(any(flags) for flags in needs.sites[:index])
        if not (need_gamma or need_beta or need_input):
            break
        da = None
        if index == 0 and projection is not None and unit.projection is not None:
            # Two users of one activation: their gradients meet before the ReLU's mask.
            da, _, _ = k.conv_dgrad(dy, projection[0], s.x, None, None, None, None, *unit.projection)
        g, sum_g, sum_gx = k.conv_dgrad(grad, tensors.weight, s.x, s.scale, s.shift, s.mean, da, *site.conv)
        if need_gamma and tensors.gamma is not None:
            grads[index][0] = (s.rstd * sum_gx).to(tensors.gamma.dtype)
        if need_beta and tensors.beta is not None:
            grads[index][1] = sum_g.to(tensors.beta.dtype)
        if not need_input:
            break
        identity_grad = dy if index == 0 and unit.identity else None
        grad = k.bn_backward_apply(
            g, s.x, s.mean, s.scale, s.rstd, sum_g, sum_gx, site.batch_stats, identity_grad
        )
        if index == 0:
            dx = grad
    return UnitGrads(dx, grads, dprojection)
