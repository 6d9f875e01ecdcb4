"""Backward of BN applied: dx = A g + B (x - mu) + C, with the gradient of the identity path in the same pass."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from .common import Launcher, as_format_of, bn_backward, cdiv, channels_last, empty_image
from .configs import tile_config


@triton.jit
def _bn_backward_apply_kernel(
    g_ptr,  # [rows, C]
    x_ptr,  # [rows, C]
    mean_ptr,
    scale_ptr,
    rstd_ptr,
    sum_g_ptr,
    sum_gx_ptr,
    residual_grad_ptr,  # [rows, C]
    dx_ptr,  # [rows, C]
    inv_m,
    rows,
    C,
    TRAINING: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (m < rows)[:, None] & in_c[None, :]
    offset = m.to(tl.int64)[:, None] * C + c[None, :]
    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    if TRAINING:
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
        rstd = tl.load(rstd_ptr + c, mask=in_c, other=0.0)
        sum_g = tl.load(sum_g_ptr + c, mask=in_c, other=0.0)
        sum_gx = tl.load(sum_gx_ptr + c, mask=in_c, other=0.0)
        dx = bn_backward(g, x, mean, scale, rstd, sum_g, sum_gx, inv_m)
    else:
        dx = scale[None, :] * g
    if HAS_RESIDUAL:
        dx += tl.load(residual_grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    """dx like ``x`` [N,C,H,W]; ``g`` and ``residual_grad`` may have any strides; vectors are float32 [C]."""
    source, x, g = x, channels_last(x), channels_last(g)
    n, channels, height, width = x.shape
    dx = empty_image(x, channels, height, width)
    residual_grad = None if residual_grad is None else channels_last(residual_grad)
    launcher = _launcher(n * height * width, channels, training, residual_grad is not None)
    launcher(g, x, mean, scale, rstd, sum_g, sum_gx, residual_grad, dx)
    return as_format_of(dx, source)


@functools.lru_cache(maxsize=4096)
def _launcher(rows: int, channels: int, training: bool, has_residual: bool) -> Launcher:
    config = tile_config(channels)
    return Launcher(
        _bn_backward_apply_kernel,
        (cdiv(rows, config.block_m), cdiv(channels, config.block_c)),
        num_warps=config.num_warps,
        inv_m=1.0 / rows,
        rows=rows,
        C=channels,
        TRAINING=training,
        HAS_RESIDUAL=has_residual,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
    )
