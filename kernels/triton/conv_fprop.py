"""fprop: the convolution of max(s x + t, 0) or s x + t, with the identity addition and statistics in the epilogue.

An implicit GEMM on channels_last tensors: rows are output pixels, columns output channels, and the reduction
runs over the taps (r, s) and, innermost, the input channels. A tile of raw ``x`` is loaded, activated in
registers and fed to the tensor cores; the activated tensor never exists in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import split
from .bn_stats import bn_scale_shift
from .choose import Call, call_of, choose, planned
from .common import (
    Launcher,
    as_format_of,
    bn_relu,
    cdiv,
    channels_last,
    dot,
    empty_floats,
    empty_image,
    store_statistics,
    tile_statistics,
)
from .configs import flat_taps
from .finalize import TileStatistics, merge_statistics, merge_statistics_for
from .geometry import Geometry


@triton.jit
def _step(
    acc,
    x_row,
    w_tap,
    c,
    scale,
    shift,
    inside,
    in_c,
    in_k,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus one tap of one block of channels ``c``, activated on its way."""
    x = tl.load(x_row + c[None, :], mask=inside[:, None] & in_c[None, :], other=0.0)
    w = tl.load(w_tap + c[:, None], mask=in_c[:, None] & in_k[None, :], other=0.0)
    if PROLOGUE:
        a = bn_relu(x.to(tl.float32), scale, shift, RELU)
        # A padded tap is 0, not relu(shift): the mask comes after the activation.
        x = tl.where(inside[:, None], a, 0.0).to(w.dtype)
    return dot(x, w, acc, PRECISION)


@triton.jit
def _vectors(scale_ptr, shift_ptr, c, in_c, PROLOGUE: tl.constexpr):
    """Scale and shift of the channels ``c``; without a prologue nothing reads them."""
    if PROLOGUE:
        scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
        shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    else:
        scale = c
        shift = c
    return scale, shift


@triton.jit
def _conv_fprop_kernel(
    x_ptr,  # [N, H, W, C]
    scale_ptr,
    shift_ptr,
    w_ptr,  # [K, R, S, C]
    bias_ptr,
    residual_ptr,
    y_ptr,  # [N, OH, OW, K]
    partials_ptr,  # [tiles, 3, K]: mean (high, low) and M2 of the stored y
    rows,  # N * OH * OW
    H,
    W,
    C,
    OH,
    OW,
    K,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUT_RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share their rows of x: the second one finds them in L2.
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = m < rows
    if not POINTWISE:
        n = m // (OH * OW)
        ih0 = (m // OW) % OH * STRIDE_H - PAD_H
        iw0 = m % OW * STRIDE_W - PAD_W

    in_k = k < K
    w_k = w_ptr + k[None, :] * (R * S * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLAT:
        # One block holds all channels, so a loop over them would have one step and nothing to load ahead: the taps
        # are the pipelined loop.
        c = tl.arange(0, BLOCK_K)
        in_c = (c < C) | EVEN_C
        scale, shift = _vectors(scale_ptr, shift_ptr, c, in_c, PROLOGUE)
        for tap in range(R * S):
            ih, iw = ih0 + tap // S * DILATION_H, iw0 + tap % S * DILATION_W
            inside = valid & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            x_row = x_ptr + ((n * H + ih).to(tl.int64) * W + iw)[:, None] * C
            acc = _step(
                acc, x_row, w_k + tap * C, c, scale, shift, inside, in_c, in_k, PROLOGUE, RELU, PRECISION
            )
    else:
        # Nested loops on purpose: one flattened loop over taps and channels has been miscompiled with 8 warps.
        for r in range(R):
            for s in range(S):
                if POINTWISE:
                    inside = valid
                    x_row = x_ptr + m.to(tl.int64)[:, None] * C
                else:
                    ih, iw = ih0 + r * DILATION_H, iw0 + s * DILATION_W
                    inside = valid & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
                    x_row = x_ptr + ((n * H + ih).to(tl.int64) * W + iw)[:, None] * C
                w_tap = w_k + (r * S + s) * C
                for c0 in range(0, C, BLOCK_K):
                    c = c0 + tl.arange(0, BLOCK_K)
                    in_c = (c < C) | EVEN_C
                    scale, shift = _vectors(scale_ptr, shift_ptr, c, in_c, PROLOGUE)
                    acc = _step(
                        acc, x_row, w_tap, c, scale, shift, inside, in_c, in_k, PROLOGUE, RELU, PRECISION
                    )

    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    if OUTPUT_RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # not tl.maximum: NaN stays NaN
    offset = m.to(tl.int64)[:, None] * K + k[None, :]
    mask = valid[:, None] & in_k[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, y, mask=mask)
    if STATS:
        # Of the stored, rounded value: that is what the next BN reads.
        count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        high, low, m2 = tile_statistics(y.to(tl.float32), valid, count, False)
        store_statistics(partials_ptr, tile, K, k, high, low, m2)


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
    """y = conv(max(s x + t, 0), W) + bias + residual, and the mean and biased variance of the stored y.

    ``x`` [N,C,H,W], ``weight`` [K,C/groups,R,S], ``residual`` like y [N,K,OH,OW]. float32, bfloat16 or float16.
    Without ``relu`` the convolution reads s x + t, without ``scale`` and ``shift`` x as it is; with ``output_relu``
    it is max(conv(.) + bias, 0) + residual. Without ``stats`` the two statistics are empty.
    :mod:`.choose` says by which path; groups take the split one.
    """
    call = call_of(x, weight, stride, padding, dilation, groups)
    launched = _launch(call, x, (scale, shift), weight, bias, residual, stats, output_relu, relu)
    if launched is None:
        return split.conv_fprop(
            x, scale, shift, weight, bias, residual, call.geometry, stats, output_relu, relu
        )
    y, statistics = launched
    if statistics is None:
        return y, empty_floats(x, 0), empty_floats(x, 0)
    return y, *merge_statistics(statistics)


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
    """:func:`conv_fprop` and :func:`.bn_stats.bn_scale_shift` of the BN that reads y.

    Returns y, mean, var, scale, shift, rstd; the vectors are made where the partial statistics are merged.
    """
    call = call_of(x, weight, stride, padding, dilation, groups)
    launched = _launch(call, x, (scale, shift), weight, bias, None, True, False, relu)
    if launched is None:
        y, mean, var = split.conv_fprop(x, scale, shift, weight, bias, None, call.geometry, True, False, relu)
        return y, mean, var, *bn_scale_shift(mean, var, bn_weight, bn_bias, eps)
    y, statistics = launched
    assert statistics is not None, "they were asked for"
    return y, *merge_statistics_for(statistics, bn_weight, bn_bias, eps)


def _launch(
    call: Call,
    x: Tensor,
    prologue: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: bool,
    output_relu: bool,
    relu: bool,
) -> tuple[Tensor, TileStatistics | None] | None:
    """y, and with ``stats`` the statistics of its tiles. None: the split path serves."""
    flags = (prologue[0] is not None, relu, bias is not None, output_relu, residual is not None, stats)
    launcher, geometry, tiles, block_m = _plan(call, *flags)
    if launcher is None:
        return None
    source, x, weight = x, channels_last(x), channels_last(weight)
    y = empty_image(x, geometry.k, geometry.oh, geometry.ow)
    partials = empty_floats(x, tiles, 3, geometry.k) if stats else None
    statistics = None if partials is None else TileStatistics(partials, block_m, geometry.rows)
    residual = None if residual is None else channels_last(residual)
    launcher(x, *prologue, weight, bias, residual, y, partials)
    return as_format_of(y, source), statistics


@planned
def _plan(
    call: Call,
    prologue: bool,
    relu: bool,
    has_bias: bool,
    output_relu: bool,
    has_residual: bool,
    stats: bool,
) -> tuple[Launcher | None, Geometry, int, int]:
    """The launch (None: the split path's), how many tiles of rows leave partial statistics, and the rows of one."""
    geometry = call.geometry
    config = choose("fprop", call, *("residual",) * has_residual, *("stats",) * stats).config
    if config is None:
        return None, geometry, 0, 0
    tiles = cdiv(geometry.rows, config.block_m)
    launcher = Launcher(
        _conv_fprop_kernel,
        (tiles * cdiv(geometry.k, config.block_n),),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        rows=geometry.rows,
        **geometry.arguments(),
        PROLOGUE=prologue,
        RELU=relu,
        HAS_BIAS=has_bias,
        OUTPUT_RELU=output_relu,
        HAS_RESIDUAL=has_residual,
        STATS=stats,
        FLAT=flat_taps(geometry, geometry.c, config),
        EVEN_C=geometry.c % config.block_k == 0,
        PRECISION=call.precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return launcher, geometry, tiles, config.block_m
