"""The running statistics of a BatchNorm in training, in place and in one launch, the counter included."""

from __future__ import annotations

import functools

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
def _bn_update_running_kernel(
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
    # One program, so that the counter is read before it is written.
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


def bn_update_running(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
) -> None:
    """running <- running + momentum (new - running), in place; vectors [C], the counter an integer tensor.

    The new variance is the unbiased one, var count / (count - 1). ``momentum=None`` is the cumulative average: the
    weight is 1 / counter, read on the device.
    """
    new_mean, new_var = running_mean.contiguous(), running_var.contiguous()
    launcher = _launcher(mean.shape[0], count, momentum, num_batches_tracked is not None)
    launcher(mean.contiguous(), var.contiguous(), new_mean, new_var, num_batches_tracked)
    for buffer, new in ((running_mean, new_mean), (running_var, new_var)):
        if new is not buffer:
            buffer.copy_(new)
    # A kernel's stores are invisible to autograd: a buffer that it saved must be seen to have changed.
    counted = [] if num_batches_tracked is None else [num_batches_tracked]
    torch.autograd.graph.increment_version([running_mean, running_var, *counted])


@functools.lru_cache(maxsize=4096)
def _launcher(channels: int, count: int, momentum: float | None, counted: bool) -> Launcher:
    return Launcher(
        _bn_update_running_kernel,
        (1,),
        num_warps=4,
        momentum=0.0 if momentum is None else float(momentum),
        unbiased=count / max(count - 1, 1),
        C=channels,
        HAS_COUNTER=counted,
        CUMULATIVE=momentum is None and counted,
        BLOCK_C=power_of_two(channels, 32, 1024),
    )
