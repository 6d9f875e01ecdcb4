"""Which convolutions a network's training step has: what its launchers ask the chooser, on meta tensors."""

from __future__ import annotations

import torch

from .. import models
from ..kernels.triton.choose import Problem, asked
from ..kernels.triton.common import Device
from ..ops import backend

__all__ = ["distinct", "of_network"]


def of_network(model: str, batch: int, dtype: torch.dtype, device: Device) -> list[Problem]:
    """The distinct problems of one training step, in the order of their cost: those with most FLOPs first.

    Convolutions with groups are left out: they have one path only.
    """
    cifar = model.startswith("cifar")
    size = 32 if cifar else 224
    with torch.device("meta"):
        net = models.create(model, num_classes=10 if cifar else 1000)
        x = torch.empty(batch, 3, size, size, dtype=dtype)
    net = net.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with backend("triton"), asked(device) as found:
        net(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    return distinct(found)


def distinct(found: list[Problem]) -> list[Problem]:
    """One problem for each key, the one that does most beside the convolution; sorted by FLOPs of all its uses.

    Last those of how a BN backward reaches dgrad and wgrad: they are timed with the configurations of both. Of larger
    kernels than 1x1 that is no question: every tap would apply it again.
    """
    kept: dict[str, Problem] = {}
    flops: dict[str, int] = {}
    for problem in found:
        g = problem.geometry
        if g.groups != 1 or (g.r * g.s > 1 and (problem.op == "apply" or "pending" in problem.extras)):
            continue
        before = kept.get(problem.key)
        if before is None or len(problem.extras) > len(before.extras):
            kept[problem.key] = problem
        flops[problem.key] = flops.get(problem.key, 0) + g.rows * g.k * g.c * g.r * g.s
    return sorted(kept.values(), key=lambda p: (p.op == "apply", -flops[p.key]))
