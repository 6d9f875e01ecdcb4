"""Sites without a ReLU, operation by operation: BN -> convolution. Units of them are in test_units.py and others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, CASES, Case, MixedUnit, assert_within_policy, disturb, make_site
from torch import Tensor, nn

import fused_preact
from fused_preact import PreActConv2d, folding, fuse, ops, reference
from fused_preact.arguments import BatchNorm, ConvKind, Convolution, NormKind, check_unit, checked
from fused_preact.functional import preact_conv2d

pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")


# --- kernels ----------------------------------------------------------------------------------------------------

SHAPES = [CASES[i].values[0] for i in (0, 1, 3, 6)]
"""Padded with ragged channels; pointwise; pointwise and strided; padded and strided."""
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run(k: Any, s: Any, constants: Any) -> dict[str, Tensor]:
    """Every operation that reads a site's activation or its mask."""
    bn = [s.scale, s.shift, s.mean, s.rstd]
    y, mean, var = k.conv_fprop(
        s.x, s.scale, s.shift, s.weight, s.bias, s.residual, *constants, True, False, False
    )
    joint, *_ = k.conv_fprop_bn(s.x, s.scale, s.shift, s.weight, s.bias, *constants, None, None, 1e-5, False)
    g, sum_g, sum_gx = k.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *constants, False)
    dweight = k.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *constants, False)
    whole = k.conv_backward(s.dy, [], s.weight, s.x, bn, s.da, None, *constants, True, False, True, False)
    names = ("backward g", "backward sum_g", "backward sum_gx", "backward dweight", "dgamma")
    return {
        "y": y, "mean": mean, "var": var, "fprop_bn y": joint, "g": g, "sum_g": sum_g, "sum_gx": sum_gx,
        "dweight": dweight, **dict(zip(names, whole, strict=True)),
    }  # fmt: skip


@BACKENDS
@FLOATS
@pytest.mark.parametrize("groups", [1, 2], ids=["tiles", "split"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_operations(backend: str, device: str, case: Case, groups: int, dtype: torch.dtype) -> None:
    """Against the oracle, which is compared with autograd below; a group of its own takes the split path."""
    if groups > 1:
        case = Case(**{**vars(case), "c": case.c + case.c % 2, "k": case.k + case.k % 2})
    s = make_site(case, dtype, device)
    s.weight = s.weight[:, : case.c // groups].contiguous()
    constants = (*s.constants[:3], groups)
    d = s.double()
    actual = run(ops.table(backend, s.x), s, constants)
    eager, oracle = run(reference, s, constants), run(reference, d, constants)
    sizes, centred = oracle["g"].abs(), (d.x - d.mean.view(1, -1, 1, 1)).abs()
    sums = {"sum_g": sizes.sum((0, 2, 3)), "sum_gx": (sizes * centred).sum((0, 2, 3))}
    terms = {name: sums[name.split()[-1]] for name in actual if name.split()[-1] in sums}
    terms["dgamma"] = s.rstd.double() * sums["sum_gx"]
    terms["mean"] = oracle["mean"].abs() + oracle["var"].sqrt()
    for name, tensor in actual.items():
        assert_within_policy(
            name, tensor, eager[name], oracle[name], terms=terms.get(name), terms_dtype=dtype
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_oracle_is_autograd(training: bool) -> None:
    site: Any = disturb(PreActConv2d(5, 4, 3, 2, 1, relu=False)).double().train(training)
    plain = copy.deepcopy(site)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    residual = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    results = []
    for module, fused in ((site, True), (plain, False)):
        given = [t.clone().requires_grad_() for t in (x, residual)]
        if fused:
            y = module(*given)
        else:
            y = module.conv(module.bn(given[0])) + given[1]
        assert (y < 0).any()
        grads = torch.autograd.grad(y.square().sum(), [*given, *module.parameters()])
        results.append([y, *grads, *module.buffers()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# --- not a number, infinities -------------------------------------------------------------------------------------


@BACKENDS
@FLOATS
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "without"])
@pytest.mark.parametrize("groups", [1, 2], ids=["tiles", "split"])
def test_infinities_are_those_of_pytorch(
    backend: str, device: str, groups: int, relu: bool, dtype: torch.dtype
) -> None:
    """Where PyTorch's own operations have NaN and infinities there are the same, and nowhere else.

    Not at the border: there the joint backward multiplies a pixel by zeros that stand for no gradient at all.
    """
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(2, 6, 9, 10, generator=generator)
    values[0, 1, 2, 3], values[1, 4, 4, 1], values[1, 3, 6, 5] = float("nan"), float("inf"), -float("inf")
    weight = torch.randn(4, 6 // groups, 3, 3, generator=generator).to(device, dtype)
    gamma = torch.linspace(-1, 1.5, 6, device=device)
    shared = (
        torch.rand(6, generator=generator).to(device),
        torch.rand(6, generator=generator).to(device) + 1,
    )
    found = []
    for fused in (True, False):
        x = values.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        w, g = weight.clone().requires_grad_(), gamma.clone().requires_grad_()
        beta = torch.full((6,), 0.3, device=device, requires_grad=True)
        if fused:
            with fused_preact.backend(backend):
                y = preact_conv2d(
                    x, w, bn_weight=g, bn_bias=beta, running_mean=shared[0], running_var=shared[1],
                    padding=1, groups=groups, relu=relu,
                )  # fmt: skip
                y.backward(torch.ones_like(y))
        else:
            z = F.batch_norm(x.float(), *shared, g, beta).to(dtype)
            y = F.conv2d(F.relu(z) if relu else z, w, None, 1, 1, 1, groups)
            y.backward(torch.ones_like(y))
        found.append({"y": y, "dx": x.grad, "dweight": w.grad, "dgamma": g.grad, "dbeta": beta.grad})
    for name, actual in found[0].items():
        expected = found[1][name]
        odd = ~expected.isfinite()
        assert torch.equal(~actual.isfinite(), odd), name
        assert torch.equal(actual[odd].isnan(), expected[odd].isnan()), name
        scale = expected[~odd].abs().max().item()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            actual[~odd].float(), expected[~odd].float(), rtol=tolerance, atol=tolerance * scale, msg=name
        )
    assert (~found[0]["y"].isfinite()).any()


# --- what a plan and a folded unit know ---------------------------------------------------------------------------


def test_remembered_launches_are_not_those_of_a_site_with_a_relu() -> None:
    x, conv = torch.randn(2, 4, 5, 5), ConvKind.of(Convolution(torch.randn(3, 4, 3, 3)))
    plans = [
        checked(
            check_unit,
            x,
            ((NormKind.of(BatchNorm(training=True, relu=relu)), conv),),
            None,
            False,
            None,
            False,
        )
        for relu in (True, False, True)
    ]
    assert [plan.unit.sites[0].relu for plan in plans] == [True, False, True]
    assert plans[0].memo is plans[2].memo
    assert plans[0].memo is not plans[1].memo


class Block(nn.Module):
    """A whole unit; padding behind a BN without a ReLU is why that BN cannot be folded into what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](self.bns[0](x))
        y = self.convs[1](self.bns[1](y).relu())
        return self.convs[2](self.bns[2](y)) + x


@BACKENDS
@FLOATS
def test_folded(backend: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    plain = disturb(nn.Sequential(Block(), Block())).eval().to(device)
    for bn in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.bias.data += 0.5  # seen at the borders
    exact = copy.deepcopy(plain.to(dtype)).double()
    folded = fused_preact.optimize_for_inference(fuse(copy.deepcopy(plain)))
    ran = []
    run_chain = folding.run_chain
    monkeypatch.setattr("fused_preact.inference.run_chain", lambda *a: ran.append(len(a[0])) or run_chain(*a))
    folded = fused_preact.optimize_for_inference(folded)
    x = torch.randn(2, 6, 5, 7).to(device, dtype)
    with torch.inference_mode(), fused_preact.backend(backend):
        y = folded(x)
    assert ran == [2]
    with torch.inference_mode():
        assert_within_policy("y", y, plain(x), exact(x.double()), ulps=16)


# --- where PyTorch's own operations serve -------------------------------------------------------------------------


def test_transforms() -> None:
    torch.manual_seed(3)
    unit = disturb(MixedUnit(4, 6, 2)).double().eval()
    plain = copy.deepcopy(unit)
    plain.fused = False
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for model in (unit, plain):
        model.requires_grad_(False)
    derivatives = [torch.func.grad(lambda t, m=m: m(t).square().sum())(x) for m in (unit, plain)]
    torch.testing.assert_close(*derivatives)


def test_flops_are_those_of_the_convolutions() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for relu in (True, False):
        site = PreActConv2d(6, 8, 3, padding=1, relu=relu)
        with FlopCounterMode(display=False) as counter:
            site(torch.randn(2, 6, 5, 5, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 2 * 25 * 8 * 6 * 9


def test_saves_the_input_alone() -> None:
    site = PreActConv2d(8, 8, 3, padding=1, bias=False, relu=False)
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        site(x)
    large = [t for t in kept if t.dim() == 4 and t.shape[0] == 2]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
