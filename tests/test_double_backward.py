"""Second derivatives: ``create_graph=True`` differentiates the composition of PyTorch's own operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, MixedUnit, disturb, set_fused
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActConv2d,
    PreActSequential,
    functional,
    models,
)
from fused_preact.functional import BatchNorm, Convolution

pytestmark = pytest.mark.usefixtures("exact_float32")


def biased() -> nn.Module:
    unit = PreActBottleneck(4, 8, 2)
    for name in ("conv1", "conv3", "shortcut"):
        conv: Any = getattr(unit, name)
        setattr(unit, name, nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride))
    return unit


UNITS: dict[str, Callable[[], nn.Module]] = {
    "site": lambda: PreActConv2d(4, 3, 3, 2, 1),
    "site-affine-false": lambda: PreActConv2d(4, 3, 1, affine=False, track_running_stats=False),
    "site-without-relu": lambda: PreActConv2d(4, 3, 3, 2, 1, relu=False),
    "mixed": lambda: MixedUnit(4, 6, 2),
    "site-grouped": lambda: PreActConv2d(4, 6, 3, padding=1, groups=2),
    "basic": lambda: PreActBasicBlock(4, 4),
    "basic-projection": lambda: PreActBasicBlock(4, 6, 2),
    "basic-zero-padding": lambda: PreActBasicBlock(4, 6, 2, shortcut="A"),
    "bottleneck": lambda: PreActBottleneck(4, 4),
    "bottleneck-biases": biased,
    # The second unit is given the statistics of its input, which depend on the first one's.
    "row": lambda: PreActSequential(PreActBasicBlock(4, 4), PreActBasicBlock(4, 4)),
    "net": lambda: models.PreActResNet(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), [PreActSequential(PreActBasicBlock(4, 4))], 4, 3, True
    ),
}


def penalty(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss with a gradient penalty in it, as WGAN-GP has."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    (y.mean() + sum(g.square().sum() for g in grads)).backward()
    found = {"x": x.grad, **{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}
    return {name: grad for name, grad in found.items() if grad is not None}


def compare(module: nn.Module, x: Tensor, backend: str, tolerance: float) -> None:
    plain = set_fused(copy.deepcopy(module), False)
    with fused_preact.backend(backend):
        found = penalty(module, x)
    expected = penalty(plain, x)
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        scale = max(
            float(grad.abs().max()), 1e-3 * largest
        )  # that of a bias before a BN is zero but for rounding
        assert float((found[name] - grad).abs().max()) <= tolerance * scale, name
    for (name, a), b in zip(module.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("unit", UNITS)
def test_gradient_penalty(unit: str, training: bool) -> None:
    torch.manual_seed(1)
    module = disturb(UNITS[unit]()).double().train(training)
    compare(module, torch.randn(3, 4, 5, 4, dtype=torch.float64), "auto", 1e-9)


@BACKENDS
def test_gradient_penalty_of_kernels(backend: str, device: str) -> None:
    """The gradient itself comes from the composition too, and meets the kernels' forward."""
    torch.manual_seed(1)
    module = disturb(PreActBasicBlock(4, 6, 2)).to(device)
    compare(module, torch.randn(3, 4, 5, 4, device=device), backend, 1e-3)


@pytest.mark.parametrize("frozen", ["bn1", "conv1", "bn2.bias", "shortcut", "all but conv2"])
def test_frozen(frozen: str) -> None:
    torch.manual_seed(1)
    module = disturb(PreActBasicBlock(4, 6, 2)).double()
    for name, parameter in module.named_parameters():
        kept = name.startswith("conv2") if frozen == "all but conv2" else not name.startswith(frozen)
        parameter.requires_grad_(kept)
    compare(module, torch.randn(3, 4, 5, 4, dtype=torch.float64), "auto", 1e-9)


def test_one_frozen_batch_norm() -> None:
    torch.manual_seed(1)
    module: Any = disturb(PreActBottleneck(4, 4)).double().train()
    module.bn2.eval()
    compare(module, torch.randn(3, 4, 5, 4, dtype=torch.float64), "auto", 1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradgradcheck(training: bool) -> None:
    """Every argument of a unit with a projection and of a site with a residual, and of the head."""
    torch.manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    running = (None, None) if training else (r(2), r(2).square() + 0.5)

    def unit(x: Tensor, *t: Tensor) -> Tensor:
        sites = [
            (
                BatchNorm(*t[4 * i : 4 * i + 2], *running, None, training),
                Convolution(*t[4 * i + 2 : 4 * i + 4], 1, 1),
            )
            for i in range(2)
        ]
        return functional.residual_unit(x, sites, Convolution(t[8], t[9]))[0]

    arguments = [
        r(2, 2, 3, 3),
        *(t for _ in range(2) for t in (r(2), r(2), r(2, 2, 3, 3), r(2))),
        r(2, 2, 1, 1),
        r(2),
    ]
    arguments = [t.requires_grad_() for t in arguments]
    assert gradcheck(unit, arguments, fast_mode=True)
    assert gradgradcheck(unit, arguments, fast_mode=True)

    def site(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
        bn = BatchNorm(gamma, beta, *running, None, training)
        return functional.preact_site(x, bn, Convolution(weight, padding=1), residual)

    inputs = [t.requires_grad_() for t in (r(2, 2, 3, 3), r(2, 2, 3, 3), r(2), r(2), r(2, 2, 3, 3))]
    assert gradgradcheck(site, inputs, fast_mode=True)

    def head(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return functional.bn_relu_avg_pool2d(x, BatchNorm(gamma, beta, *running, None, training))

    inputs = [t.requires_grad_() for t in (r(2, 2, 3, 3), r(2), r(2))]
    assert gradgradcheck(head, inputs, fast_mode=True)


def test_without_create_graph_no_graph() -> None:
    unit = PreActBasicBlock(4, 4)
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(unit(x).sum(), x)
    assert dx.grad_fn is None


def test_a_bias_written_to_in_between() -> None:
    """Plain PyTorch keeps neither a BN's bias nor a convolution's for backward, and does not mind."""
    unit: Any = biased()
    y = unit(torch.randn(2, 4, 4, 4))
    with torch.no_grad():
        unit.bn2.bias.add_(1)
        unit.conv1.bias.add_(1)
    y.sum().backward()
    assert unit.conv1.weight.grad is not None
