"""How a definition is described and registered, and the parts that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Definition:
    """A small network with the structure of a published one, and what a matcher has to find in it.

    ``sites`` counts BN -> ReLU (or nothing) -> conv2d in training mode. An activation with two convolutions behind
    it is two sites, a unit that runs twice counts twice, and an explicit symmetric zero padding belongs to its
    convolution. ``additions`` counts the sums of two equal shapes where an operand comes straight from the
    convolution of a site and goes nowhere else. ``heads`` counts BN -> ReLU -> global average pool. The ``eval_``
    twins differ where dropout or stochastic depth is in the way in training only. ``hidden`` and
    ``hidden_additions`` say how many of them lie in a unit that symbolic tracing cannot enter, or records wrongly.

    ``residual``: a network of residual units in which most of what is saved lies in sites, so memory is compared.
    ``traceable``: ``torch.fx.symbolic_trace`` takes the whole (``eval_traceable``: in eval mode). ``breaks``: what
    keeps from being found what else would be. ``drawn``: training draws which of the hidden sites run.
    ``large``: the same structure with more and wider units, for the comparison of memory, where of the small network
    the input, the stem and its pooling are a large part.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: int
    additions: int
    heads: int
    residual: bool
    traceable: bool
    breaks: tuple[str, ...]
    eval_sites: int
    eval_additions: int
    eval_traceable: bool
    hidden: int
    hidden_additions: int
    drawn: bool
    large: Callable[[], nn.Module]


DEFINITIONS: dict[str, Definition] = {}

Factory = Callable[[], nn.Module]


def define(
    *,
    sites: int,
    additions: int = 0,
    heads: int = 0,
    shape: tuple[int, ...] = (2, 3, 16, 16),
    residual: bool = True,
    traceable: bool = True,
    breaks: tuple[str, ...] = (),
    eval_sites: int | None = None,
    eval_additions: int | None = None,
    eval_traceable: bool | None = None,
    hidden: int = 0,
    hidden_additions: int = 0,
    drawn: bool = False,
    large: Callable[[], nn.Module] | None = None,
) -> Callable[[Factory], Factory]:
    """Register a function that makes a network under its own name."""

    def register(factory: Factory) -> Factory:
        name = factory.__name__
        assert name not in DEFINITIONS, name

        def build(make: Factory = factory) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(name))
                return disturb(make())

        DEFINITIONS[name] = Definition(
            name=name,
            build=build,
            shape=shape,
            sites=sites,
            additions=additions,
            heads=heads,
            residual=residual,
            traceable=traceable,
            breaks=breaks,
            eval_sites=sites if eval_sites is None else eval_sites,
            eval_additions=additions if eval_additions is None else eval_additions,
            eval_traceable=traceable if eval_traceable is None else eval_traceable,
            hidden=hidden,
            hidden_additions=hidden_additions,
            drawn=drawn,
            large=partial(build, large or factory),
        )
        return factory

    return register


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def disturb(model: nn.Module) -> nn.Module:
    """Give every norm scales of either sign and zero, offsets, and running statistics of a network that has run."""
    for module in model.modules():
        if isinstance(module, NORMS):
            disturb_norm(module.weight, module.bias)
            disturb_statistics(getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return model


@torch.no_grad()
def disturb_norm(weight: Tensor | None, bias: Tensor | None) -> None:
    """Scales about 0.8 but for a negative one and a zero; offsets on both sides of zero."""
    if weight is not None:
        weight.uniform_(0.4, 1.2)
        weight[0] = -0.6
        weight[1 % len(weight)] = 0.0
    if bias is not None:
        bias.normal_(0.1, 0.4)


@torch.no_grad()
def disturb_statistics(mean: Tensor | None, var: Tensor | None) -> None:
    """Running statistics that are neither those of a fresh norm nor those of the next batch."""
    if mean is not None and var is not None:
        mean.normal_(0.0, 0.3)
        var.uniform_(0.3, 1.6)


def conv1x1(channels: int, width: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A pointwise convolution."""
    return nn.Conv2d(channels, width, 1, stride, bias=bias)


def conv3x3(channels: int, width: int, stride: int = 1, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1."""
    return nn.Conv2d(channels, width, 3, stride, 1, groups=groups, bias=bias)


def norm_relu(channels: int) -> list[nn.Module]:
    """A norm and an activation in place, for a list of layers."""
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def chain(unit: Callable[..., nn.Module], plan: list[tuple[int, int]], channels: int) -> list[nn.Module]:
    """Units one behind another; ``plan`` gives width and stride of each."""
    units = []
    for width, stride in plan:
        units.append(unit(channels, width, stride))
        channels = width
    return units


class BatchNormAct2d(nn.BatchNorm2d):
    """Norm, dropout and activation as one module, in the way of timm: a subclass that counts its batches itself.

    Symbolic tracing walks into it, and in training mode advances the counter of the traced model while it does.
    """

    def __init__(self, channels: int, apply_act: bool = True, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(channels, eps=eps, **options)
        self.drop = nn.Identity()
        self.act: nn.Module = nn.ReLU(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """act(drop(BN(x)))."""
        torch._assert(x.ndim == 4, "four dimensions are needed")
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracks = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            of_batch,
            share,
            self.eps,
        )
        return self.act(self.drop(x))


class Classifier(nn.Module):
    """A body of 4-d features, and a pooled linear classifier without a norm of its own."""

    def __init__(self, body: nn.Module, width: int, classes: int = 5) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """fc(mean(body(x)))."""
        return self.fc(self.body(x).mean((2, 3)))
