"""Statistics of a tensor whose producer did not make them, and the per-channel vectors of the prologue."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Device,
    Launcher,
    cdiv,
    channels_last,
    device_of,
    empty_floats,
    power_of_two,
    store_scale_shift,
    store_statistics,
    tile_statistics,
)
from .configs import tile_config
from .finalize import TileStatistics, merge_statistics


@triton.jit
def _bn_stats_kernel(
    x_ptr,  # [rows, C]
    added_ptr,  # [rows, C]
    y_ptr,  # [rows, C]
    partials_ptr,  # [tiles, 3, C]: mean (high, low) and M2
    rows,
    C,
    rows_per_tile,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tile * rows_per_tile
    end = tl.minimum(start + rows_per_tile, rows)
    # Shifted by the tile's first row: exact, and the running mean is then as small as the spread.
    first = start.to(tl.int64) * C + c
    pivot = tl.load(x_ptr + first, mask=c < C, other=0.0).to(tl.float32)
    if ADD:
        pivot += tl.load(added_ptr + first, mask=c < C, other=0.0).to(tl.float32)
        pivot = pivot.to(y_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        valid = m < end
        offset = m.to(tl.int64)[:, None] * C + c[None, :]
        mask = valid[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            # The statistics are those of the stored, rounded sum.
            x += tl.load(added_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            y = x.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offset, y, mask=mask)
            x = y.to(tl.float32)
        seen = (m0 - start).to(tl.float32)
        count = tl.minimum(end - m0, BLOCK_M).to(tl.float32)
        high, low, block_m2 = tile_statistics(x - pivot[None, :], valid, count, True)
        # Chan's formula for two parts.
        delta = high + low - mean
        mean += delta * (count / (seen + count))
        m2 += block_m2 + delta * delta * (seen * count / (seen + count))
    high = pivot + mean
    store_statistics(partials_ptr, tile, C, c, high, mean - (high - pivot), m2)


@triton.jit
def _bn_scale_shift_kernel(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    rstd_ptr,
    eps,
    C,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    var = tl.load(var_ptr + c, mask=mask, other=1.0)
    store_scale_shift(
        mean, var, weight_ptr, bias_ptr, scale_ptr, shift_ptr, rstd_ptr, eps, c, C, HAS_WEIGHT, HAS_BIAS
    )


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel: ``x`` [N,C,H,W] -> two float32 [C]."""
    return _statistics(channels_last(x), None, None)


def add_stats(x: Tensor, added: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + added (channels_last), and its mean and biased variance, in one pass over [N,C,H,W] tensors."""
    x = channels_last(x)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, *_statistics(x, channels_last(added), y)


def _statistics(x: Tensor, added: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    n, channels, height, width = x.shape
    rows = n * height * width
    launcher, tiles, rows_per_tile = _launcher(rows, channels, added is not None, device_of(x))
    partials = empty_floats(x, tiles, 3, channels)
    launcher(x, added, y, partials)
    return merge_statistics(TileStatistics(partials, rows_per_tile, rows))


@functools.lru_cache(maxsize=4096)
def _launcher(rows: int, channels: int, add: bool, device: Device) -> tuple[Launcher, int, int]:
    config = tile_config(channels)
    # Enough programs for four waves; each walks its rows block by block.
    wanted = cdiv(4 * device.multiprocessors, cdiv(channels, config.block_c))
    rows_per_tile = cdiv(cdiv(rows, wanted), config.block_m) * config.block_m
    tiles = cdiv(rows, rows_per_tile)
    launcher = Launcher(
        _bn_stats_kernel,
        (tiles, cdiv(channels, config.block_c)),
        num_warps=config.num_warps,
        num_stages=2,
        rows=rows,
        C=channels,
        rows_per_tile=rows_per_tile,
        ADD=add,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
    )
    return launcher, tiles, rows_per_tile


def bn_scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """s = gamma r, t = beta - mu s and r = (v + eps)^-1/2, each float32 [C]."""
    channels = mean.shape[0]
    scale, shift, rstd = (empty_floats(mean, channels) for _ in range(3))
    launcher = _scale_shift_launcher(channels, eps, weight is not None, bias is not None)
    launcher(mean, var, weight, bias, scale, shift, rstd)
    return scale, shift, rstd


@functools.lru_cache(maxsize=4096)
def _scale_shift_launcher(channels: int, eps: float, has_weight: bool, has_bias: bool) -> Launcher:
    block_c = power_of_two(channels, 32, 256)
    return Launcher(
        _bn_scale_shift_kernel,
        (cdiv(channels, block_c),),
        num_warps=1,
        eps=eps,
        C=channels,
        HAS_WEIGHT=has_weight,
        HAS_BIAS=has_bias,
        BLOCK_C=block_c,
    )
