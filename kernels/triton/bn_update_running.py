"""The running statistics of a unit's BatchNorms in training, in place and in one launch, the counters included."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Launcher, power_of_two


@triton.jit
def lerp(a, b, weight):
    """a + weight (b - a), exact at both ends: in the two forms that torch.lerp has."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def _update(
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,  # int64, one value
    momentum,
    unbiased,  # m / (m - 1)
    C,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program for all of a BN, so that its counter is read before it is written.
    weight = momentum
    if HAS_COUNTER:
        tracked = tl.load(counter_ptr) + 1
        if CUMULATIVE:
            weight = tl.div_rn(tl.full((), 1.0, tl.float32), tracked.to(tl.float32))
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = c < C
        mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
        var = tl.load(var_ptr + c, mask=mask, other=0.0)
        running_mean = tl.load(running_mean_ptr + c, mask=mask, other=0.0).to(tl.float32)
        running_var = tl.load(running_var_ptr + c, mask=mask, other=0.0).to(tl.float32)
        new_mean = lerp(running_mean, mean, weight)
        new_var = lerp(running_var, var * unbiased, weight)
        tl.store(running_mean_ptr + c, new_mean.to(running_mean_ptr.dtype.element_ty), mask=mask)
        tl.store(running_var_ptr + c, new_var.to(running_var_ptr.dtype.element_ty), mask=mask)
    if HAS_COUNTER:
        tl.debug_barrier()  # every thread has read the counter
        tl.store(counter_ptr, tracked)


@triton.jit
def _bn_update_running_kernel(
    mean0_ptr, var0_ptr, running_mean0_ptr, running_var0_ptr, counter0_ptr,
    mean1_ptr, var1_ptr, running_mean1_ptr, running_var1_ptr, counter1_ptr,
    mean2_ptr, var2_ptr, running_mean2_ptr, running_var2_ptr, counter2_ptr,
    momentum,
    unbiased0, unbiased1, unbiased2,
    C0, C1, C2,
    BNS: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program i updates BN i, of up to three."""
    bn = tl.program_id(0)
    if bn == 0:
        _update(
            mean0_ptr, var0_ptr, running_mean0_ptr, running_var0_ptr, counter0_ptr, momentum, unbiased0, C0,
            HAS_COUNTER, CUMULATIVE, BLOCK_C,
        )  # fmt: skip
    if BNS > 1:  # noqa: SIM102 (known to the compiler; the other is not)
        if bn == 1:
            _update(
                mean1_ptr, var1_ptr, running_mean1_ptr, running_var1_ptr, counter1_ptr, momentum, unbiased1, C1,
                HAS_COUNTER, CUMULATIVE, BLOCK_C,
            )  # fmt: skip
    if BNS > 2:  # noqa: SIM102
        if bn == 2:
            _update(
                mean2_ptr, var2_ptr, running_mean2_ptr, running_var2_ptr, counter2_ptr, momentum, unbiased2, C2,
                HAS_COUNTER, CUMULATIVE, BLOCK_C,
            )  # fmt: skip


_AT_ONCE = 3  # BNs of a launch: a bottleneck's


def bn_update_running(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
    momentum: float | None,
    count: Sequence[int],
) -> None:
    """running <- running + momentum (new - running), in place; lists of vectors [C], and of counters all or none.

    The new variance is the unbiased one, var count / (count - 1). ``momentum=None`` is the cumulative average: the
    weight is 1 / counter, read on the device.
    """
    for first in range(0, len(mean), _AT_ONCE):
        bns = range(first, min(first + _AT_ONCE, len(mean)))
        tensors: list[Tensor | None] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for i in bns:
            buffers = []
            for buffer in (running_mean[i], running_var[i]):
                dense = buffer.contiguous()
                if dense is not buffer:
                    copies.append((buffer, dense))
                buffers.append(dense)
            counter = num_batches_tracked[i] if num_batches_tracked else None
            tensors += (mean[i].contiguous(), var[i].contiguous(), *buffers, counter)
        tensors += (None,) * (5 * (_AT_ONCE - len(bns)))
        channels, counts = tuple(mean[i].shape[0] for i in bns), tuple(count[i] for i in bns)
        _launcher(channels, counts, momentum, bool(num_batches_tracked))(*tensors)
        for buffer, dense in copies:
            buffer.copy_(dense)
    # A kernel's stores are invisible to autograd: a buffer that it saved must be seen to have changed.
    torch.autograd.graph.increment_version([*running_mean, *running_var, *num_batches_tracked])


@functools.lru_cache(maxsize=4096)
def _launcher(
    channels: tuple[int, ...], counts: tuple[int, ...], momentum: float | None, counted: bool
) -> Launcher:
    sizes = channels + (0,) * (_AT_ONCE - len(channels))
    unbiased = [count / max(count - 1, 1) for count in counts] + [0.0] * (_AT_ONCE - len(counts))
    of_each: dict[str, Any] = {f"unbiased{i}": value for i, value in enumerate(unbiased)}
    of_each |= {f"C{i}": size for i, size in enumerate(sizes)}
    return Launcher(
        _bn_update_running_kernel,
        (len(channels),),
        num_warps=4,
        momentum=0.0 if momentum is None else float(momentum),
        **of_each,
        BNS=len(channels),
        HAS_COUNTER=counted,
        CUMULATIVE=momentum is None and counted,
        BLOCK_C=power_of_two(max(channels), 32, 1024),
    )
