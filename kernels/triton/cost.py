"""A cost model of the convolution kernels: predicted microseconds of a configuration, to rank candidates by.

A launch takes the longest of what it asks of five resources, plus a fifth of the others since they do not overlap
perfectly, times its ragged last wave:

    memory  compulsory bytes / bandwidth; slower where too few bytes are in flight to cover the latency (Little's law)
    l2      bytes that all programs load, tiles read again by other programs and taps among them / L2 bandwidth
    mma     multiply-adds of the padded tiles / the rate of the tensor cores
    alu     activation, masks and addresses on the ordinary cores, which run beside the tensor cores only where
            another warp group has work for them
    latency every program's steps one after the other: a barrier each, or the wait for L2 shared by the stages in
            flight, and a load from memory and a store around them

Registers, shared memory and warps give the programs that fit a multiprocessor. They come from compiled code where it
is at hand (:mod:`.crosscompile`), else they are estimated from the tile. The constants are data sheets' and counted
instructions, the latencies are assumed, none is fitted; ``python -m benchmarks cost`` prints the ranking, and after
tuning how it compares with what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .choose import Problem, own_config
from .common import Device, cdiv
from .configs import ConvConfig, flat_taps, wgrad_splits
from .crosscompile import Resources

__all__ = ["Prediction", "candidates", "fits", "predict"]


@dataclass(frozen=True)
class Chip:
    """What a data sheet says of an architecture, per second and per multiprocessor."""

    bandwidth: float
    l2: float
    rates: dict[str, float]
    """Dense FLOP/s by "16" (bf16, fp16), "tf32" and "ieee"."""
    clock: float
    shared: int
    """Bytes of shared memory of a multiprocessor; a program may have 1 KiB less."""
    multiprocessors: int


# A100 80GB, RTX 3090, L40S, H100 SXM, B200, RTX 5090. L2 bandwidths are not published: here two to five times the
# memory's.
_CUDA = {
    80: Chip(2.0e12, 5e12, {"16": 312e12, "tf32": 156e12, "ieee": 19.5e12}, 1.41e9, 164 << 10, 108),
    86: Chip(0.94e12, 2.5e12, {"16": 71e12, "tf32": 36e12, "ieee": 36e12}, 1.7e9, 100 << 10, 82),
    89: Chip(0.86e12, 4e12, {"16": 362e12, "tf32": 183e12, "ieee": 91e12}, 2.5e9, 100 << 10, 142),
    90: Chip(3.35e12, 7e12, {"16": 989e12, "tf32": 494e12, "ieee": 67e12}, 1.83e9, 228 << 10, 132),
    100: Chip(8.0e12, 16e12, {"16": 2250e12, "tf32": 1125e12, "ieee": 75e12}, 1.9e9, 228 << 10, 148),
    120: Chip(1.79e12, 6e12, {"16": 419e12, "tf32": 105e12, "ieee": 105e12}, 2.4e9, 100 << 10, 170),
}
# MI300X stands for every AMD chip.
_HIP = Chip(5.3e12, 12e12, {"16": 1307e12, "tf32": 653e12, "ieee": 163e12}, 2.1e9, 64 << 10, 304)

_LATENCY, _L2_LATENCY = 800e-9, 300e-9  # of a load, loaded machine
_STEP_CYCLES = (
    120  # two barriers and the first product's latency: what a step takes however little it computes
)
_OVERLAP = 0.2  # share of the shorter resources that shows
_LAUNCH_US = 3.0
_LANES = 128  # multiply-add lanes of a multiprocessor
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32  # of a multiprocessor
_ACTIVATION_OPS = (
    6  # convert, multiply-add, compare, two selects, convert back: an element of the activated operand
)
_LOAD_OPS = 10  # address, bounds and mask: a load of 16 bytes


class Prediction(NamedTuple):
    """What the model says of one configuration."""

    us: float
    bound: str
    """The resource that takes longest: "memory", "l2", "mma", "alu" or "latency"."""
    programs: int
    """Programs resident on a multiprocessor at once."""


class _Work(NamedTuple):
    """One launch, counted."""

    programs: int
    steps: int
    """Steps of the reduction in one program."""
    pipelined: bool
    """Whether the innermost loop has more than one step, so that loads run ahead of the products."""
    compulsory: float
    epilogue: float
    """Bytes read or written after the reduction, per program."""
    activated: int
    """Elements activated in one step."""


def chip_of(device: Device) -> Chip:
    """The nearest known architecture that is not newer."""
    if device.backend != "cuda" or not isinstance(device.arch, int):
        return _HIP
    return _CUDA[max((a for a in _CUDA if a <= device.arch), default=80)]


def _shared(problem: Problem, config: ConvConfig) -> int:
    """Bytes of shared memory: the operands' tiles in every stage."""
    return config.num_stages * _loaded(problem, config)


def _loaded(problem: Problem, config: ConvConfig) -> int:
    """Bytes that a step of the reduction loads: two tiles, and where a BN backward is pending a tile of y."""
    tiles = config.block_m * (1 + ("pending" in problem.extras)) + config.block_n
    return tiles * config.block_k * problem.dtype.itemsize


def _registers(problem: Problem, config: ConvConfig) -> float:
    """Registers a thread, by a rule read from kernels compiled for sm_90; more than there are where they spill.

    Accumulators; in fprop and wgrad the operand that is activated in registers, in float32; in dgrad a second tile
    beside the accumulators, the x of the mask. With a pending BN backward dy is made in registers too.
    """
    threads = 32 * config.num_warps
    accumulators = config.block_m * config.block_n / threads
    if "pending" in problem.extras:
        return 60 + 1.5 * accumulators + 1.75 * config.block_m * config.block_k / threads
    if problem.op == "dgrad":
        return 60 + 2.0 * accumulators
    if problem.op == "wgrad":
        return 60 + 1.4 * accumulators
    return 50 + 1.25 * accumulators + 1.75 * config.block_m * config.block_k / threads


def fits(problem: Problem, config: ConvConfig, device: Device, resources: Resources | None = None) -> bool:
    """Whether the configuration can be launched, and does not spill."""
    if resources is not None:
        return resources.shared <= chip_of(device).shared - 1024 and not resources.spills
    # The estimate is rough: a little past the 255 registers of a thread may still compile without spills.
    shared = _shared(problem, config)
    return shared <= chip_of(device).shared - 1024 and _registers(problem, config) <= 270


def _count(problem: Problem, config: ConvConfig, device: Device) -> _Work:
    g, item = problem.geometry, problem.dtype.itemsize
    x, y, w = g.n * g.h * g.w * g.c * item, g.rows * g.k * item, g.k * g.c * g.r * g.s * item
    tile = config.block_m * config.block_n
    pending = "pending" in problem.extras
    applied = config.block_m * config.block_k * pending
    if problem.op == "wgrad":
        tiles = cdiv(g.k, config.block_m) * cdiv(g.c, config.block_n) * g.r * g.s
        splits = config.splits or wgrad_splits(tiles, g.rows, config.block_k, device)
        steps = cdiv(cdiv(g.rows, splits), config.block_k)
        partials = 2.0 * splits * w / item * 4  # written, and read by the sum
        touched = x if max(g.r, g.s) > 1 else min(x, g.rows * g.c * item)
        return _Work(
            tiles * splits,
            steps,
            steps > 1,
            touched + y * (1 + pending) + partials,
            4.0 * tile,
            config.block_n * config.block_k + applied,
        )
    if problem.op == "fprop":
        rows, columns, depth, phases = g.rows, g.k, g.c, 1
        extra = y * ("residual" in problem.extras)
        activated = config.block_m * config.block_k
    else:
        phases = g.stride[0] * g.stride[1]
        rows, columns, depth = g.n * g.h * g.w, g.c, g.k
        extra = x * (("masked" in problem.extras) + ("da" in problem.extras))
        activated = applied
    blocks = cdiv(depth, config.block_k)
    # A phase of a strided dgrad meets its share of the taps.
    steps = max(1, round(g.r * g.s / phases)) * blocks
    programs = cdiv(rows, config.block_m) * cdiv(columns, config.block_n)
    epilogue = (1 + extra / max(x if problem.op == "dgrad" else y, 1)) * tile * item
    pipelined = blocks > 1 or flat_taps(g, depth, config)
    return _Work(programs, steps, pipelined, x + y * (1 + pending) + w + extra, epilogue, activated)


def predict(
    problem: Problem, config: ConvConfig, device: Device, resources: Resources | None = None
) -> Prediction:
    """Microseconds of one launch; ``resources`` where it was compiled, else they are estimated."""
    chip, item = chip_of(device), problem.dtype.itemsize
    work = _count(problem, config, device)
    scale = device.multiprocessors / chip.multiprocessors  # a cut-down chip has less of everything
    shared = _shared(problem, config) if resources is None else resources.shared
    registers = min(
        255, int(_registers(problem, config)) if resources is None else max(resources.registers, 16)
    )
    resident = max(
        1,
        min(
            _REGISTERS // (registers * 32 * config.num_warps),
            chip.shared // (shared + 1024),
            _WARPS // config.num_warps,
            _PROGRAMS,
        ),
    )
    slots = device.multiprocessors * resident
    waves = work.programs / slots
    ragged = math.ceil(waves) / waves

    step_bytes = _loaded(problem, config)
    ahead = max(1, config.num_stages - 1) if work.pipelined else 1
    busy = min(resident, math.ceil(work.programs / device.multiprocessors))
    in_flight = busy * ahead * step_bytes * device.multiprocessors
    covered = min(1.0, in_flight / (chip.bandwidth * scale * _LATENCY))

    loaded = work.programs * (work.steps * step_bytes + work.epilogue)
    multiplied = 2.0 * work.programs * work.steps * config.block_m * config.block_n * config.block_k
    rate = chip.rates["16" if item == 2 else problem.precision.replace("interpreter", "ieee")]
    operations = (
        work.programs
        * work.steps
        * (work.activated * _ACTIVATION_OPS + step_bytes / _vector(problem, config) * _LOAD_OPS)
    )
    seconds = {
        "memory": work.compulsory / (chip.bandwidth * scale * covered),
        "l2": loaded / (chip.l2 * scale),
        "mma": multiplied / (rate * scale),
        "alu": operations / (_LANES * chip.clock * device.multiprocessors),
    }
    step = max(_STEP_CYCLES / chip.clock, _L2_LATENCY / ahead)
    latency = math.ceil(waves) * (work.steps * step + 2 * _LATENCY)
    if busy * config.num_warps < 8:
        # A single warp group multiplies or activates, not both at once.
        seconds["alu"] += seconds["mma"]
    seconds = {name: ragged * value for name, value in seconds.items()} | {"latency": latency}
    bound = max(seconds, key=lambda name: seconds[name])
    total = (1 - _OVERLAP) * seconds[bound] + _OVERLAP * sum(seconds.values())
    spills = 1.0 if resources is None else 1 + resources.spills / 256
    return Prediction(total * spills * 1e6 + _LAUNCH_US, bound, resident)


def _vector(problem: Problem, config: ConvConfig) -> int:
    """Bytes of one load: 16 where rows of channels are aligned to it."""
    item, g = problem.dtype.itemsize, problem.geometry
    return 16 if g.c * item % 16 == 0 and g.k * item % 16 == 0 else item


def candidates(problem: Problem, device: Device) -> list[ConvConfig]:
    """The configurations worth a look, best predicted first; the heuristic's own is always among them.

    Powers of two from 64 to 256 rows and up to all columns (256 at most), so that an element is activated once where
    the columns fit; steps of 32 to 128 bytes of channels, 4 or 8 warps, 2 to 4 stages.
    """
    g, item = problem.geometry, problem.dtype.itemsize
    own = own_config(problem, device)
    if problem.dtype == torch.float32 and problem.precision == "ieee":
        found = [ConvConfig(m, n, 16, 4, s) for m in (32, 64, 128) for n in (16, 32, 64) for s in (2, 3)]
    elif problem.op == "wgrad":
        found = [
            ConvConfig(m, n, k, warps, stages, splits)
            for m in _powers(g.k, own.block_m if own.block_m > g.k else 16, 256)
            for n in _powers(g.c, 16, 256)
            for k in (64 // item, 128 // item, 256 // item)
            for warps in (4, 8)
            for stages in (2, 3, 4)
            for splits in (0, *_other_splits(problem, ConvConfig(m, n, k, warps, stages), device))
        ]
    else:
        columns, depth = (g.k, g.c) if problem.op == "fprop" else (g.c, g.k)
        found = [
            ConvConfig(m, n, k, warps, stages)
            for m in (64, 128, 256)
            for n in _powers(columns, 16, 256)
            for k in _powers(depth, 32 // item, 128 // item)
            for warps in (4, 8)
            for stages in (2, 3, 4)
        ]
    found = [c for c in found if fits(problem, c, device)]
    ranked = sorted(found, key=lambda c: predict(problem, c, device).us)
    return [*ranked, *([own] if own not in ranked else [])]


def _powers(size: int, least: int, most: int) -> list[int]:
    """The three largest sensible tiles of a dimension: the power of two that covers it, and two smaller ones."""
    top = max(least, min(most, 1 << (size - 1).bit_length()))
    return [v for v in (top // 4, top // 2, top) if v >= least]


def _other_splits(problem: Problem, config: ConvConfig, device: Device) -> list[int]:
    """Half and double the parts that :func:`wgrad_splits` would cut the pixels into."""
    g = problem.geometry
    tiles = cdiv(g.k, config.block_m) * cdiv(g.c, config.block_n) * g.r * g.s
    usual = wgrad_splits(tiles, g.rows, config.block_k, device)
    return [n for n in (usual // 2, usual * 2) if n >= 1]
