"""The operations in plain PyTorch: what every kernel is checked against, and what serves where none is.

A *site* is BN -> ReLU -> convolution, or, with ``relu=False``, BN -> convolution. Its forward and its closed-form
backward are made of the functions below, each with the signature of the op of the same name in
:mod:`fused_preact.ops` and of the launcher of the same name in ``fused_preact.kernels.triton``.
:mod:`fused_preact.schedule` chains them into a whole residual unit. All of them take any floating dtype; float64
makes them the oracle.

Equations (He et al. 2016, arXiv:1603.05027, for the unit; Ioffe & Szegedy 2015, arXiv:1502.03167, for BN),
per channel, over m = N*H*W values:

    forward   r = (v + eps)^-1/2    s = gamma r    t = beta - mu s    z = s x + t    a = max(z, 0)
              y = conv(a, W) + bias + residual
    backward  da = dgrad(dy, W)     g = da [z > 0]     dW = wgrad(a, dy)
              dbeta = sum g         dgamma = r sum g (x - mu)
              dx = s (g - dbeta/m - (x - mu) r dgamma/m)      batch statistics
              dx = s g                                        running statistics

Without a ReLU a = z and g = da.

Tensors are N,C,H,W in either memory format; every output has the memory format of ``x``. Statistics and
per-channel vectors are float32, or float64 where ``x`` is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bn_backward_apply",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_apply",
    "bn_relu_avg_pool_reduce",
    "bn_scale_shift",
    "bn_stats",
    "bn_update_running",
    "conv_backward",
    "conv_dgrad",
    "conv_fprop",
    "conv_fprop_bn",
    "conv_output_size",
    "conv_wgrad",
    "memory_format_of",
    "statistics_dtype",
]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of means, variances and sums over tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format_of(x: Tensor) -> torch.memory_format:
    """``channels_last`` where ``x`` is dense in that order, else ``contiguous_format``."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    height, width = (
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    return height, width


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Z = s x + t, in the dtype of the statistics; rounded as PyTorch's BN on a CPU rounds it."""
    if x.dtype != scale.dtype:
        # A 16-bit x: the product is rounded as mu s was in t, so that a constant channel is exactly beta = 0. A fused
        # multiply and add would leave the rounding of t, of the size of mu s.
        return x.to(scale.dtype).mul_(_column(scale)).add_(_column(shift))
    return torch.addcmul(_column(shift), x.to(scale.dtype), _column(scale))


def _activate(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """A = max(s x + t, 0) or s x + t, rounded to the dtype of ``x`` as the convolution's input is."""
    z = _normalise(x, scale, shift)
    return (z.relu_() if relu else z).to(x.dtype)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel: ``x`` [N,C,H,W] -> two [C]."""
    if x.numel() == 0:
        # An empty batch has no statistics; zeros leave the (empty) output and the gradients finite.
        zeros = torch.zeros(x.shape[1], dtype=statistics_dtype(x.dtype), device=x.device)
        return zeros, zeros.clone()
    var, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), dim=(0, 2, 3), correction=0)
    return mean, var


def bn_scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """S = gamma r, t = beta - mu s and r = (v + eps)^-1/2, each [C]; gamma is 1 and beta 0 where absent."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd.clone() if weight is None else weight.to(rstd.dtype) * rstd
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.to(rstd.dtype)
    return scale, shift, rstd


def bn_update_running(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
    momentum: float | None,
    count: Sequence[int],
) -> None:
    """What BNs in training do to their buffers, in place: running <- running + momentum (new - running).

    Lists over the BNs, of counters all or none. The new variance is the unbiased one, over ``count`` values a
    channel; ``num_batches_tracked`` goes up by one, and ``momentum=None`` weighs by its reciprocal (the cumulative
    average), read on the device.
    """
    for i in range(len(mean)):
        weight: float | Tensor = 0.0 if momentum is None else momentum
        if num_batches_tracked:
            num_batches_tracked[i].add_(1)
            if momentum is None:
                # As a tensor: a Python number would need the counter on the host at every step.
                weight = num_batches_tracked[i].to(mean[i].dtype).reciprocal().to(running_mean[i].dtype)
        unbiased = var[i] * (count[i] / max(count[i] - 1, 1))
        running_mean[i].lerp_(mean[i].to(running_mean[i].dtype), weight)
        running_var[i].lerp_(unbiased.to(running_var[i].dtype), weight)


def conv_fprop(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stats: bool,
    output_relu: bool = False,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y = conv(a, W) + bias + residual, and the mean and biased variance of the stored y.

    The activation a is max(s x + t, 0), without ``relu`` s x + t. Zero padding is applied to it, so a padded tap is 0
    and not max(t, 0). With ``stats=False`` the two statistics have no elements. Inference folds BNs away: without
    ``scale`` and ``shift`` the convolution reads x as it is, with ``output_relu`` it is max(conv(.) + bias, 0) +
    residual.
    """
    a = x if scale is None or shift is None else _activate(x, scale, shift, relu)
    bias = None if bias is None else bias.to(weight.dtype)
    y = F.conv2d(a, weight, bias, stride, padding, dilation, groups)
    if output_relu:
        y = y.relu_()
    if residual is not None:
        y = y + residual
    y = y.contiguous(memory_format=memory_format_of(x))
    if not stats:
        empty = torch.empty(0, dtype=statistics_dtype(x.dtype), device=x.device)
        return y, empty, empty.clone()
    return y, *bn_stats(y)


def conv_fprop_bn(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`conv_fprop` and :func:`bn_scale_shift` of the BN that reads y: y, mean, var, scale, shift, rstd."""
    conv = stride, padding, dilation, groups
    y, mean, var = conv_fprop(x, scale, shift, weight, bias, None, *conv, True, False, relu)
    return y, mean, var, *bn_scale_shift(mean, var, bn_weight, bn_bias, eps)


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    da: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """G = (dgrad(dy, W) + da) [z > 0], sum g and sum g (x - mu): like ``x``, [C], [C].

    ``da`` is the gradient that a second user of the same activation sends; it is added before the mask. Without
    ``relu`` nothing is masked, with ``scale=None`` nothing is masked or summed: that is the form in which a second
    user computes ``da``.
    """
    grad = _conv_backward(dy, x, weight, stride, padding, dilation, groups, (True, False))[0]
    grad = grad.contiguous(memory_format=memory_format_of(x))
    if scale is None or shift is None or mean is None:
        empty = torch.empty(0, dtype=statistics_dtype(x.dtype), device=x.device)
        return grad, empty, empty.clone()
    if da is not None:
        grad = grad + da
    g = grad.masked_fill_(_normalise(x, scale, shift) <= 0, 0) if relu else grad
    wide = g.to(scale.dtype)
    sum_g = wide.sum((0, 2, 3))
    sum_gx = (wide * (x.to(scale.dtype) - _column(mean))).sum((0, 2, 3))
    return g, sum_g, sum_gx


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = True,
) -> Tensor:
    """dW of the convolution, with the shape, dtype and strides of ``weight``; the activation is recomputed."""
    activated = _activate(x, scale, shift, relu)
    dweight = _conv_backward(dy, activated, weight, stride, padding, dilation, groups, (False, True))[1]
    return torch.empty_like(weight).copy_(dweight)


def _conv_backward(
    dy: Tensor,
    activated: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, activated, weight, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
    )
    return dx, dweight


def bn_backward_apply(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    rstd: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    training: bool,
    residual_grad: Tensor | None,
) -> Tensor:
    """Dx = A g + B (x - mu) + C (+ the gradient of the identity path), with the memory format of ``x``.

    A = s, B = -s r^2 (sum g (x - mu)) / m, C = -s (sum g) / m; with running statistics B = C = 0.
    """
    wide = g.to(scale.dtype)
    if training:
        inv_m = 1.0 / max(x.numel() // max(x.shape[1], 1), 1)
        slope = _column(-scale * rstd * rstd * sum_gx * inv_m)
        offset = _column(-scale * sum_g * inv_m)
        dx = wide * _column(scale) + (x.to(scale.dtype) - _column(mean)) * slope + offset
    else:
        dx = wide * _column(scale)
    if residual_grad is not None:
        dx = dx + residual_grad.to(scale.dtype)
    return dx.to(x.dtype).contiguous(memory_format=memory_format_of(x))


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
    """The backward of a site: g (with ``apply`` dx instead), sum g, sum g (x - mu), dW, dgamma.

    ``bn`` is scale, shift, mean and rstd of the site's BN. ``dy`` is the gradient of the convolution's output
    y, or, with ``pending``, the g of the BN behind it: y and that BN's mean, scale, rstd, sum g and
    sum g (y - mu), the two sums only if it normalised with the statistics of the batch; see
    :func:`bn_backward_apply`. ``da`` is as in :func:`conv_dgrad`. ``training`` and ``residual_grad`` serve
    ``apply``; without ``weight_grad`` dW has no elements. Without ``relu`` the site has none.
    """
    scale, shift, mean, rstd = bn
    conv = (stride, padding, dilation, groups, relu)
    if pending:
        y, y_mean, y_scale, y_rstd, *sums = pending
        sum_dy, sum_dy_y = sums or (y_mean, y_mean)  # not read without the statistics of the batch
        dy = bn_backward_apply(dy, y, y_mean, y_scale, y_rstd, sum_dy, sum_dy_y, bool(sums), None)
    dweight = conv_wgrad(dy, x, scale, shift, weight, *conv) if weight_grad else weight.new_empty(0)
    grad, sum_g, sum_gx = conv_dgrad(dy, weight, x, scale, shift, mean, da, *conv)
    if apply:
        grad = bn_backward_apply(grad, x, mean, scale, rstd, sum_g, sum_gx, training, residual_grad)
    return grad, sum_g, sum_gx, dweight, rstd * sum_gx


def bn_relu_avg_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The network's head, mean over H and W of max(s x + t, 0): [N,C,H,W] -> [N,C]."""
    return _normalise(x, scale, shift).relu_().mean((2, 3)).to(x.dtype)


def _head_g(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """G = dy / (H W) [z > 0], in the dtype of the statistics."""
    spread = (dy.to(scale.dtype) / (x.shape[2] * x.shape[3]))[:, :, None, None]
    return torch.where(_normalise(x, scale, shift) <= 0, spread.new_zeros(()), spread)


def bn_relu_avg_pool_reduce(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of the head, first pass: sum g and sum g (x - mu), with g = dy / (H W) [z > 0]; ``dy`` is [N,C]."""
    g = _head_g(dy, x, scale, shift)
    return g.sum((0, 2, 3)), (g * (x.to(scale.dtype) - _column(mean))).sum((0, 2, 3))


def bn_relu_avg_pool_apply(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    training: bool,
) -> Tensor:
    """Backward of the head, second pass: dx as in :func:`bn_backward_apply`, without ever storing g."""
    g = _head_g(dy, x, scale, shift)
    return bn_backward_apply(g, x, mean, scale, rstd, sum_g, sum_gx, training, None)
