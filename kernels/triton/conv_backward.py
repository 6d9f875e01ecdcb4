"""The backward of a site on Triton: its kernels one after the other.

The compiled CPU kernels do it in one pass over dy and x; here dgrad and wgrad are launches of their own, whose
partial sums a third one adds up. Where ``dy`` is the g of the BN behind, both may apply that BN's backward on load,
or it is stored once for both: :mod:`.choose` counts which moves less.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import split
from .bn_backward_apply import bn_backward_apply
from .choose import applies_on_load, call_of
from .conv_dgrad import launch_dgrad
from .conv_wgrad import as_strided_like, empty_dweight, launch_wgrad
from .finalize import sum_partials, sum_site
from .pending import stored


def conv_backward(
    dy: Tensor,
    pending: Sequence[Tensor],
    weight: Tensor,
    x: Tensor,
    bn: Sequence[Tensor],
    da: Tensor | None,
    residual_grad: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    training: bool,
    apply: bool,
    weight_grad: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """G (with ``apply`` dx), sum g, sum g (x - mean), dW and dgamma: like ``x``, [C], [C], like ``weight``, [C].

    ``bn``: scale, shift, mean, rstd. ``pending``, where not empty: ``dy`` is the g of the BN behind the convolution,
    whose input, mean, scale, rstd and, if it used the statistics of the batch, sum g and sum g (y - mean) it holds.
    """
    scale, shift, mean, rstd = bn
    call = call_of(x, weight, stride, padding, dilation, groups)
    if pending and not applies_on_load(call, weight_grad):
        dy, pending = stored(dy, pending), ()
    # What is pending from here on is on no split path: applies_on_load knows.
    weight_partials = launch_wgrad(call, dy, x, scale, shift, weight, relu, pending) if weight_grad else None
    dweight = weight.new_empty(0) if weight_partials is None else empty_dweight(weight)
    launched = launch_dgrad(call, dy, weight, x, (scale, shift, mean), da, relu, pending)
    if launched is not None:
        grad, partials = launched
        assert partials is not None, "a masked dgrad leaves partial sums"
        sum_g, sum_gx, dgamma = sum_site(partials, rstd, weight_partials, dweight)
    else:
        grad, sum_g, sum_gx = split.conv_dgrad(dy, weight, x, scale, shift, mean, da, call.geometry, relu)
        dgamma = rstd * sum_gx
        if weight_partials is not None:
            sum_partials(weight_partials, dweight)
    if weight_partials is not None:
        dweight = as_strided_like(dweight, weight)
    elif weight_grad:
        dweight = split.conv_wgrad(dy, x, scale, shift, weight, call.geometry, relu)
    if apply:
        grad = bn_backward_apply(grad, x, mean, scale, rstd, sum_g, sum_gx, training, residual_grad)
    return grad, sum_g, sum_gx, dweight, dgamma
