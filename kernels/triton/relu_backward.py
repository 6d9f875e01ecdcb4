"""The epilogue of dgrad alone, g = (da + db) [z > 0] with its sums: what the split path runs behind the library's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, channels_last, empty_floats, empty_image, launch, relu_mask
from .configs import tile_config
from .finalize import sum_partials


@triton.jit
def _relu_backward_kernel(
    da_ptr,  # [rows, C]
    db_ptr,  # [rows, C]
    x_ptr,  # [rows, C]
    scale_ptr,
    shift_ptr,
    mean_ptr,
    g_ptr,  # [rows, C]
    partials_ptr,  # [tiles, 2, C]: sum g, sum g (x - mu)
    rows,
    C,
    HAS_DB: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (m < rows)[:, None] & in_c[None, :]
    offset = m.to(tl.int64)[:, None] * C + c[None, :]
    da = tl.load(da_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_DB:
        da += tl.load(db_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    g = relu_mask(da, x, scale, shift, RELU).to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + offset, g, mask=mask)
    # Of the stored, rounded value, and without the rows past the end.
    stored = tl.where(mask, g.to(tl.float32), 0.0)
    centred = tl.where(mask, x - mean[None, :], 0.0)
    out = partials_ptr + tile.to(tl.int64) * (2 * C) + c
    tl.store(out, tl.sum(stored, axis=0), mask=in_c)
    tl.store(out + C, tl.sum(stored * centred, axis=0), mask=in_c)


def relu_backward(
    da: Tensor, db: Tensor | None, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g = (da + db) [z > 0] like ``x`` (channels_last), sum g and sum g (x - mu), float32 [C] each.

    Without ``relu`` nothing is masked.
    """
    da, x = channels_last(da), channels_last(x)
    n, channels, height, width = x.shape
    rows = n * height * width
    config = tile_config(channels)
    tiles = cdiv(rows, config.block_m)
    g = empty_image(x, channels, height, width)
    partials = empty_floats(x, tiles, 2 * channels)
    launch(
        _relu_backward_kernel,
        (tiles, cdiv(channels, config.block_c)),
        x.device,
        num_warps=config.num_warps,
        da_ptr=da,
        db_ptr=None if db is None else channels_last(db),
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        mean_ptr=mean,
        g_ptr=g,
        partials_ptr=partials,
        rows=rows,
        C=channels,
        HAS_DB=db is not None,
        RELU=relu,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
    )
    sum_g, sum_gx = empty_floats(x, channels), empty_floats(x, channels)
    sum_partials(partials, sum_g, sum_gx)
    return g, sum_g, sum_gx
