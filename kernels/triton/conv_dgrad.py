"""dgrad: the gradient of the activated input, masked by the recomputed ReLU and reduced for BN in the epilogue.

An implicit GEMM whose rows are input pixels and whose reduction runs over the taps and output channels. With a
stride, pixels are taken by phase, (h mod stride_h, w mod stride_w): all pixels of a phase receive the same taps,
so only those are multiplied and never the zeros of an upsampled gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import split
from .choose import Call, call_of, choose, planned
from .common import (
    Launcher,
    as_format_of,
    cdiv,
    channels_last,
    dot,
    empty_floats,
    empty_image,
    relu_mask,
)
from .configs import flat_taps
from .finalize import sum_partials
from .geometry import Geometry
from .pending import apply_pending, load_bn_backward, pending_arguments, pending_kind, stored


@triton.jit
def _first_tap(
    phase,
    PAD: tl.constexpr,
    DILATION: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    TAPS: tl.constexpr,
):
    """The first tap r with (phase + pad - r dilation) divisible by the stride; TAPS where there is none."""
    first = phase * 0 + TAPS
    for r in tl.static_range(STEP):
        if r < TAPS:
            first = tl.where((phase + PAD - r * DILATION) % STRIDE == 0, r, first)
    return first


@triton.jit
def _step(
    acc,
    dy_ptr,
    y_ptr,
    row,
    w_block,
    k,
    y_mean_ptr,
    y_scale_ptr,
    y_rstd_ptr,
    sum_dy_ptr,
    sum_dyy_ptr,
    inv_m,
    inside,
    in_k,
    in_c,
    PENDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus one tap of one block of output channels ``k``, the BN behind them applied on the way."""
    mask = inside[:, None] & in_k[None, :]
    dy = tl.load(dy_ptr + row + k[None, :], mask=mask, other=0.0)
    weight = tl.load(w_block, mask=in_k[:, None] & in_c[None, :], other=0.0)
    if PENDING != "none":
        vectors = load_bn_backward(
            y_mean_ptr, y_scale_ptr, y_rstd_ptr, sum_dy_ptr, sum_dyy_ptr, k, in_k, PENDING
        )
        dy = apply_pending(dy, y_ptr, row + k[None, :], mask, vectors, inv_m, PENDING)
    return dot(dy, weight, acc, PRECISION)


@triton.jit
def _conv_dgrad_kernel(
    dy_ptr,  # [N, OH, OW, K]; unless PENDING is "none" the g of the BN behind
    y_ptr,  # like dy: the input of that BN, of [K] vectors
    y_mean_ptr,
    y_scale_ptr,
    y_rstd_ptr,
    sum_dy_ptr,
    sum_dyy_ptr,
    w_ptr,  # [K, R, S, C]
    x_ptr,  # [N, H, W, C]
    scale_ptr,
    shift_ptr,
    mean_ptr,
    da_ptr,  # like x
    g_ptr,  # like x
    partials_ptr,  # [phases * tiles, 2, C]: sum g, sum g (x - mu)
    inv_m,  # 1 / (N * OH * OW)
    rows,  # pixels of a phase, N * PH * PW
    H,
    W,
    C,
    OH,
    OW,
    K,
    PH,
    PW,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    POINTWISE: tl.constexpr,
    PENDING: tl.constexpr,
    REDUCED: tl.constexpr,
    RELU: tl.constexpr,
    HAS_DA: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(C, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_c = c < C
    r0 = 0
    s0 = 0
    if POINTWISE:
        valid = m < rows
        pixel = m.to(tl.int64)
    else:
        n = m // (PH * PW)
        h = (m // PW) % PH * STRIDE_H
        w = m % PW * STRIDE_W
        if STRIDE_H * STRIDE_W > 1:
            phase = tl.program_id(1)
            h += phase // STRIDE_W
            w += phase % STRIDE_W
            r0 = _first_tap(phase // STRIDE_W, PAD_H, DILATION_H, STRIDE_H, STEP_R, R)
            s0 = _first_tap(phase % STRIDE_W, PAD_W, DILATION_W, STRIDE_W, STEP_S, S)
        # The last row and column of phases may lie outside an image whose size the stride does not divide.
        valid = (m < rows) & (h < H) & (w < W)
        pixel = (n * H + h).to(tl.int64) * W + w

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLAT:
        # One block holds all output channels: the taps are the pipelined loop, as in fprop.
        k = tl.arange(0, BLOCK_K)
        in_k = (k < K) | EVEN_K
        w_k = w_ptr + k[:, None] * (R * S * C) + c[None, :]
        for tap in range(R * S):
            oh = h + PAD_H - tap // S * DILATION_H
            ow = w + PAD_W - tap % S * DILATION_W
            inside = valid & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
            row = ((n * OH + oh).to(tl.int64) * OW + ow)[:, None] * K
            acc = _step(
                acc, dy_ptr, y_ptr, row, w_k + tap * C, k, y_mean_ptr, y_scale_ptr, y_rstd_ptr, sum_dy_ptr,
                sum_dyy_ptr, inv_m, inside, in_k, in_c, PENDING, PRECISION,
            )  # fmt: skip
    else:
        for r in range(r0, R, STEP_R):
            for s in range(s0, S, STEP_S):
                if POINTWISE:
                    inside = valid
                    row = pixel[:, None] * K
                else:
                    # Exact divisions: the phase's taps are those that hit an output pixel.
                    oh = (h + PAD_H - r * DILATION_H) // STRIDE_H
                    ow = (w + PAD_W - s * DILATION_W) // STRIDE_W
                    inside = valid & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
                    row = ((n * OH + oh).to(tl.int64) * OW + ow)[:, None] * K
                w_tap = w_ptr + (r * S + s) * C + c[None, :]
                for k0 in range(0, K, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    in_k = (k < K) | EVEN_K
                    w_block = w_tap + k[:, None] * (R * S * C)
                    acc = _step(
                        acc, dy_ptr, y_ptr, row, w_block, k, y_mean_ptr, y_scale_ptr, y_rstd_ptr, sum_dy_ptr,
                        sum_dyy_ptr, inv_m, inside, in_k, in_c, PENDING, PRECISION,
                    )  # fmt: skip

    offset = pixel[:, None] * C + c[None, :]
    mask = valid[:, None] & in_c[None, :]
    if HAS_DA:
        # A second user of the same activation: the two gradients meet before the mask.
        acc += tl.load(da_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if REDUCED:
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
        shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
        mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
        g = relu_mask(acc, x, scale, shift, RELU).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + offset, g, mask=mask)
        stored = tl.where(mask, g.to(tl.float32), 0.0)
        centred = tl.where(mask, x - mean[None, :], 0.0)
        out = partials_ptr + (tl.program_id(1) * tl.cdiv(rows, BLOCK_M) + tile).to(tl.int64) * (2 * C) + c
        tl.store(out, tl.sum(stored, axis=0), mask=in_c)
        tl.store(out + C, tl.sum(stored * centred, axis=0), mask=in_c)
    else:
        tl.store(g_ptr + offset, acc.to(g_ptr.dtype.element_ty), mask=mask)


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
    pending: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """g = (dgrad(dy, W) + da) [z > 0], sum g and sum g (x - mu): like ``x``, float32 [C], [C].

    ``dy`` [N,K,OH,OW] with any strides, ``weight`` [K,C/groups,R,S], ``x`` and ``da`` [N,C,H,W]. Without
    ``relu`` nothing is masked, with ``scale=None`` nothing is masked or summed. Groups take the split path. With
    ``pending``, as :func:`.conv_backward.conv_backward` takes it, the BN backward that makes dy is applied on load.
    """
    call = call_of(x, weight, stride, padding, dilation, groups)
    launched = launch_dgrad(call, dy, weight, x, (scale, shift, mean), da, relu, pending)
    if launched is None:
        return split.conv_dgrad(stored(dy, pending), weight, x, scale, shift, mean, da, call.geometry, relu)
    g, partials = launched
    channels = 0 if partials is None else x.shape[1]
    sum_g, sum_gx = empty_floats(x, channels), empty_floats(x, channels)
    if partials is not None:
        sum_partials(partials, sum_g, sum_gx)
    return g, sum_g, sum_gx


def launch_dgrad(
    call: Call,
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    bn: tuple[Tensor | None, Tensor | None, Tensor | None],
    da: Tensor | None,
    relu: bool,
    pending: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None] | None:
    """g, and the partial sums of its tiles, [tiles, 2 C], where it is reduced. None: the split path serves.

    ``bn``: scale, shift and mean, or None for each.
    """
    reduced = bn[0] is not None
    launcher, geometry, tiles = _plan(call, reduced, relu, da is not None, len(pending))
    if launcher is None:
        return None
    source = x
    dy, weight, x = channels_last(dy), channels_last(weight), channels_last(x)
    g = empty_image(x, geometry.c, geometry.h, geometry.w)
    partials = empty_floats(x, tiles, 2 * geometry.c) if reduced else None
    da = None if da is None else channels_last(da)
    launcher(dy, *pending_arguments(pending), weight, x, *bn, da, g, partials)
    return as_format_of(g, source), partials


@planned
def _plan(
    call: Call, reduced: bool, relu: bool, has_da: bool, pending: int
) -> tuple[Launcher | None, Geometry, int]:
    """The launch (None: the split path's), and how many tiles of rows leave partial sums; ``pending`` is a length."""
    geometry = call.geometry
    extras = ("masked",) * reduced + ("da",) * has_da + ("pending",) * bool(pending)
    config = choose("dgrad", call, *extras).config
    if config is None:
        return None, geometry, 0
    phase_h, phase_w = cdiv(geometry.h, geometry.stride[0]), cdiv(geometry.w, geometry.stride[1])
    rows = geometry.n * phase_h * phase_w
    phases = geometry.stride[0] * geometry.stride[1]
    tiles = cdiv(rows, config.block_m)
    launcher = Launcher(
        _conv_dgrad_kernel,
        (tiles * cdiv(geometry.c, config.block_n), phases),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        inv_m=1.0 / geometry.rows,
        rows=rows,
        **geometry.arguments(),
        PH=phase_h,
        PW=phase_w,
        # Taps of one phase are this far apart.
        STEP_R=geometry.stride[0] // math.gcd(geometry.stride[0], geometry.dilation[0]),
        STEP_S=geometry.stride[1] // math.gcd(geometry.stride[1], geometry.dilation[1]),
        PENDING=pending_kind(pending),
        REDUCED=reduced,
        RELU=relu,
        HAS_DA=has_da,
        FLAT=flat_taps(geometry, geometry.k, config),
        EVEN_K=geometry.k % config.block_k == 0,
        PRECISION=call.precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return launcher, geometry, phases * tiles
