"""The oracle itself: against PyTorch's own autograd in float64, and by finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, Case, plain_site
from torch import Tensor

import fused_preact
from fused_preact import PreActBasicBlock, PreActBottleneck, reference
from fused_preact.functional import BatchNorm, Convolution, bn_relu_avg_pool2d, preact_conv2d, residual_unit

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def reference_backend():
    with fused_preact.backend("reference"):
        yield


def leaves(case: Case) -> list[Tensor]:
    """x, gamma, beta, weight, bias and residual in float64, beta > 0 and one gamma negative."""
    x = torch.randn(case.n, case.c, case.h, case.w, dtype=torch.float64)
    gamma = torch.linspace(-1, 1, case.c, dtype=torch.float64) + 0.1
    beta = torch.rand(case.c, dtype=torch.float64) + 0.3
    weight = torch.randn(case.k, case.c, *case.kernel, dtype=torch.float64)
    bias = torch.randn(case.k, dtype=torch.float64)
    residual = torch.randn(case.n, case.k, *case.out_size, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, gamma, beta, weight, bias, residual)]


@pytest.mark.parametrize("case", [c for c in CASES if c.values[0].h * c.values[0].w * c.values[0].n > 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_site_agrees_with_autograd(case: Case, training: bool) -> None:
    tensors = leaves(case)
    x, gamma, beta, weight, bias, residual = tensors
    conv = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    running = [torch.randn(case.c).double(), torch.rand(case.c).double() + 0.5]
    expected_running = [t.clone() for t in running]
    y = preact_conv2d(
        x, weight, bias, bn_weight=gamma, bn_bias=beta, running_mean=running[0], running_var=running[1],
        training=training, residual=residual, **conv,
    )  # fmt: skip
    normalised = F.batch_norm(x, *expected_running, gamma, beta, training)
    expected = F.conv2d(F.relu(normalised), weight, bias, **conv) + residual
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for name, a, b in zip(("running_mean", "running_var"), running, expected_running, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    dy = torch.randn_like(y)
    actual, exact = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy)
    for name, a, b in zip(
        ("dx", "dgamma", "dbeta", "dweight", "dbias", "dresidual"), actual, exact, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_site_gradcheck(training: bool) -> None:
    tensors = leaves(Case(n=2, c=3, h=4, w=5, k=2, stride=(2, 1)))

    def site(x, gamma, beta, weight, bias, residual):
        running = [torch.zeros(3).double(), torch.ones(3).double()]
        return preact_conv2d(
            x, weight, bias, bn_weight=gamma, bn_bias=beta, running_mean=running[0], running_var=running[1],
            training=training, residual=residual, stride=(2, 1), padding=1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(site, tensors)


@pytest.mark.parametrize("shortcut", [None, "A", "B"])
@pytest.mark.parametrize("unit", [PreActBasicBlock, PreActBottleneck])
def test_unit_gradcheck(unit, shortcut: str | None) -> None:
    block = unit(4, 4, 1 if shortcut is None else 2, shortcut=shortcut).double()
    parameters = list(block.parameters())
    for p in parameters:
        p.data.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        sites = [(BatchNorm.of(bn), Convolution.of(conv)) for bn, conv in block.sites()]
        projection = None
        if shortcut == "A":
            projection = Convolution(block.shortcut.weight, stride=2)
        elif shortcut == "B":
            projection = Convolution.of(block.shortcut)
        return residual_unit(x, sites, projection)[0]

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_head_gradcheck(training: bool) -> None:
    x = torch.randn(3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    gamma = (torch.randn(4).double()).requires_grad_()
    beta = (torch.rand(4).double()).requires_grad_()

    def head(x, gamma, beta):
        running = None if training else torch.zeros(4).double()
        bn = BatchNorm(gamma, beta, running, running if running is None else running + 1, None, training)
        return bn_relu_avg_pool2d(x, bn)

    assert torch.autograd.gradcheck(head, (x, gamma, beta))
    expected = F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), gamma, beta, training)
    torch.testing.assert_close(head(x, gamma, beta), F.relu(expected).mean((2, 3)))


def test_sums_of_a_site_are_those_of_autograd() -> None:
    """The op level: g and its sums against autograd through an explicit activation."""
    x, gamma, beta, weight, _, _ = leaves(Case(c=3, k=4))
    y = plain_site(x, gamma, beta, weight, None, 1e-5, padding=1)
    dy = torch.randn_like(y)
    dgamma, dbeta = torch.autograd.grad(y, (gamma, beta), dy)
    mean, var = reference.bn_stats(x.detach())
    scale, shift, rstd = reference.bn_scale_shift(mean, var, gamma.detach(), beta.detach(), 1e-5)
    constants = ([1, 1], [1, 1], [1, 1], 1)
    g, sum_g, sum_gx = reference.conv_dgrad(
        dy, weight.detach(), x.detach(), scale, shift, mean, None, *constants
    )
    torch.testing.assert_close(sum_g, dbeta)
    torch.testing.assert_close(rstd * sum_gx, dgamma)
    torch.testing.assert_close(g.sum((0, 2, 3)), dbeta)
