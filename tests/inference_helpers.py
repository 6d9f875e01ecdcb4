"""What the tests of folded inference share: the units, made hard to fold by chance, and the comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_within_policy, disturb, set_fused
from torch import Tensor, nn

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActSequential,
    optimize_for_inference,
    undo_optimize_for_inference,
)


def biased(unit: Any) -> nn.Module:
    """The same unit whose convolutions have biases, shortcut included."""
    for name, conv in list(unit.named_children()):
        if isinstance(conv, nn.Conv2d):
            sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
            setattr(unit, name, nn.Conv2d(*sizes, conv.dilation))
    return unit


def plain_bn(unit: Any) -> nn.Module:
    """The same unit with affine=False."""
    for name, bn in list(unit.named_children()):
        if isinstance(bn, nn.BatchNorm2d):
            setattr(unit, name, nn.BatchNorm2d(bn.num_features, eps=1e-3, affine=False))
    return unit


UNITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic": (lambda: PreActBasicBlock(16, 16), (3, 16, 9, 7)),
    "basic-odd-channels": (lambda: PreActBasicBlock(5, 5), (2, 5, 4, 3)),
    "basic-stride": (lambda: PreActBasicBlock(16, 20, 2), (2, 16, 9, 8)),
    "basic-zero-padding": (lambda: PreActBasicBlock(6, 17, 2, shortcut="A"), (2, 6, 7, 7)),
    "basic-dilation": (lambda: PreActBasicBlock(4, 4, dilation=2), (1, 4, 6, 5)),
    "bottleneck": (lambda: PreActBottleneck(32, 32), (3, 32, 5, 6)),
    "bottleneck-one-pixel": (lambda: PreActBottleneck(8, 8), (2, 8, 1, 1)),
    "bottleneck-stride": (lambda: PreActBottleneck(17, 36, 2), (3, 17, 8, 5)),
    "bottleneck-stride-on-1x1": (lambda: PreActBottleneck(16, 36, 2, stride_on_1x1=True), (2, 16, 7, 9)),
    "bottleneck-activated-identity": (lambda: PreActBottleneck(16, 16, shortcut="A"), (2, 16, 4, 4)),
    "bottleneck-zero-padding": (lambda: PreActBottleneck(16, 68, 2, shortcut="A"), (2, 16, 5, 5)),
    "bottleneck-biases": (lambda: biased(PreActBottleneck(16, 32, 2)), (2, 16, 5, 4)),
    "bottleneck-affine-false": (lambda: plain_bn(PreActBottleneck(16, 16)), (2, 16, 5, 4)),
    "sequence": (
        lambda: PreActSequential(
            PreActBottleneck(8, 16, 2), PreActSequential(PreActBasicBlock(16, 16), PreActBottleneck(16, 32))
        ),
        (5, 8, 8, 7),
    ),
}
ALL_UNITS = pytest.mark.parametrize("name", UNITS)


def awkward(module: nn.Module) -> nn.Module:
    """Disturbed, with a gamma of zero in every BN; eval mode."""
    for child in disturb(module).modules():
        if isinstance(child, nn.BatchNorm2d) and child.affine:
            child.weight[child.num_features // 2] = 0
    return module.eval()


def compare(model: nn.Module, x: Tensor, backend: str = "auto", what: str = "y") -> Tensor:
    """The optimised ``model`` against the plain one in float64, by the policy; returns its output."""
    plain = set_fused(copy.deepcopy(undo_optimize_for_inference(copy.deepcopy(model))), False)
    oracle = copy.deepcopy(plain).double()(x.double())
    with fused_preact.backend(backend):
        y = optimize_for_inference(model)(x)
    assert_within_policy(what, y, plain(x), oracle)
    return y


def make(name: str, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    build, shape = UNITS[name]
    return awkward(build()).to(device), torch.randn(shape, device=device) + 0.2
