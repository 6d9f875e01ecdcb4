"""A BN backward that is applied where its result is read: the prologue of dgrad and wgrad.

``pending`` is the list that :func:`.conv_backward.conv_backward` takes: the BN's input y, mean, scale and rstd, [K],
and where it used the statistics of the batch sum g and sum g (y - mean).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .bn_backward_apply import bn_backward_apply
from .common import bn_backward, channels_last


@triton.jit
def load_bn_backward(mean_ptr, scale_ptr, rstd_ptr, sum_g_ptr, sum_gx_ptr, k, in_k, PENDING: tl.constexpr):
    """The vectors of channels ``k`` that :func:`apply_pending` takes; of a running BN the scale only is read."""
    scale = tl.load(scale_ptr + k, mask=in_k, other=0.0)
    if PENDING == "batch":
        mean = tl.load(mean_ptr + k, mask=in_k, other=0.0)
        rstd = tl.load(rstd_ptr + k, mask=in_k, other=0.0)
        sum_g = tl.load(sum_g_ptr + k, mask=in_k, other=0.0)
        sum_gx = tl.load(sum_gx_ptr + k, mask=in_k, other=0.0)
    else:
        mean, rstd, sum_g, sum_gx = scale, scale, scale, scale
    return mean, scale, rstd, sum_g, sum_gx


@triton.jit
def apply_pending(g, y_ptr, offset, mask, vectors, inv_m, PENDING: tl.constexpr):
    """A g + B (y - mean) + C of a tile [M, K], rounded to the dtype of g as if stored; 0 outside of the mask."""
    mean, scale, rstd, sum_g, sum_gx = vectors
    if PENDING == "batch":
        y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dy = bn_backward(g.to(tl.float32), y, mean, scale, rstd, sum_g, sum_gx, inv_m)
        # A pixel outside is 0, not what the BN makes of 0.
        dy = tl.where(mask, dy, 0.0)
    else:
        dy = g.to(tl.float32) * scale[None, :]
    return dy.to(g.dtype)


def pending_kind(length: int) -> str:
    """The kernels' constant for a ``pending`` of that length: statistics of the batch, running ones, or none."""
    return {0: "none", 6: "batch", 4: "running"}[length]


def pending_arguments(pending: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """y and the five vectors as the kernels take them, None where they read nothing."""
    if not pending:
        return (None,) * 6
    y, mean, scale, rstd, *sums = pending
    if not sums:
        return (None, None, scale, None, None, None)
    return (channels_last(y), mean, scale, rstd, *sums)


def stored(g: Tensor, pending: Sequence[Tensor]) -> Tensor:
    """The gradient that ``g`` and ``pending`` stand for, by a pass of its own; ``g`` where nothing is pending."""
    if not pending:
        return g
    y, mean, scale, rstd, *sums = pending
    sum_g, sum_gx = sums or (mean, mean)  # not read with running statistics
    return bn_backward_apply(g, y, mean, scale, rstd, sum_g, sum_gx, bool(sums), None)
