"""The backward of a site on Triton: its kernels one after the other.

The compiled CPU kernels do it in one pass over dy and x; here dgrad and wgrad are launches of their own. Where ``dy``
is the g of the BN behind, both may apply that BN's backward on load, or it is stored once for both: :mod:`.choose`
counts which moves less.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .bn_backward_apply import bn_backward_apply
from .choose import applies_on_load, call_of
from .conv_dgrad import conv_dgrad
from .conv_wgrad import conv_wgrad
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G (with ``apply`` dx), sum g, sum g (x - mean) and dW of a site: like ``x``, [C], [C], like ``weight``.

    ``bn``: scale, shift, mean, rstd. ``pending``, where not empty: ``dy`` is the g of the BN behind the convolution,
    whose input, mean, scale, rstd and, if it used the statistics of the batch, sum g and sum g (y - mean) it holds.
    """
    scale, shift, mean, rstd = bn
    conv = (stride, padding, dilation, groups)
    if pending and not applies_on_load(call_of(x, weight, *conv), weight_grad):
        dy, pending = stored(dy, pending), ()
    dweight = conv_wgrad(dy, x, scale, shift, weight, *conv, pending) if weight_grad else weight.new_empty(0)
    grad, sum_g, sum_gx = conv_dgrad(dy, weight, x, scale, shift, mean, da, *conv, pending)
    if apply:
        grad = bn_backward_apply(grad, x, mean, scale, rstd, sum_g, sum_gx, training, residual_grad)
    return grad, sum_g, sum_gx, dweight
