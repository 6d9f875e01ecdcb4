"""The Triton convolutions against the float64 oracle: in the interpreter everywhere, compiled with ``-m gpu``."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers import CASES, DEVICES, DTYPES, FORMATS, Case, assert_within_policy, make_site, triton_ops

from fused_preact import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned", "exact_float32"),
    pytest.mark.parametrize("device", DEVICES),
]

# The whole list of shapes in float32; in 16 bits those that take another path through the kernels.
ALL = [(p, torch.float32) for p in CASES] + [
    (CASES[i], t) for i in (0, 1, 5) for t in (torch.bfloat16, torch.float16)
]


SITES = pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(p.values[0], dtype, id=f"{str(dtype)[6:]}-{p.id}") for p, dtype in ALL],
)


@SITES
@pytest.mark.parametrize("extras", [True, False], ids=["bias-residual-stats", "bare"])
def test_conv_fprop(device: str, case: Case, dtype: torch.dtype, extras: bool) -> None:
    s = make_site(case, dtype, device)
    d = s.double()
    added = (s.bias, s.residual) if extras else (None, None)
    exact = (d.bias, d.residual) if extras else (None, None)
    y, mean, var = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, *added, *s.constants, extras)
    eager, _, _ = reference.conv_fprop(s.x, s.scale, s.shift, s.weight, *added, *s.constants, False)
    oracle, _, _ = reference.conv_fprop(d.x, d.scale, d.shift, d.weight, *exact, *s.constants, False)
    assert_within_policy("y", y, eager, oracle)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if not extras:
        assert mean.numel() == var.numel() == 0
        return
    # Statistics are those of the stored value, whatever rounding it went through.
    exact_mean, exact_var = reference.bn_stats(y.double())
    eager_mean, eager_var = reference.bn_stats(y)
    assert_within_policy("mean", mean, eager_mean, exact_mean)
    assert_within_policy("var", var, eager_var, exact_var)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [True, False], ids=["bias-residual", "bare"])
@pytest.mark.parametrize("prologue", [True, False], ids=["prologue", "folded"])
def test_conv_fprop_for_folded_norms(device: str, dtype: torch.dtype, extras: bool, prologue: bool) -> None:
    """Without the prologue x is read as it is; the ReLU comes after the bias and before the residual."""
    for case in (CASES[i].values[0] for i in (0, 1, 5)):
        s = make_site(case, dtype, device)
        d = s.double()
        flags = (*s.constants, False, True)
        affine = (s.scale, s.shift) if prologue else (None, None)
        exact = (d.scale, d.shift) if prologue else (None, None)
        added = (s.bias, s.residual) if extras else (None, None)
        wide = (d.bias, d.residual) if extras else (None, None)
        y, mean, var = triton_ops.conv_fprop(s.x, *affine, s.weight, *added, *flags)
        eager, _, _ = reference.conv_fprop(s.x, *affine, s.weight, *added, *flags)
        oracle, _, _ = reference.conv_fprop(d.x, *exact, d.weight, *wide, *flags)
        assert_within_policy(case.id, y, eager, oracle)
        assert mean.numel() == var.numel() == 0
        assert extras or bool((y >= 0).all())


@SITES
@pytest.mark.parametrize("users", [1, 2], ids=["one-user", "two-users"])
def test_conv_dgrad(device: str, case: Case, dtype: torch.dtype, users: int) -> None:
    s = make_site(case, dtype, device)
    d = s.double()
    da = s.da if users == 2 else None
    g, sum_g, sum_gx = triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, da, *s.constants)
    eager = reference.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, da, *s.constants)
    exact_da = d.da if users == 2 else None
    oracle = reference.conv_dgrad(d.dy, d.weight, d.x, d.scale, d.shift, d.mean, exact_da, *s.constants)
    assert_within_policy("g", g, eager[0], oracle[0])
    # The sums are of the stored g: their error is that of its rounding, as eager's is.
    exact_g, centred = oracle[0].abs(), (d.x - d.mean.view(1, -1, 1, 1)).abs()
    for name, actual, same, exact, terms in (
        ("sum_g", sum_g, eager[1], oracle[1], exact_g),
        ("sum_gx", sum_gx, eager[2], oracle[2], exact_g * centred),
    ):
        assert_within_policy(name, actual, same, exact, terms=terms.sum((0, 2, 3)), terms_dtype=dtype)
    wide = g.double()
    difference = (sum_g.double() - wide.sum((0, 2, 3))).abs()
    assert (difference <= 4 * 2.0**-23 * wide.abs().sum((0, 2, 3))).all(), "sum_g is not that of the stored g"


@SITES
def test_conv_dgrad_unmasked(device: str, case: Case, dtype: torch.dtype) -> None:
    s = make_site(case, dtype, device)
    d = s.double()
    nothing = (None,) * 4
    da, sum_g, sum_gx = triton_ops.conv_dgrad(s.dy, s.weight, s.x, *nothing, *s.constants)
    eager, _, _ = reference.conv_dgrad(s.dy, s.weight, s.x, *nothing, *s.constants)
    oracle, _, _ = reference.conv_dgrad(d.dy, d.weight, d.x, *nothing, *s.constants)
    assert_within_policy("da", da, eager, oracle)
    assert sum_g.numel() == sum_gx.numel() == 0


@SITES
def test_conv_wgrad(device: str, case: Case, dtype: torch.dtype) -> None:
    s = make_site(case, dtype, device)
    d = s.double()
    dweight = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    eager = reference.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    oracle = reference.conv_wgrad(d.dy, d.x, d.scale, d.shift, d.weight, *s.constants)
    assert_within_policy("dweight", dweight, eager, oracle)


def test_conv_wgrad_many_splits(device: str) -> None:
    """A reduction long enough to be split, with a ragged last part."""
    case = Case(n=3, c=16, h=37, w=29, k=16, kernel=(1, 1), padding=(0, 0))
    s = make_site(case, torch.float32, device)
    d = s.double()
    dweight = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    eager = reference.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    oracle = reference.conv_wgrad(d.dy, d.x, d.scale, d.shift, d.weight, *s.constants)
    assert_within_policy("dweight", dweight, eager, oracle)


@FORMATS
@pytest.mark.parametrize("kernel", [1, 3])
def test_dweight_strides(device: str, memory_format: torch.memory_format, kernel: int) -> None:
    """DDP's buckets compare strides, and those of a 1x1 weight are ambiguous."""
    s = make_site(Case(kernel=(kernel, kernel), padding=(0, 0)), torch.float32, device)
    weight = s.weight.clone().contiguous(memory_format=memory_format)
    dweight = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, weight, *s.constants)
    assert dweight.stride() == weight.stride()


APPLY = [
    pytest.param(CASES[i].values[0], dtype, id=f"{str(dtype)[6:]}-{CASES[i].id}")
    for i, dtype in (
        *((i, torch.float32) for i in (0, 1, 2, 3, 4, 5, 8, 11, 13, 15)),
        *((i, torch.bfloat16) for i in (0, 1, 3, 5)),
        (2, torch.float16),
    )
]


@pytest.mark.parametrize(("case", "dtype"), APPLY)
@pytest.mark.parametrize("way", ["loaded", "stored"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "eval"])
def test_conv_backward_with_a_pending_bn(
    device: str, case: Case, dtype: torch.dtype, way: str, batch_stats: bool
) -> None:
    """The BN backward behind the convolution, applied where dgrad and wgrad read dy, or stored for both."""
    from fused_preact.kernels.triton import choose

    s = make_site(case, dtype, device)
    # Means that BN makes much of at a pixel outside: -mean is far from 0.
    y = (s.residual.float() + 3).to(dtype)
    mean, var = torch.full((case.k,), 3.0, device=device), torch.rand(case.k, device=device) + 0.5
    gamma = torch.linspace(-1, 1.5, case.k, device=device)
    scale, _, rstd = reference.bn_scale_shift(mean, var, gamma, None, 1e-5)
    sums = [t * s.dy[:, 0].numel() for t in torch.rand(2, case.k, device=device)]
    d = s.double()

    def run(k, t, last):
        vectors = [v.to(t.mean.dtype) for v in (mean, scale, rstd, *(sums if batch_stats else []))]
        bn = [t.scale, t.shift, t.mean, t.rstd]
        arguments = (t.dy, [y.to(last), *vectors], t.weight, t.x, bn, t.da, None, *s.constants)
        return k.conv_backward(*arguments, True, False, True)

    with choose.forced(way, None):
        actual = run(triton_ops, s, dtype)
    eager, oracle = run(reference, s, dtype), run(reference, d, torch.float64)
    assert_within_policy("g", actual[0], eager[0], oracle[0])
    assert_within_policy("dweight", actual[3], eager[3], oracle[3])
    exact, centred = oracle[0].abs(), (d.x - d.mean.view(1, -1, 1, 1)).abs()
    for i, terms in ((1, exact), (2, exact * centred)):
        total = terms.sum((0, 2, 3))
        name = ("sum_g", "sum_gx")[i - 1]
        assert_within_policy(name, actual[i], eager[i], oracle[i], terms=total, terms_dtype=dtype)
    assert torch.equal(actual[4], s.rstd * actual[2]), "dgamma"


@pytest.mark.parametrize("library", [(), ("conv_dgrad",), ("conv_wgrad",), ("conv_dgrad", "conv_wgrad")])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_conv_backward_of_either_path(
    device: str, library: tuple[str, ...], weight_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned table may choose the library for one of the two: all five results whoever serves them."""
    from fused_preact.kernels.triton import choose

    for name in library:
        module = importlib.import_module(f"fused_preact.kernels.triton.{name}")
        monkeypatch.setattr(module, "choose", lambda *asked: choose.Choice("split", None, "forced"))
    s = make_site(CASES[2].values[0], torch.float32, device)

    def run(k: Any, s: Any) -> Any:
        bn = [s.scale, s.shift, s.mean, s.rstd]
        arguments = (s.dy, [], s.weight, s.x, bn, s.da, None, *s.constants)
        return k.conv_backward(*arguments, True, False, weight_grad)

    choose.reload()  # launches planned by other tests
    try:
        actual = run(triton_ops, s)
    finally:
        choose.reload()
    eager, oracle = run(reference, s), run(reference, s.double())
    for i, name in enumerate(("g", "sum_g", "sum_gx", "dweight", "dgamma")):
        assert_within_policy(name, actual[i], eager[i], oracle[i])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_fprop_bn(device: str, affine: bool, groups: int) -> None:
    """The bits of the two operations that it joins, on the fused path and on the split one."""
    s = make_site(Case(c=6, k=20, h=7, w=9), torch.float32, device)
    weight, constants = s.weight[:, : 6 // groups].contiguous(), (*s.constants[:3], groups)
    gamma, beta = (torch.randn(20).to(device), torch.randn(20).to(device)) if affine else (None, None)
    site = (s.x, s.scale, s.shift, weight, s.bias)
    y, mean, var, *vectors = triton_ops.conv_fprop_bn(*site, *constants, gamma, beta, 1e-3)
    apart = triton_ops.conv_fprop(*site, None, *constants, True)
    wanted = (*apart, *triton_ops.bn_scale_shift(*apart[1:], gamma, beta, 1e-3))
    for a, b in zip((y, mean, var, *vectors), wanted, strict=True):
        assert torch.equal(a, b)
