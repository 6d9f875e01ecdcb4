"""Finalising: partial results of the tiles -> per-channel vectors, as a tree of fixed shape.

No atomics anywhere: the order of every sum is that of the tiles, so two runs give the same bits.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from .common import Launcher, cdiv, empty_floats, power_of_two, store_statistics

# Partials merged by one program: one level up to 1024 tiles (131,072 pixels in tiles of 128, ResNet-164 at a batch of
# 128), two up to 2^20. A second launch would cost more than four steps of this one.
_FAN_IN = 1024


@triton.jit
def _merge_statistics_kernel(
    partials_ptr,  # [tiles, 3, C]: mean (high, low) and M2
    mean_ptr,  # [C] in the last level, else partials [groups, 3, C]
    var_ptr,  # [C] in the last level
    tiles,
    rows_per_tile,
    rows,
    C,
    FAN_IN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over up to FAN_IN tiles; the last level turns M2 into the biased variance."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = group * FAN_IN
    last = tl.minimum(first + FAN_IN, tiles)
    # Relative to the first tile's mean everything is of the size of the data's spread, whatever its mean.
    pivot = tl.load(partials_ptr + first.to(tl.int64) * (3 * C) + c, mask=c < C, other=0.0)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    seen = tl.full((), 0.0, tl.float32)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & (c < C)[None, :]
        count = tl.minimum(rows_per_tile, tl.maximum(rows - tile.to(tl.int64) * rows_per_tile, 0))
        count = tl.where(tile < last, count, 0).to(tl.float32)
        base = partials_ptr + tile.to(tl.int64)[:, None] * (3 * C) + c[None, :]
        high = tl.load(base, mask=mask, other=0.0)
        low = tl.load(base + C, mask=mask, other=0.0)
        m2_i = tl.load(base + 2 * C, mask=mask, other=0.0)
        mean_i = tl.where(mask, high - pivot[None, :] + low, 0.0)
        total = tl.sum(count, axis=0)
        part = tl.sum(mean_i * count[:, None], axis=0) / total
        between = tl.where(mask, mean_i - part[None, :], 0.0)
        part_m2 = tl.sum(m2_i + between * between * count[:, None], axis=0)
        # These tiles and those seen before.
        share = total / (seen + total)
        delta = part - mean
        mean += delta * share
        m2 += part_m2 + delta * delta * (seen * share)
        seen += total

    high = pivot + mean
    if LAST:
        tl.store(mean_ptr + c, high, mask=c < C)
        tl.store(var_ptr + c, m2 / seen, mask=c < C)
    else:
        store_statistics(mean_ptr, group, C, c, high, mean - (high - pivot), m2)


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # [tiles, L]
    out_ptr,  # [groups, L]; in the last level the first HALF of one row,
    tail_ptr,  # and the rest of it
    tiles,
    L,
    HALF,
    FAN_IN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    group = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    first = group * FAN_IN
    last = tl.minimum(first + FAN_IN, tiles)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & (i < L)[None, :]
        part = tl.load(partials_ptr + tile.to(tl.int64)[:, None] * L + i[None, :], mask=mask, other=0.0)
        total += tl.sum(part, axis=0)
    total = total.to(out_ptr.dtype.element_ty)
    flat = group.to(tl.int64) * L + i
    tl.store(out_ptr + flat, total, mask=flat < HALF)
    tl.store(tail_ptr + (flat - HALF), total, mask=(flat >= HALF) & (i < L))


def merge_statistics(partials: Tensor, rows_per_tile: int, rows: int) -> tuple[Tensor, Tensor]:
    """Per-tile (mean high, mean low, M2) [tiles, 3, C] over ``rows_per_tile`` rows each -> mean, biased variance."""
    tiles, _, channels = partials.shape
    while True:
        launcher, groups = _merge_launcher(tiles, rows_per_tile, rows, channels)
        if groups == 1:
            mean, var = empty_floats(partials, channels), empty_floats(partials, channels)
            launcher(partials, mean, var)
            return mean, var
        merged = empty_floats(partials, groups, 3, channels)
        launcher(partials, merged, None)
        partials, tiles, rows_per_tile = merged, groups, rows_per_tile * _FAN_IN


@functools.lru_cache(maxsize=4096)
def _merge_launcher(tiles: int, rows_per_tile: int, rows: int, channels: int) -> tuple[Launcher, int]:
    groups, block_c = cdiv(tiles, _FAN_IN), power_of_two(channels, 1, 16)
    launcher = Launcher(
        _merge_statistics_kernel,
        (groups, cdiv(channels, block_c)),
        num_warps=8,
        tiles=tiles,
        rows_per_tile=rows_per_tile,
        rows=rows,
        C=channels,
        FAN_IN=_FAN_IN,
        LAST=groups == 1,
        BLOCK_T=power_of_two(tiles, 16, 256),
        BLOCK_C=block_c,
    )
    return launcher, groups


def sum_partials(partials: Tensor, out: Tensor, tail: Tensor | None = None) -> None:
    """Sum float32 partials [tiles, L] over the tiles into ``out`` (and ``tail``, where the L are two vectors)."""
    tiles, length = partials.shape
    while tiles > _FAN_IN:
        groups = cdiv(tiles, _FAN_IN)
        level = empty_floats(partials, groups, length)
        _sum_launcher(tiles, length, level.numel())(partials, level, level)
        partials, tiles = level, groups
    _sum_launcher(tiles, length, out.numel())(partials, out, out if tail is None else tail)


@functools.lru_cache(maxsize=4096)
def _sum_launcher(tiles: int, length: int, half: int) -> Launcher:
    # Few tiles of a weight's length, or many tiles of two vectors: 4096 values a step either way.
    block_t = power_of_two(tiles, 32, 128)
    block_l = power_of_two(length, 16, 4096 // block_t)
    return Launcher(
        _sum_partials_kernel,
        (cdiv(length, block_l), cdiv(tiles, _FAN_IN)),
        num_warps=4,
        tiles=tiles,
        L=length,
        HALF=half,
        FAN_IN=_FAN_IN,
        BLOCK_T=block_t,
        BLOCK_L=block_l,
    )
