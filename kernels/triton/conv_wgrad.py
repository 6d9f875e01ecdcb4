"""wgrad: the weight's gradient, with the activation recomputed from raw x in the prologue.

A GEMM per tap, dW[k, r, s, c] = sum over pixels of dy[pixel, k] a[pixel + tap, c], whose long reduction is cut
into parts (split over m) with float32 partials; :func:`finalize.sum_partials` adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split
from .choose import Call, call_of, choose, planned
from .common import Launcher, bn_relu, cdiv, channels_last, dot, empty_floats
from .configs import wgrad_splits
from .finalize import sum_partials
from .pending import apply_pending, load_bn_backward, pending_arguments, pending_kind, stored


@triton.jit
def _conv_wgrad_kernel(
    dy_ptr,  # [N, OH, OW, K]; unless PENDING is "none" the g of the BN behind
    y_ptr,  # like dy: the input of that BN, of [K] vectors
    y_mean_ptr,
    y_scale_ptr,
    y_rstd_ptr,
    sum_dy_ptr,
    sum_dyy_ptr,
    x_ptr,  # [N, H, W, C]
    scale_ptr,
    shift_ptr,
    partials_ptr,  # [splits, K, R, S, C]
    inv_m,  # 1 / rows
    rows,  # N * OH * OW
    rows_per_split,
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
    PENDING: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # BLOCK_M output channels x BLOCK_N input channels, BLOCK_K pixels at a time.
    tiles_n = tl.cdiv(C, BLOCK_N)
    tap = tl.program_id(0) % (R * S)
    tile = tl.program_id(0) // (R * S)
    k = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_c = k < K, c < C
    scale = tl.load(scale_ptr + c, mask=in_c, other=0.0)
    shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    if PENDING != "none":
        vectors = load_bn_backward(
            y_mean_ptr, y_scale_ptr, y_rstd_ptr, sum_dy_ptr, sum_dyy_ptr, k, in_k, PENDING
        )
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, rows)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m0 in range(start, end, BLOCK_K):
        m = m0 + tl.arange(0, BLOCK_K)
        valid = m < end
        if POINTWISE:
            inside = valid
            row = m.to(tl.int64) * C
        else:
            ih = (m // OW) % OH * STRIDE_H - PAD_H + tap // S * DILATION_H
            iw = m % OW * STRIDE_W - PAD_W + tap % S * DILATION_W
            inside = valid & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            row = ((m // (OH * OW) * H + ih).to(tl.int64) * W + iw) * C
        offset = m.to(tl.int64)[:, None] * K + k[None, :]
        mask = valid[:, None] & in_k[None, :]
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0)
        x = tl.load(x_ptr + row[:, None] + c[None, :], mask=inside[:, None] & in_c[None, :], other=0.0)
        if PENDING != "none":
            dy = apply_pending(dy, y_ptr, offset, mask, vectors, inv_m, PENDING)
        a = bn_relu(x.to(tl.float32), scale, shift, RELU)
        # Pixels of the padding and of the tail are 0, not relu(shift).
        a = tl.where(inside[:, None], a, 0.0).to(dy.dtype)
        acc = dot(tl.trans(dy), a, acc, PRECISION)

    split = tl.program_id(1).to(tl.int64) * K
    offset = ((split + k)[:, None] * (R * S) + tap) * C + c[None, :]
    tl.store(partials_ptr + offset, acc, mask=in_k[:, None] & in_c[None, :])


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
    pending: Sequence[Tensor] = (),
) -> Tensor:
    """dW [K,C,R,S] with the dtype and strides of ``weight``; ``dy`` [N,K,OH,OW], ``x`` [N,C,H,W].

    Two runs give the same bits on the fused path; on the split path, which groups take, where the library's does.
    With ``pending``, as :func:`.conv_backward.conv_backward` takes it, the BN backward that makes dy is applied on
    load.
    """
    call = call_of(x, weight, stride, padding, dilation, groups)
    partials = launch_wgrad(call, dy, x, scale, shift, weight, relu, pending)
    if partials is None:
        return split.conv_wgrad(stored(dy, pending), x, scale, shift, weight, call.geometry, relu)
    dweight = empty_dweight(weight)
    sum_partials(partials, dweight)
    return as_strided_like(dweight, weight)


def launch_wgrad(
    call: Call,
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    relu: bool,
    pending: Sequence[Tensor],
) -> Tensor | None:
    """The partial sums of the parts that the pixels are cut into, [splits, K R S C]. None: the split path serves."""
    launcher, splits = _plan(call, relu, len(pending))
    if launcher is None:
        return None
    dy, x = channels_last(dy), channels_last(x)
    partials = empty_floats(x, splits, weight.numel())
    launcher(dy, *pending_arguments(pending), x, scale, shift, partials)
    return partials


def empty_dweight(weight: Tensor) -> Tensor:
    """What the sum of the partials is written to: in K,R,S,C order, and where it can be with the weight's strides.

    Those of a 1x1 are ambiguous, and DDP's buckets compare them.
    """
    if weight.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(weight)
    return torch.empty_like(weight, memory_format=torch.channels_last)


def as_strided_like(dweight: Tensor, weight: Tensor) -> Tensor:
    """``dweight`` with the strides of ``weight``."""
    return dweight if dweight.stride() == weight.stride() else torch.empty_like(weight).copy_(dweight)


@planned
def _plan(call: Call, relu: bool, pending: int) -> tuple[Launcher | None, int]:
    """The launch (None: the split path's), and into how many parts it cuts the pixels."""
    geometry = call.geometry
    config = choose("wgrad", call, *("pending",) * bool(pending)).config
    if config is None:
        return None, 0
    rows, taps = geometry.rows, geometry.r * geometry.s
    tiles = cdiv(geometry.k, config.block_m) * cdiv(geometry.c, config.block_n) * taps
    splits = config.splits or wgrad_splits(tiles, rows, config.block_k, call.device)
    rows_per_split = cdiv(cdiv(rows, splits), config.block_k) * config.block_k
    splits = cdiv(rows, rows_per_split)
    launcher = Launcher(
        _conv_wgrad_kernel,
        (tiles, splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        inv_m=1.0 / rows,
        rows=rows,
        rows_per_split=rows_per_split,
        **geometry.arguments(),
        PENDING=pending_kind(pending),
        RELU=relu,
        PRECISION=call.precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return launcher, splits
