"""Finalising: partial results of the tiles -> per-channel vectors, as a tree of fixed shape.

No atomics anywhere: the order of every sum is that of the tiles, so two runs give the same bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Launcher, cdiv, empty_floats, power_of_two, store_scale_shift, store_statistics

# Partials merged by one program: one level up to 1024 tiles (131,072 pixels in tiles of 128, ResNet-164 at a batch of
# 128), two up to 2^20. A second launch would cost more than four steps of this one.
_FAN_IN = 1024


@triton.jit
def _merge_statistics_kernel(
    partials_ptr,  # [tiles, 3, C]: mean (high, low) and M2
    mean_ptr,  # [C] in the last level, else partials [groups, 3, C]
    var_ptr,  # [C] in the last level
    gamma_ptr,  # of the BN that normalises with them, where SCALE
    beta_ptr,
    scale_ptr,
    shift_ptr,
    rstd_ptr,
    tiles,
    rows_per_tile,
    rows,
    C,
    eps,
    FAN_IN: tl.constexpr,
    LAST: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over up to FAN_IN tiles; the last level turns M2 into the biased variance, and with SCALE both
    into the vectors of the next prologue.
    """
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
        # Rounded correctly: tiles of one value then have its mean, and nothing between them.
        part = tl.div_rn(tl.sum(mean_i * count[:, None], axis=0), total)
        between = tl.where(mask, mean_i - part[None, :], 0.0)
        part_m2 = tl.sum(m2_i + between * between * count[:, None], axis=0)
        # These tiles and those seen before.
        share = tl.div_rn(total, seen + total)
        delta = part - mean
        mean += delta * share
        m2 += part_m2 + delta * delta * (seen * share)
        seen += total

    high = pivot + mean
    if LAST:
        var = m2 / seen
        tl.store(mean_ptr + c, high, mask=c < C)
        tl.store(var_ptr + c, var, mask=c < C)
        if SCALE:
            store_scale_shift(
                high, var, gamma_ptr, beta_ptr, scale_ptr, shift_ptr, rstd_ptr, eps, c, C, HAS_GAMMA, HAS_BETA
            )
    else:
        store_statistics(mean_ptr, group, C, c, high, mean - (high - pivot), m2)


@triton.jit
def _sum_rows(partials_ptr, i, first, last, L, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):
    """Rows [first, last) of partials [tiles, L] added up, columns ``i``."""
    total = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & (i < L)[None, :]
        part = tl.load(partials_ptr + tile.to(tl.int64)[:, None] * L + i[None, :], mask=mask, other=0.0)
        total += tl.sum(part, axis=0)
    return total


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
    last = tl.minimum((group + 1) * FAN_IN, tiles)
    total = _sum_rows(partials_ptr, i, group * FAN_IN, last, L, BLOCK_T, BLOCK_L)
    total = total.to(out_ptr.dtype.element_ty)
    flat = group.to(tl.int64) * L + i
    tl.store(out_ptr + flat, total, mask=(flat < HALF) & (i < L))
    tl.store(tail_ptr + (flat - HALF), total, mask=(flat >= HALF) & (i < L))


@triton.jit
def _sum_site_kernel(
    partials_ptr,  # [tiles, 2, C]
    sum_g_ptr,
    sum_gx_ptr,
    rstd_ptr,
    dgamma_ptr,
    weight_partials_ptr,  # [splits, L]
    dweight_ptr,  # [L]
    tiles,
    C,
    splits,
    L,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The first programs add up a site's vectors, the others its weight gradient."""
    block = tl.program_id(0)
    of_vectors = tl.cdiv(C, BLOCK_C)
    if block < of_vectors:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        # Rows of the vectors lie two by two, [sum g, sum g (x - mu)].
        sum_g = _sum_rows(partials_ptr, tl.where(c < C, c, 2 * C), 0, tiles, 2 * C, BLOCK_T, BLOCK_C)
        sum_gx = _sum_rows(partials_ptr, C + c, 0, tiles, 2 * C, BLOCK_T, BLOCK_C)
        rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
        tl.store(sum_g_ptr + c, sum_g, mask=c < C)
        tl.store(sum_gx_ptr + c, sum_gx, mask=c < C)
        tl.store(dgamma_ptr + c, rstd * sum_gx, mask=c < C)
    elif HAS_WEIGHT:
        i = (block - of_vectors).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
        total = _sum_rows(weight_partials_ptr, i, 0, splits, L, BLOCK_S, BLOCK_L)
        tl.store(dweight_ptr + i, total.to(dweight_ptr.dtype.element_ty), mask=i < L)


class TileStatistics(NamedTuple):
    """The statistics of an image's tiles, as :func:`.common.store_statistics` leaves them."""

    partials: Tensor
    """Mean (high, low) and M2, float32 [tiles, 3, C]."""
    rows_per_tile: int
    """Pixels of every tile but the last."""
    rows: int
    """Pixels of all tiles, N H W."""


def merge_statistics(tiles: TileStatistics) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, [C] each."""
    channels = tiles.partials.shape[2]
    mean, var = empty_floats(tiles.partials, channels), empty_floats(tiles.partials, channels)
    partials, launcher = _merged(tiles, None)
    launcher(partials, mean, var, None, None, None, None, None)
    return mean, var


def merge_statistics_for(
    tiles: TileStatistics, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`merge_statistics`, and scale, shift and rstd of the BN that normalises with them, as
    :func:`.bn_stats.bn_scale_shift` makes them.
    """
    channels = tiles.partials.shape[2]
    mean, var, scale, shift, rstd = (empty_floats(tiles.partials, channels) for _ in range(5))
    partials, launcher = _merged(tiles, (eps, gamma is not None, beta is not None))
    launcher(partials, mean, var, gamma, beta, scale, shift, rstd)
    return mean, var, scale, shift, rstd


def _merged(statistics: TileStatistics, bn: tuple[float, bool, bool] | None) -> tuple[Tensor, Launcher]:
    """Partials of no more tiles than one program merges, and the launch of the last level."""
    partials, rows_per_tile, rows = statistics
    tiles, _, channels = partials.shape
    while tiles > _FAN_IN:
        groups = cdiv(tiles, _FAN_IN)
        merged = empty_floats(partials, groups, 3, channels)
        launcher = _merge_launcher(tiles, rows_per_tile, rows, channels, None)
        launcher(partials, merged, None, None, None, None, None, None)
        partials, tiles, rows_per_tile = merged, groups, rows_per_tile * _FAN_IN
    return partials, _merge_launcher(tiles, rows_per_tile, rows, channels, bn)


@functools.lru_cache(maxsize=4096)
def _merge_launcher(
    tiles: int, rows_per_tile: int, rows: int, channels: int, bn: tuple[float, bool, bool] | None
) -> Launcher:
    """``bn``: eps of the next BN, and whether it has a weight and a bias."""
    groups, block_c = cdiv(tiles, _FAN_IN), power_of_two(channels, 1, 16)
    eps, has_gamma, has_beta = bn or (0.0, False, False)
    return Launcher(
        _merge_statistics_kernel,
        (groups, cdiv(channels, block_c)),
        num_warps=8,
        tiles=tiles,
        rows_per_tile=rows_per_tile,
        rows=rows,
        C=channels,
        eps=eps,
        FAN_IN=_FAN_IN,
        LAST=groups == 1,
        SCALE=bn is not None,
        HAS_GAMMA=has_gamma,
        HAS_BETA=has_beta,
        BLOCK_T=power_of_two(tiles, 16, 256),
        BLOCK_C=block_c,
    )


def sum_partials(partials: Tensor, out: Tensor, tail: Tensor | None = None) -> None:
    """Sum float32 partials [tiles, L] over the tiles into ``out`` (and ``tail``, where the L are two vectors)."""
    partials = _last_level(partials)
    tiles, length = partials.shape
    _sum_launcher(tiles, length, out.numel())(partials, out, out if tail is None else tail)


def _last_level(partials: Tensor) -> Tensor:
    """Partials of no more tiles than one program adds up."""
    tiles, length = partials.shape
    while tiles > _FAN_IN:
        tiles_before, tiles = tiles, cdiv(tiles, _FAN_IN)
        level = empty_floats(partials, tiles, length)
        _sum_launcher(tiles_before, length, level.numel())(partials, level, level)
        partials = level
    return partials


def sum_site(
    partials: Tensor, rstd: Tensor, weight_partials: Tensor | None, dweight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum g, sum g (x - mu) and dgamma = rstd sum g (x - mu), [C] each, of partials [tiles, 2 C].

    In the same launch ``weight_partials`` [splits, L] are summed into ``dweight``.
    """
    partials = _last_level(partials)
    tiles, channels = partials.shape[0], rstd.shape[0]
    splits, length = (0, 0) if weight_partials is None else weight_partials.shape
    sum_g, sum_gx, dgamma = (empty_floats(rstd, channels) for _ in range(3))
    launcher = _site_launcher(tiles, channels, splits, length)
    launcher(partials, sum_g, sum_gx, rstd, dgamma, weight_partials, dweight)
    return sum_g, sum_gx, dgamma


def _blocks(tiles: int, length: int) -> tuple[int, int]:
    """Tiles and columns of a step: many tiles of two vectors or few of a weight's length, 4096 values either way."""
    block_t = power_of_two(tiles, 32, 128)
    return block_t, power_of_two(length, 16, 4096 // block_t)


@functools.lru_cache(maxsize=4096)
def _sum_launcher(tiles: int, length: int, half: int) -> Launcher:
    block_t, block_l = _blocks(tiles, length)
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


@functools.lru_cache(maxsize=4096)
def _site_launcher(tiles: int, channels: int, splits: int, length: int) -> Launcher:
    (block_t, block_c), (block_s, block_l) = _blocks(tiles, channels), _blocks(splits, length)
    return Launcher(
        _sum_site_kernel,
        (cdiv(channels, block_c) + cdiv(length, block_l),),
        num_warps=4,
        tiles=tiles,
        C=channels,
        splits=splits,
        L=length,
        HAS_WEIGHT=length > 0,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        BLOCK_L=block_l,
    )
