"""The activation alone, a = max(s x + t, 0) or s x + t: what the split path hands to a library convolution."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import bn_relu, cdiv, channels_last, empty_image, launch
from .configs import tile_config


@triton.jit
def _bn_relu_kernel(
    x_ptr,  # [rows, C]
    scale_ptr,
    shift_ptr,
    a_ptr,  # [rows, C]
    rows,
    C,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (m < rows)[:, None] & in_c[None, :]
    offset = m.to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    tl.store(a_ptr + offset, bn_relu(x, scale, shift, RELU).to(a_ptr.dtype.element_ty), mask=mask)


def activate(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """max(s x + t, 0), without ``relu`` s x + t, channels_last, of ``x`` [N,C,H,W] with float32 vectors [C]."""
    x = channels_last(x)
    n, channels, height, width = x.shape
    rows = n * height * width
    a = empty_image(x, channels, height, width)
    config = tile_config(channels)
    launch(
        _bn_relu_kernel,
        (cdiv(rows, config.block_m), cdiv(channels, config.block_c)),
        x.device,
        num_warps=config.num_warps,
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        a_ptr=a,
        rows=rows,
        C=channels,
        RELU=relu,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
    )
    return a
