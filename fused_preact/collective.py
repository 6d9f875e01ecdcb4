"""Statistics and sums of a whole process group: what a synchronised BN (``nn.SyncBatchNorm``) normalises with.

Per BN one small all-gather in forward and one small all-reduce in backward. The messages are those of PyTorch's own
``SyncBatchNorm`` (mean, (v + eps)^-1/2 and count; sum g and sum g (x - mu)), in the order in which its modules send
them: a rank on which a unit runs child by child, because of a hook there, says and hears the right thing.

The operations are the functional ones, which ``torch.compile`` traces as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "group_of", "merged", "reduced", "summed"]


class Group(NamedTuple):
    """A process group by its name: a constant, that keeps no group alive after its end."""

    name: str
    size: int


def group_of(module: Any) -> Group | None:
    """The group over which ``module``, an ``nn.SyncBatchNorm``, takes its statistics in its present mode.

    None where it is a plain BN, as PyTorch decides it: in eval mode, without a process group, in a group of one.
    """
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group: Any = module.process_group or dist.group.WORLD
    size = dist.get_world_size(group)
    return Group(group.group_name, size) if size > 1 else None


def merged(mean: Tensor, var: Tensor, count: int, eps: float, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel of all ranks: [C], [C], [1].

    ``mean``, ``var`` and ``count`` are this rank's. Chan's formula for all parts at once, from a mean that is one of
    them, so that means far from zero cancel and equal ones leave no rest; ranks get the same bits. A rank without
    values has no weight. Zeros where no rank has any.
    """
    channels = mean.shape[0]
    message = torch.cat([mean, torch.rsqrt(var + eps), mean.new_full((1,), count)])
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(message, group.size, group.name)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered).view(group.size, -1)
    means, rstds, counts = gathered.split([channels, channels, 1], 1)
    total = counts.sum(0)
    share = counts / total.clamp_min(1)
    # A child that runs alone sends zeros where it has no values.
    variances = torch.where(counts > 0, rstds.pow(-2) - eps, 0).clamp_min(0)
    pivot = means.index_select(0, counts.flatten().argmax(0, keepdim=True))
    mean = pivot[0] + (share * (means - pivot)).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total


def summed(sum_g: Tensor, sum_gx: Tensor, count: int, total: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The two sums of a BN's backward over all ranks, times count / total.

    Whoever applies the BN's gradient divides by this rank's ``count`` of values, and so by ``total``.
    """
    both = _reduced(torch.cat([sum_g, sum_gx]), group) * (count / total.clamp_min(1))
    first, second = both.chunk(2)
    return first, second


def reduced(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sums of vectors over all ranks, by one all-reduce that can be differentiated any number of times."""
    both: Tensor = _AllReduce.apply(torch.cat(list(parts)), group)
    return list(both.split([part.shape[0] for part in parts]))


class _AllReduce(torch.autograd.Function):
    """y = sum of x over the ranks. The gradient of what all ranks make of y is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _AllReduce.apply(dy, ctx.group), None


def _reduced(x: Tensor, group: Group) -> Tensor:
    made: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name)
    made = torch.ops._c10d_functional.wait_tensor(made)
    return made
