"""The network of a run, its optimizer, and how both are spread over processes and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import Config, Recipe
from .world import World


class Shape(Protocol):
    """What a network has to know of the data: a ``DataSet``, or what a file of weights says of one."""

    @property
    def num_classes(self) -> int: ...

    @property
    def in_channels(self) -> int: ...


def model_options(config: Config) -> dict[str, Any]:
    """The keywords of ``models.create`` that ``config`` sets."""
    options = {"order": config.order, "shortcut": config.shortcut, "body": config.body}
    return {name: value for name, value in options.items() if value is not None}


def build_model(config: Config, data: Shape, *, fused: bool) -> nn.Module:
    """The model of ``config`` with the initial weights of its seed, the same for fused and plain."""
    from fused_preact import models  # not at the top: --help should not wait for the kernels

    torch.manual_seed(config.seed)
    return models.create(
        config.recipe.model,
        num_classes=data.num_classes,
        fused=fused,
        in_channels=data.in_channels,
        **model_options(config),
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One group, or with ``decay_norm=False`` a second one without decay: BN parameters and biases, the vectors."""
    params = [p for p in model.parameters() if p.requires_grad]
    if recipe.decay_norm:
        return [{"params": params, "weight_decay": recipe.weight_decay}]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with the recipe's settings over ``model``'s parameters."""
    return torch.optim.SGD(
        parameter_groups(model, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov
    )


def spread(model: nn.Module, config: Config, world: World, device: torch.device) -> nn.Module:
    """What to call in training: ``model``, sharded in place with ``fsdp``, or wrapped so that gradients are averaged.

    Buffers are not kept equal: no forward of training reads them, and tests use rank 0's.
    """
    if world.size == 1:
        return model
    if config.fsdp:
        from torch.distributed.fsdp import fully_shard

        if config.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for stage in stages(model):
            fully_shard(stage)
        fully_shard(model)
        return model
    wrap = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in signature(wrap).parameters  # in torch 2.13
    never: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    around = wrap(model, device_ids=[device] if device.type == "cuda" else None, **never)
    if config.sync_bn:
        # After wrapping: DDP takes no CPU model with such children. They keep the parameters that it has seen.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return around


def stages(model: nn.Module) -> list[nn.Sequential]:
    """The stages of ``model``, each a sequence of units; none for a network that is not the paper's."""
    return list(getattr(model, "stages", ()))


def checkpoint_units(model: nn.Module) -> None:
    """Keep the input of every sqrt(n)-th of a stage's n units for backward, and compute the others again from it.

    That is the number for which inputs and one group's activations together are least. The stages' ``forward`` is
    replaced on the instances; parameters, buffers and names stay.
    """
    for stage in stages(model):
        units = list(stage)
        size = max(1, math.isqrt(len(units)))
        groups = [type(stage)(*units[i : i + size]) for i in range(0, len(units), size)]
        stage.forward = partial(_in_groups, stage.forward, groups)  # type: ignore[method-assign]


def _in_groups(forward: Any, groups: Sequence[nn.Module], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    for group in groups:
        around = partial(_first_and_again, group)
        x = checkpoint(group, x, use_reentrant=False, context_fn=around, preserve_rng_state=True)
    return x


def _first_and_again(group: nn.Module) -> Any:
    return nullcontext(), _statistics_kept(group)


@contextmanager
def _statistics_kept(group: nn.Module) -> Iterator[None]:
    """BNs in training mode leave their running statistics alone: the first forward has updated them."""
    norms = [m for m in group.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [
        (n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def whole(value: Any) -> Any:
    """``value`` with every sharded tensor in it put together; all ranks have to ask at once."""
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like(value: Tensor, other: Tensor) -> Tensor:
    """``value`` on the device of ``other``, sharded as it is."""
    if not hasattr(other, "full_tensor"):
        return value.to(other.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]
