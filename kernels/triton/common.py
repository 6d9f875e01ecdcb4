"""What the kernels share: launching, the device at hand, the arithmetic of the BN-ReLU prologue."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- device functions ---------------------------------------------------------------------------------------


@triton.jit
def bn_relu(x, scale, shift, RELU: tl.constexpr = True):
    """max(s x + t, 0), or s x + t, of a float32 tile [M, C] with [C] vectors; NaN stays NaN, as in PyTorch's ReLU."""
    z = tl.fma(x, scale[None, :], shift[None, :])
    if RELU:
        # A comparison and not tl.maximum, which returns the other operand where one is NaN.
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def relu_mask(g, x, scale, shift, RELU: tl.constexpr = True):
    """g where s x + t is positive (or NaN), else 0: the backward of :func:`bn_relu`."""
    if RELU:
        z = tl.fma(x, scale[None, :], shift[None, :])
        g = tl.where(z <= 0, 0.0, g)
    return g


@triton.jit
def bn_backward(g, x, mean, scale, rstd, sum_g, sum_gx, inv_m):
    """A g + B (x - mu) + C of a float32 tile: A = s, B = -s r^2 (sum g (x - mu)) / m, C = -s (sum g) / m."""
    slope = -rstd * rstd * sum_gx * inv_m
    offset = -sum_g * inv_m
    return scale[None, :] * (g + (x - mean[None, :]) * slope[None, :] + offset[None, :])


@triton.jit
def tile_statistics(y, valid, count, PIVOTED: tl.constexpr):
    """Mean (as two floats, high + low) and M2 per column of a float32 tile [M, C], over its ``count`` valid rows.

    Two passes over registers: no E[x^2] - E[x]^2. The low part is what the rounding of the mean lost: far from zero
    the differences between the tiles' means would otherwise drown in it. Of equal values the deviation has few bits,
    its sums are exact, and so high + low is the value and M2 is 0, if the division is rounded correctly: a device's
    plain one is not. With PIVOTED, y is relative to one of its own rows and equal values are 0: any division serves,
    and the plain one takes up to 20 registers less in bn_stats on sm_90.
    """
    high = tl.sum(tl.where(valid[:, None], y, 0.0), axis=0) / count
    deviation = tl.where(valid[:, None], y - high[None, :], 0.0)
    error = tl.sum(deviation, axis=0)
    low = error / count if PIVOTED else tl.div_rn(error, count)
    m2 = tl.sum(deviation * deviation, axis=0) - error * low
    return high, low, m2


@triton.jit
def store_statistics(partials_ptr, tile, C, c, high, low, m2):
    """A tile's row of the partials [tiles, 3, C] that ``finalize.merge_statistics`` reads."""
    out = partials_ptr + tile.to(tl.int64) * (3 * C) + c
    tl.store(out, high, mask=c < C)
    tl.store(out + C, low, mask=c < C)
    tl.store(out + 2 * C, m2, mask=c < C)


@triton.jit
def store_scale_shift(
    mean,
    var,
    gamma_ptr,
    beta_ptr,
    scale_ptr,
    shift_ptr,
    rstd_ptr,
    eps,
    c,
    C,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """s = gamma r, t = beta - mu s and r = (v + eps)^-1/2 of float32 vectors, the channels ``c``."""
    # sqrt and a division, both correctly rounded: the approximate rsqrt would cost the oracle's tolerance.
    rstd = tl.div_rn(tl.full(c.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))
    scale = rstd
    if HAS_GAMMA:
        scale = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32) * rstd
    shift = tl.zeros(c.shape, tl.float32)
    if HAS_BETA:
        shift = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.fma(-mean, scale, shift)
    tl.store(scale_ptr + c, scale, mask=c < C)
    tl.store(shift_ptr + c, shift, mask=c < C)
    tl.store(rstd_ptr + c, rstd, mask=c < C)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b on the tensor cores, in the precision that :func:`dot_precision` chose."""
    if PRECISION == "interpreter":
        # Triton's interpreter keeps bf16 as integers and would multiply those.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


# --- host -----------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """What launch configurations depend on."""

    backend: str
    """"cuda", "hip" or "xpu"."""
    arch: int | str
    """Compute capability times ten on CUDA (90), the architecture's name on HIP ("gfx942")."""
    multiprocessors: int
    name: str = ""
    """Which tuned tables are its; none are for a device without a name."""


class Launch(NamedTuple):
    """One kernel launch as :func:`recording` sees it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None
_recorded_device: Device | None = None


@contextlib.contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Collect the launches that the operations would make on ``device`` instead of making them.

    For tensors on the meta device: this is how kernels are compiled for chips that are not there.
    """
    global _recorded, _recorded_device
    _recorded, _recorded_device = [], device
    try:
        yield _recorded
    finally:
        _recorded, _recorded_device = None, None


def is_recording() -> bool:
    """Whether launches are collected, not made."""
    return _recorded is not None


@functools.cache
def _device_properties(device: torch.device) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            name = properties.gcnArchName.split(":")[0]
            return Device("hip", name, properties.multi_processor_count, properties.name)
        arch = properties.major * 10 + properties.minor
        return Device("cuda", arch, properties.multi_processor_count, properties.name)
    if device.type == "xpu":
        found = torch.xpu.get_device_properties(device)
        return Device("xpu", 0, found.max_compute_units, found.name)
    # The interpreter on CPU tensors: any value serves, a small one keeps splits few.
    return Device("cuda", 90, 4, "Triton interpreter" if device.type == "cpu" else "")


def device_of(x: Tensor) -> Device:
    """The device that ``x`` is on, or the one being recorded for."""
    return _recorded_device or _device_properties(x.device)


class _Listening(threading.local):
    recorder: Any = None
    """Who in this thread wants to hear of launches: :mod:`.tape`."""


listening = _Listening()


class Ready(NamedTuple):
    """A compiled kernel as its driver launches it; binding some forty arguments anew would cost more than that."""

    kinds: list[torch.dtype | None]
    """The tensors' dtypes that it was compiled for, None where there was none."""
    run: Any
    function: Any
    metadata: Any
    current_device: Any
    current_stream: Any


class Launcher:
    """A kernel with all its arguments but the tensors: what a signature determines, put together once.

    ``scalars`` are the kernel's arguments behind its tensors, by name. Called with the tensors in the kernel's
    order. The first launch of a kind is Triton's own; then the compiled kernel is kept and launched directly. It was
    compiled for addresses that are multiples of 16, which whole tensors have: others take Triton's own way, and so
    do devices that are not the current one and launches that a profiler's hook wants to hear of.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int = 1, **scalars: Any
    ) -> None:
        self._kernel, self._names = kernel, kernel.arg_names
        self.grid = grid + (1,) * (3 - len(grid))
        self.values = tuple(scalars[name] for name in self._names[-len(scalars) :])
        self._num_warps, self._num_stages = num_warps, num_stages
        self.ready: dict[int, Ready] = {}
        """What was launched last on each device."""

    def __call__(self, *tensors: Tensor | None) -> None:
        first = tensors[0]
        assert first is not None, "a kernel's first tensor is never optional"
        if _recorded is not None:
            named = dict(zip(self._names, (*tensors, *self.values), strict=True))
            _recorded.append(Launch(self._kernel, self.grid, named, self._num_warps, self._num_stages))
            return
        if listening.recorder is not None:
            listening.recorder.launched(self, tensors)
        # Comprehensions over the tensors, not one loop: this is run some ten times for each site of a network.
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        kinds = [t if t is None else t.dtype for t in tensors]
        index = first.get_device()
        ready = self.ready.get(index)
        if ready is not None and ready.kinds != kinds:
            ready = None
        aligned = not functools.reduce(operator.or_, addresses) & 15
        if ready is not None and aligned and ready.current_device() == index and not hooked():
            stream = ready.current_stream(index)
            ready.run(
                *self.grid,
                stream,
                ready.function,
                ready.metadata,
                None,
                None,
                None,
                *addresses,
                *self.values,
            )
            return
        with _current(first.device):
            compiled = self._kernel[self.grid](
                *tensors, *self.values, num_warps=self._num_warps, num_stages=self._num_stages
            )
        if ready is None and aligned and compiled is not None:  # the interpreter compiles nothing
            driver = triton.runtime.driver.active
            self.ready[index] = Ready(
                kinds,
                compiled.run,
                compiled.function,
                compiled.packed_metadata,
                driver.get_current_device,
                driver.get_current_stream,
            )


def hooked() -> bool:
    """Whether somebody (a profiler) wants to hear of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    num_warps: int,
    num_stages: int = 1,
    **arguments: Any,
) -> None:
    """Launch ``kernel`` on ``device``, which need not be the current one; a site's by :class:`Launcher`."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    if listening.recorder is not None:
        listening.recorder.failed = "a launch by arguments"
    with _current(device):
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    if device.index is None or device.index == module.current_device():
        return contextlib.nullcontext()
    return module.device(device)


def dot_precision(x: Tensor) -> str:
    """How tl.dot multiplies: for float32 as PyTorch's switches say of convolutions."""
    if x.dtype != torch.float32:
        # Of no effect on 16-bit operands.
        return "interpreter" if x.dtype == torch.bfloat16 and x.is_cpu else "tf32"
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 and device_of(x).backend == "cuda" else "ieee"


def channels_last(x: Tensor) -> Tensor:
    """``x`` dense in N,H,W,C order: itself where it is, else a copy. Any strides may come, expanded ones too."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An empty channels_last image with the batch, dtype and device of ``x``."""
    row = width * channels
    return x.new_empty_strided((x.shape[0], channels, height, width), (height * row, 1, row, channels))


def empty_floats(x: Tensor, *size: int) -> Tensor:
    """An empty float32 tensor on the device of ``x``."""
    return x.new_empty(*size, dtype=torch.float32)


def as_format_of(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory format that ``x`` came in."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return y
    return y.contiguous()


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``n``, kept between ``least`` and ``most``."""
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))
