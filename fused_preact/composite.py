"""A unit and the network's head composed of PyTorch's own differentiable operations.

The definition without fusion: what serves where the closed-form backward has no rules (``torch.func`` transforms,
forward-mode AD, ``torch.jit.trace``, tensor subclasses). Equations in :mod:`fused_preact.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import BatchNorm, Convolution
from .calls import recomputing, transforming
from .collective import Group, reduced
from .reference import statistics_dtype

__all__ = ["activated", "bn_relu_avg_pool", "unit"]


def unit(
    x: Tensor,
    sites: Sequence[tuple[BatchNorm, Convolution]],
    projection: Convolution | None,
    identity: bool,
    residual: Tensor | None,
) -> Tensor:
    """The output of a unit, or with ``residual`` of a site, as in :mod:`functional`; updates running statistics."""
    added, y = x if identity else residual, x
    for index, (bn, conv) in enumerate(sites):
        a = activated(y, bn)
        if index == 0 and projection is not None:
            added = F.conv2d(a, *projection)
        y = F.conv2d(a, *conv)
    return y if added is None else y + added


def bn_relu_avg_pool(x: Tensor, bn: BatchNorm) -> Tensor:
    """The output of :func:`functional.bn_relu_avg_pool2d`; updates running statistics."""
    return activated(x, bn).mean((2, 3))


def activated(x: Tensor, bn: BatchNorm) -> Tensor:
    """What the forward of a BN module returns, and its ReLU where ``bn.relu``; updates running statistics.

    Raises RuntimeError for a synchronised BN where no other process can be called: in a ``torch.func`` transform.
    """
    if bn.group is not None and transforming():
        raise RuntimeError(
            "nn.SyncBatchNorm in training calls the other processes, which torch.func transforms, forward-mode AD "
            "and torch.jit.trace cannot follow: allowed there are eval mode and nn.BatchNorm2d"
        )
    if bn.training and recomputing():
        # Copies, since the recomputation has to save as many tensors as the first forward did.
        mean, var = (None if t is None else t.clone() for t in (bn.running_mean, bn.running_var))
        bn = bn._replace(running_mean=mean, running_var=var, num_batches_tracked=None)
    momentum = bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    if bn.group is not None:
        z = _synchronised(x, bn, bn.group, momentum or 0.0)
    else:
        running = bn.running_mean, bn.running_var
        z = F.batch_norm(x, *running, bn.weight, bn.bias, bn.batch_stats, momentum or 0.0, bn.eps)
    return F.relu(z) if bn.relu else z


def _synchronised(x: Tensor, bn: BatchNorm, group: Group, momentum: float) -> Tensor:
    """BN with the statistics of all ranks, made of operations that can be differentiated any number of times."""

    def column(vector: Tensor) -> Tensor:
        return vector.view(1, -1, *[1] * (x.dim() - 2))

    wide = x.to(statistics_dtype(x.dtype))
    dims = [d for d in range(x.dim()) if d != 1]
    sums, counted = reduced([wide.sum(dims), wide.new_full((1,), x.numel() // max(x.shape[1], 1))], group)
    total = counted.detach().clamp_min(1)
    mean = sums / total
    centred = wide - column(mean)
    var = reduced([centred.square().sum(dims)], group)[0] / total
    z = centred * column(torch.rsqrt(var + bn.eps))
    if bn.weight is not None:
        z = z * column(bn.weight.to(z.dtype))
    if bn.bias is not None:
        z = z + column(bn.bias.to(z.dtype))
    if bn.running_mean is not None and bn.running_var is not None:
        with torch.no_grad():
            # Where no rank has a value nothing changes.
            weight = (counted > 0).to(mean.dtype) * momentum
            unbiased = var * (total / (total - 1).clamp_min(1))
            for running, new in ((bn.running_mean, mean), (bn.running_var, unbiased)):
                running.add_(weight * (new - running))
    return z.to(x.dtype)
