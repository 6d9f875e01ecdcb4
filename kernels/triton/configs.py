"""Launch configurations, as data outside the kernels, and the heuristic that chooses them without a measurement.

From the shape, the dtype and the device, and nothing here times anything: the first step of a training run is as fast
as the second once the kernels are compiled, and every rank chooses the same. :mod:`.choose` asks here for what no
tuned table knows. The reasons beside the numbers are counted or read from compiled code, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .common import Device, cdiv, power_of_two
from .geometry import Geometry

__all__ = ["ConvConfig", "TileConfig", "flat_taps", "heuristic", "tile_config", "wgrad_splits"]


@dataclass(frozen=True)
class ConvConfig:
    """Tile of an implicit GEMM: ``block_m`` x ``block_n`` of the output, ``block_k`` of the reduction at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 0
    """Parts that wgrad cuts its pixels into; 0: as :func:`wgrad_splits` says."""


@dataclass(frozen=True)
class TileConfig:
    """Tile of an elementwise or reduction kernel over [rows, channels]."""

    block_m: int
    block_c: int
    num_warps: int


def heuristic(
    op: str, geometry: Geometry, dtype: torch.dtype, precision: str, device: Device, pending: bool = False
) -> ConvConfig:
    """The configuration of "fprop", "dgrad" or "wgrad" where nothing was measured. Always the fused path.

    ``pending``: dgrad and wgrad apply a BN backward where they load dy, whose operand is then made in registers.

    The split path would move two more tensors the size of x a site; whether the library's faster convolution pays for
    them is a question for a clock, so only a tuned table answers it with yes.
    """
    g = geometry
    if op == "fprop":
        return _flatten(_conv_config(g.rows, g.k, g.c, dtype, precision, device), g, g.c, device)
    if op == "dgrad":
        config = _conv_config(g.n * g.h * g.w, g.c, g.k, dtype, precision, device, dgrad=True)
        if pending and config.block_n == 128 and device.arch != 90:
            # 250 registers and in some shapes spills with 128 rows on sm_80; 128 registers with 64.
            config = replace(config, block_m=64)
        return _flatten(config, g, g.k, device)
    config = _wgrad_config(g.k, g.c, dtype, precision, device)
    if pending and config.block_m * config.block_n >= 64 * 128:
        # 255 registers and in some shapes spills with four warps; 181 (sm_80) and 173 (sm_90) with eight.
        config = replace(config, num_warps=8)
    return config


def flat_taps(geometry: Geometry, depth: int, config: ConvConfig) -> bool:
    """Whether fprop (depth C) or dgrad (depth K) loops over the taps only, one block holding the whole depth.

    With four warps: flattened loops over taps have been miscompiled silently with eight (pytorch#173068), though with
    the channels in the same loop. Strided dgrads meet a part of the taps each and keep their nested loops.
    """
    taps = geometry.r * geometry.s
    return taps > 1 and max(geometry.stride) == 1 and depth <= config.block_k and config.num_warps == 4


def _flatten(config: ConvConfig, geometry: Geometry, depth: int, device: Device) -> ConvConfig:
    """Four warps for a 3x3 site whose channels fit one block, so that its taps are pipelined.

    Compiled for 64 channels in bf16 on sm_90: 244 (fprop) and 186 (dgrad) registers without spills, and two programs
    a multiprocessor where eight warps leave room for one. sm_80 and sm_100 spill at 128 rows, so they take 64.
    """
    four = replace(config, num_warps=4)
    if device.backend != "cuda" or config.block_n > 64 or not flat_taps(geometry, depth, four):
        return config
    if config.num_warps == 4 or device.arch == 90:
        return four
    return replace(four, block_m=64)


def _conv_config(
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    dgrad: bool = False,
) -> ConvConfig:
    """fprop and dgrad: ``rows`` pixels x ``columns`` channels, reduced over ``depth`` channels (per tap)."""
    if dtype == torch.float32 and precision == "ieee":
        return _fma_config(32 if dgrad else 64, columns)
    # The whole of C_out in one tile where it fits: each element is then activated once. 256 columns of
    # float32 accumulators beside A in registers would pass 255 registers a thread, so 128 is the most; with
    # float32 tiles in the epilogue too, 64 (128 spills in the dgrad of 3x3 sites, on sm_80 and sm_90).
    wide = dtype == torch.float32
    block_n = power_of_two(columns, 16, 64 if wide else 128)
    # 128 bytes a row of A: one full cache line of channels a pixel.
    block_k = power_of_two(depth, 16, 128 // dtype.itemsize)
    block_m = 128
    # 64 accumulators a thread at most (32 for 64 columns), which leaves room for the activated A tile: with four
    # warps the 3x3 sites of 64 channels spill on sm_80.
    num_warps = 8 if block_n >= 64 else 4
    if cdiv(rows, block_m) * cdiv(columns, block_n) < device.multiprocessors:
        block_m = 64  # few tiles: smaller ones fill more of the chip
    # Three stages hide the latency of the loads on CUDA; on AMD a stage more than two costs occupancy.
    num_stages = 3 if device.backend == "cuda" else 2
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages)


def _fma_config(block_m: int, columns: int) -> ConvConfig:
    """float32 without TF32: no tensor cores, and the operands of a whole step of the reduction are registers.

    So steps of 16, the least that tl.dot takes, and few accumulators a thread: more than these and ptxas spills.
    """
    return ConvConfig(block_m, power_of_two(columns, 16, 32), 16, 4, 2)


def _wgrad_config(k: int, c: int, dtype: torch.dtype, precision: str, device: Device) -> ConvConfig:
    """wgrad: ``k`` x ``c`` weights of one tap, reduced over the pixels."""
    if dtype == torch.float32 and precision == "ieee":
        return _fma_config(64, c)
    # wgmma (sm_90) and tcgen05 (sm_100) take 64 rows or more. Fewer output channels than that are padded: these
    # sites are bound by their bytes, not by the tensor cores.
    least = 64 if device.backend == "cuda" and isinstance(device.arch, int) and device.arch >= 90 else 16
    block_m, block_n = power_of_two(k, least, 128), power_of_two(c, 16, 128)
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    num_stages = 3 if device.backend == "cuda" else 2
    return ConvConfig(block_m, block_n, 128 // dtype.itemsize, num_warps, num_stages)


def wgrad_splits(tiles: int, rows: int, block_k: int, device: Device) -> int:
    """How many parts the pixels are cut into, so that the grid fills the chip about twice."""
    wanted = cdiv(2 * device.multiprocessors, tiles)
    # A part shorter than eight steps of the main loop is mostly prologue and epilogue.
    return max(1, min(wanted, rows // (8 * block_k)))


def tile_config(channels: int) -> TileConfig:
    """Memory-bound kernels: rows of at most 64 channels (128 bytes of bf16), 4096 elements a program."""
    block_c = power_of_two(channels, 8, 64)
    return TileConfig(4096 // block_c, block_c, 4)
