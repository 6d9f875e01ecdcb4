"""The network's head: BN -> ReLU -> global average pool, forward and backward, without storing the activated map."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    as_format_of,
    bn_backward,
    bn_relu,
    cdiv,
    channels_last,
    empty_floats,
    empty_image,
    launch,
    relu_mask,
)
from .configs import tile_config
from .finalize import sum_partials


@triton.jit
def _bn_relu_avg_pool_kernel(
    x_ptr,  # [N, HW, C]
    scale_ptr,
    shift_ptr,
    y_ptr,  # [N, C]
    HW,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for m0 in range(0, HW, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < HW)[:, None] & in_c[None, :]
        x = tl.load(x_ptr + (n * HW + m)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(mask, bn_relu(x, scale, shift), 0.0), axis=0)
    tl.store(y_ptr + n * C + c, (total / HW).to(y_ptr.dtype.element_ty), mask=in_c)


@triton.jit
def _bn_relu_avg_pool_reduce_kernel(
    dy_ptr,  # [N, C]
    x_ptr,  # [N, HW, C]
    scale_ptr,
    shift_ptr,
    mean_ptr,
    partials_ptr,  # [N, 2, C]: sum g, sum g (x - mu)
    HW,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    dy = tl.load(dy_ptr + n * C + c, mask=in_c, other=0.0).to(tl.float32) / HW
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_gx = tl.zeros((BLOCK_C,), tl.float32)
    for m0 in range(0, HW, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < HW)[:, None] & in_c[None, :]
        x = tl.load(x_ptr + (n * HW + m)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        passes = tl.where(mask, relu_mask(1.0, x, scale, shift), 0.0)
        sum_g += tl.sum(passes, axis=0)
        sum_gx += tl.sum(passes * (x - mean[None, :]), axis=0)
    # dy is the same for every pixel: a count of those that pass is exact, a sum of equal gradients is not.
    out = partials_ptr + n * (2 * C) + c
    tl.store(out, dy * sum_g, mask=in_c)
    tl.store(out + C, dy * sum_gx, mask=in_c)


@triton.jit
def _bn_relu_avg_pool_apply_kernel(
    dy_ptr,  # [N, C]
    x_ptr,  # [N, HW, C]
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    sum_g_ptr,
    sum_gx_ptr,
    dx_ptr,  # [N, HW, C]
    inv_m,
    HW,
    C,
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    rstd = tl.load(rstd_ptr + c, mask=in_c, other=0.0)
    sum_g = tl.load(sum_g_ptr + c, mask=in_c, other=0.0)
    sum_gx = tl.load(sum_gx_ptr + c, mask=in_c, other=0.0)
    dy = tl.load(dy_ptr + n * C + c, mask=in_c, other=0.0).to(tl.float32) / HW
    for m0 in range(0, HW, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m < HW)[:, None] & in_c[None, :]
        offset = (n * HW + m)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        g = relu_mask(dy[None, :], x, scale, shift)
        if TRAINING:
            dx = bn_backward(g, x, mean, scale, rstd, sum_g, sum_gx, inv_m)
        else:
            dx = scale[None, :] * g
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def bn_relu_avg_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Mean over H and W of max(s x + t, 0): [N,C,H,W] -> [N,C]."""
    x = channels_last(x)
    y = torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
    _launch_head(_bn_relu_avg_pool_kernel, x, x_ptr=x, scale_ptr=scale, shift_ptr=shift, y_ptr=y)
    return y


def bn_relu_avg_pool_reduce(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """sum g and sum g (x - mu), float32 [C] each, with g = dy / (H W) [z > 0]; ``dy`` [N,C] with any strides."""
    x, dy = channels_last(x), dy.contiguous()
    n, channels = x.shape[:2]
    partials = empty_floats(x, n, 2 * channels)
    _launch_head(
        _bn_relu_avg_pool_reduce_kernel,
        x,
        dy_ptr=dy,
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        mean_ptr=mean,
        partials_ptr=partials,
    )
    sum_g, sum_gx = empty_floats(x, channels), empty_floats(x, channels)
    sum_partials(partials, sum_g, sum_gx)
    return sum_g, sum_gx


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
    """dx like ``x`` [N,C,H,W], as :func:`bn_backward_apply` of g = dy / (H W) [z > 0], which is never stored."""
    source, x, dy = x, channels_last(x), dy.contiguous()
    n, channels, height, width = x.shape
    dx = empty_image(x, channels, height, width)
    _launch_head(
        _bn_relu_avg_pool_apply_kernel,
        x,
        dy_ptr=dy,
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        mean_ptr=mean,
        rstd_ptr=rstd,
        sum_g_ptr=sum_g,
        sum_gx_ptr=sum_gx,
        dx_ptr=dx,
        inv_m=1.0 / (n * height * width),
        TRAINING=training,
    )
    return as_format_of(dx, source)


def _launch_head(kernel: triton.JITFunction, x: Tensor, **arguments: Any) -> None:
    """One program per image and block of channels: a head's maps are small (7x7, 8x8)."""
    n, channels, height, width = x.shape
    config = tile_config(channels)
    block_m = max(8, min(config.block_m, triton.next_power_of_2(height * width)))
    launch(
        kernel,
        (n, cdiv(channels, config.block_c)),
        x.device,
        num_warps=config.num_warps,
        HW=height * width,
        C=channels,
        BLOCK_M=block_m,
        BLOCK_C=config.block_c,
        **arguments,
    )
