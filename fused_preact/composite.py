"""A unit and the network's head composed of PyTorch's own differentiable operations.

The definition without fusion: what serves where the closed-form backward has no rules (``torch.func`` transforms,
forward-mode AD, ``torch.jit.trace``, tensor subclasses). Equations in :mod:`fused_preact.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .arguments import BatchNorm, Convolution
from .calls import recomputing

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
    """ReLU of what ``nn.BatchNorm2d.forward`` returns; updates running statistics."""
    if bn.training and recomputing():
        # Copies, since the recomputation has to save as many tensors as the first forward did.
        mean, var = (None if t is None else t.clone() for t in (bn.running_mean, bn.running_var))
        bn = bn._replace(running_mean=mean, running_var=var, num_batches_tracked=None)
    momentum = bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    running = bn.running_mean, bn.running_var
    return F.relu(F.batch_norm(x, *running, bn.weight, bn.bias, bn.batch_stats, momentum or 0.0, bn.eps))
