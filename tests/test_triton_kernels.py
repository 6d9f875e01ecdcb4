"""Every Triton kernel against the float64 oracle: in the interpreter everywhere, compiled with ``-m gpu``."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from helpers import CASES, DEVICES, DTYPES, Case, assert_within_policy, make_site, triton_ops

import fused_preact
from fused_preact import reference

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.parametrize("device", DEVICES)]

# The whole list of shapes in float32; in 16 bits those that take another path through the kernels.
ALL = [(p, torch.float32) for p in CASES] + [
    (CASES[i], t) for i in (0, 1, 5) for t in (torch.bfloat16, torch.float16)
]
SITES = pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(p.values[0], dtype, id=f"{str(dtype)[6:]}-{p.id}") for p, dtype in ALL],
)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 means float32: TF32 has a test of its own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "none"])
@pytest.mark.parametrize("shape", [(2, 17, 7, 9), (1, 1, 5, 3), (3, 100, 4, 4), (2, 3, 1, 1)])
def test_bn_backward_apply(
    device: str, dtype: torch.dtype, training: bool, identity: bool, shape: tuple[int, ...]
) -> None:
    n, c, h, w = shape
    s = make_site(Case(n=n, c=c, h=h, w=w, k=3, kernel=(1, 1), padding=(0, 0)), dtype, device)
    d = s.double()
    sums = torch.randn(2, c).to(device)
    residual = s.dy.new_tensor(torch.randn(shape).tolist()) if identity else None

    def apply(k, site, dtype):
        added = None if residual is None else residual.to(dtype)
        vectors = (site.mean, site.scale, site.rstd, *(v.to(site.mean.dtype) for v in sums))
        return k.bn_backward_apply(site.da, site.x, *vectors, training, added)

    dx = apply(triton_ops, s, dtype)
    assert_within_policy("dx", dx, apply(reference, s, dtype), apply(reference, d, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 17, 7, 9), (1, 1, 5, 3), (5, 65, 4, 4), (2, 3, 1, 1), (1, 100, 70, 3)])
def test_bn_stats(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 2 + 3).to(dtype).to(device).contiguous(memory_format=torch.channels_last)
    mean, var = triton_ops.bn_stats(x)
    eager, oracle = reference.bn_stats(x), reference.bn_stats(x.double())
    assert_within_policy("mean", mean, eager[0], oracle[0])
    assert_within_policy("var", var, eager[1], oracle[1])


@pytest.mark.parametrize("offset", [1e2, 1e4, -1e4])
def test_bn_stats_far_from_zero(device: str, offset: float) -> None:
    """mean / std of 1e4: raw E[x^2] - E[x]^2 would leave no digit of the variance."""
    x = (torch.randn(2, 5, 41, 33) + offset).to(device).contiguous(memory_format=torch.channels_last)
    mean, var = triton_ops.bn_stats(x)
    exact_mean, exact_var = reference.bn_stats(x.double())
    assert ((mean.double() - exact_mean).abs() <= 2 * 2.0**-23 * abs(offset)).all()
    assert_within_policy("var", var, exact_var.float(), exact_var, ulps=8)


def test_bn_stats_constant_channel(device: str) -> None:
    x = torch.full((2, 3, 9, 5), 1234.5678, device=device)
    mean, var = triton_ops.bn_stats(x)
    assert (mean == x[0, 0, 0, 0]).all()
    assert (var == 0).all()


def test_bn_stats_two_levels(device: str) -> None:
    """More tiles than one program merges, the last of them ragged, means drifting from tile to tile."""
    from fused_preact.kernels.triton.finalize import TileStatistics, merge_statistics, sum_partials

    rows, per_tile = 2500 * 4 - 3, 4
    x = torch.randn(rows, 5, dtype=torch.float64) + torch.linspace(0, 30, rows)[:, None].double()
    tiles = [x[i : i + per_tile] for i in range(0, rows, per_tile)]
    zero = torch.zeros(5)
    partials = torch.stack([torch.stack([t.mean(0), zero, t.var(0, correction=0) * len(t)]) for t in tiles])
    mean, var = merge_statistics(TileStatistics(partials.float().to(device), per_tile, rows))
    assert torch.allclose(mean.double().cpu(), x.mean(0), rtol=1e-6)
    assert torch.allclose(var.double().cpu(), x.var(0, correction=0), rtol=1e-6)

    values = torch.randn(2500, 70)  # more columns than a block holds, and no multiple of it
    first, second = torch.empty(20).to(device), torch.empty(50).to(device)
    sum_partials(values.to(device), first, second)
    total = torch.cat([first, second]).double().cpu()
    assert torch.allclose(total, values.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_bn_scale_shift(device: str, affine: bool) -> None:
    c = 65
    mean, var = torch.randn(c).to(device) * 100, torch.rand(c).to(device)
    gamma, beta = (torch.randn(c).to(device), torch.randn(c).to(device)) if affine else (None, None)
    actual = triton_ops.bn_scale_shift(mean, var, gamma, beta, 1e-5)
    eager = reference.bn_scale_shift(mean, var, gamma, beta, 1e-5)
    wide = (t if t is None else t.double() for t in (mean, var, gamma, beta))
    oracle = reference.bn_scale_shift(*wide, 1e-5)
    for name, a, e, o in zip(("scale", "shift", "rstd"), actual, eager, oracle, strict=True):
        assert_within_policy(name, a, e, o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(2, 17, 7, 9), (3, 65, 1, 1), (1, 1, 9, 8), (300, 3, 2, 1)])
def test_head(device: str, dtype: torch.dtype, training: bool, shape: tuple[int, ...]) -> None:
    n, c, h, w = shape
    s = make_site(Case(n=n, c=c, h=h, w=w, k=1, kernel=(1, 1), padding=(0, 0)), dtype, device)
    d = s.double()
    dy = torch.randn(n, c).to(dtype).to(device)

    def head(k, s, dy):
        y = k.bn_relu_avg_pool(s.x, s.scale, s.shift)
        sums = k.bn_relu_avg_pool_reduce(dy, s.x, s.scale, s.shift, s.mean)
        dx = k.bn_relu_avg_pool_apply(dy, s.x, s.scale, s.shift, s.mean, s.rstd, *sums, training)
        return y, *sums, dx

    actual, eager, oracle = head(triton_ops, s, dy), head(reference, s, dy), head(reference, d, dy.double())
    # What cancels in dx and in the sums: terms of the size of dy / HW, over all pixels in the sums.
    share = dy.double().abs().sum(0)
    spread = (d.x - d.mean.view(1, -1, 1, 1)).abs().amax((0, 2, 3))
    terms = (None, share, share * spread, (d.scale.abs() * share / (h * w)).max().expand(shape))
    for name, a, e, o, t in zip(("y", "sum_g", "sum_gx", "dx"), actual, eager, oracle, terms, strict=True):
        assert_within_policy(name, a, e, o, terms=t)


def test_large_mean(device: str) -> None:
    """An input with mean / std of 1e4, its values exactly representable so that no mask is a matter of luck."""
    case = Case(c=5, k=4)
    s = make_site(case, torch.float32, device)
    grid = torch.randint(-8, 9, s.x.shape).to(device) / 4
    s.x = (grid + 1e4).contiguous(memory_format=torch.channels_last)
    s.scale = torch.ones_like(s.scale)
    s.shift = torch.full_like(s.shift, -1e4 + 0.125)
    s.mean = torch.full_like(s.mean, 1e4)
    d = s.double()
    args = (s.bias, s.residual, *s.constants, True)
    y, mean, var = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, *args)
    eager = reference.conv_fprop(s.x, s.scale, s.shift, s.weight, *args)[0]
    wide = (d.bias, d.residual, *s.constants, True)
    oracle = reference.conv_fprop(d.x, d.scale, d.shift, d.weight, *wide)
    assert_within_policy("y", y, eager, oracle[0])
    assert_within_policy("mean", mean, mean, oracle[1])
    assert_within_policy("var", var, var, oracle[2])
    actual = triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, None, *s.constants)
    same = reference.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, None, *s.constants)
    exact = reference.conv_dgrad(d.dy, d.weight, d.x, d.scale, d.shift, d.mean, None, *s.constants)
    sizes = exact[0].abs()
    terms = (None, sizes.sum((0, 2, 3)), (sizes * (d.x - 1e4).abs()).sum((0, 2, 3)))
    for name, a, e, o, t in zip(("g", "sum_g", "sum_gx"), actual, same, exact, terms, strict=True):
        assert_within_policy(name, a, e, o, terms=t)


def test_nan_stays_in_its_channel(device: str) -> None:
    """relu(NaN) is NaN, and a NaN in one channel reaches no other channel's statistics or gradient."""
    s = make_site(Case(c=5, k=4), torch.float32, device)
    s.x[0, 2, 3, 3] = float("nan")
    mean, var = triton_ops.bn_stats(s.x)
    others = [0, 1, 3, 4]
    assert mean[2].isnan()
    assert var[2].isnan()
    assert mean[others].isfinite().all()
    assert var[others].isfinite().all()
    g, sum_g, sum_gx = triton_ops.conv_dgrad(
        s.dy, s.weight, s.x, s.scale, s.shift, s.mean, None, *s.constants
    )
    expected = reference.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, None, *s.constants)
    assert torch.equal(g[0, 2, 3, 3] != 0, expected[0][0, 2, 3, 3] != 0), "the gradient passes where z is NaN"
    assert sum_g.isfinite().all()
    assert sum_gx[2].isnan()
    assert sum_gx[others].isfinite().all()
    pooled = triton_ops.bn_relu_avg_pool(s.x, s.scale, s.shift)
    assert pooled[0, 2].isnan()
    assert int(pooled.isnan().sum()) == 1
    # And one in y: residual channel 1 only.
    s = make_site(Case(c=5, k=4), torch.float32, device)
    s.residual[1, 1, 0, 0] = float("nan")
    args = (s.bias, s.residual, *s.constants, True)
    _, mean, var = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, *args)
    assert mean.isnan().tolist() == [False, True, False, False]
    assert var.isnan().tolist() == [False, True, False, False]


def test_nan_activation(device: str) -> None:
    s = make_site(Case(c=3, k=2, kernel=(1, 1), padding=(0, 0)), torch.float32, device)
    s.x[0, 1, 2, 3] = float("nan")
    y, _, _ = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, None, None, *s.constants, False)
    expected, _, _ = reference.conv_fprop(s.x, s.scale, s.shift, s.weight, None, None, *s.constants, False)
    assert torch.equal(y.isnan(), expected.isnan())
    assert int(y.isnan().sum()) == 2


def _expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1, :, :1, :1].expand(t.shape)


def _sliced(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t + 1, t, t - 1], dim=1)[:, t.shape[1] : 2 * t.shape[1]]


def _permuted(t: torch.Tensor) -> torch.Tensor:
    return t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


LAYOUTS = [
    pytest.param(lambda t: t.contiguous(), id="nchw"),
    pytest.param(_expanded, id="expanded"),
    pytest.param(_sliced, id="sliced"),
    pytest.param(_permuted, id="permuted"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device: str, layout) -> None:
    """Inputs and gradients with strides that gradcheck and opcheck never send: same bits as their dense copies."""
    s = make_site(Case(), torch.float32, device)
    for name in ("x", "dy", "da", "residual"):
        setattr(s, name, layout(getattr(s, name)))
        assert not getattr(s, name).is_contiguous(memory_format=torch.channels_last)
    s.weight = _permuted(s.weight)
    dense = copy.copy(s)
    for name in ("x", "dy", "da", "residual", "weight"):
        setattr(dense, name, getattr(s, name).clone(memory_format=torch.channels_last))

    def everything(s):
        g, *sums = triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *s.constants)
        return {
            "stats": torch.stack(triton_ops.bn_stats(s.x)),
            "y": triton_ops.conv_fprop(
                s.x, s.scale, s.shift, s.weight, s.bias, s.residual, *s.constants, True
            )[0],
            "g": g,
            "sums": torch.stack(sums),
            "dweight": triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants),
            "dx": triton_ops.bn_backward_apply(
                s.da, s.x, s.mean, s.scale, s.rstd, sums[0], sums[1], True, s.da
            ),
            "pool": triton_ops.bn_relu_avg_pool(s.x, s.scale, s.shift),
        }

    before = {name: getattr(s, name).clone() for name in ("x", "dy", "da", "residual", "weight")}
    actual, expected = everything(s), everything(dense)
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name
    assert actual["dweight"].stride() == s.weight.stride(), "dweight has the weight's strides"
    assert actual["y"].is_contiguous(), "y has the memory format of x, which is not channels_last"
    for name, value in before.items():
        assert torch.equal(getattr(s, name), value), f"{name} was written to"


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_dweight_strides(device: str, memory_format: torch.memory_format, kernel: int) -> None:
    """DDP's buckets compare strides, and those of a 1x1 weight are ambiguous."""
    s = make_site(Case(kernel=(kernel, kernel), padding=(0, 0)), torch.float32, device)
    weight = s.weight.clone().contiguous(memory_format=memory_format)
    dweight = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, weight, *s.constants)
    assert dweight.stride() == weight.stride()


def test_two_runs_same_bits(device: str) -> None:
    s = make_site(Case(n=3, h=13, w=17), torch.float32, device)

    def run():
        y = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, s.bias, s.residual, *s.constants, True)
        g = triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *s.constants)
        return *y, *g, triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_results_do_not_share_memory(device: str) -> None:
    """The dispatcher's contract: an op's results alias neither its arguments nor each other."""
    s = make_site(Case(), torch.float32, device)
    results = [
        *triton_ops.bn_stats(s.x),
        *triton_ops.bn_scale_shift(s.mean, s.rstd, None, None, 1e-5),
        *triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, None, *s.constants),
    ]
    storages = [t.untyped_storage().data_ptr() for t in (*results, s.x, s.dy, s.mean, s.rstd)]
    assert len(set(storages)) == len(storages)


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


@pytest.mark.parametrize("weight_grad", [True, False])
def test_sums_of_a_site(device: str, weight_grad: bool) -> None:
    """Vectors of more tiles than one program adds up, and a weight gradient, in one launch."""
    from fused_preact.kernels.triton.finalize import sum_site

    partials, weights = torch.randn(2500, 2 * 19), torch.randn(3, 700)
    rstd, dweight = torch.rand(19), torch.full((700,), float("nan")).to(device)
    parts = (weights.to(device), dweight) if weight_grad else (None, None)
    sum_g, sum_gx, dgamma = sum_site(partials.to(device), rstd.to(device), *parts)
    wanted = partials.double().sum(0)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(sum_g.double().cpu(), wanted[:19], **close)
    torch.testing.assert_close(sum_gx.double().cpu(), wanted[19:], **close)
    assert torch.equal(dgamma.cpu(), rstd * sum_gx.cpu())
    if weight_grad:
        torch.testing.assert_close(dweight.double().cpu(), weights.double().sum(0), **close)


def test_launches_of_a_unit(device: str) -> None:
    """What a GPU is asked to start for a bottleneck in a row of them; each costs the host some five microseconds."""
    from fused_preact.kernels.triton.common import Device, recording

    with torch.device("meta"):
        row = fused_preact.PreActSequential(*(fused_preact.PreActBottleneck(64, 64) for _ in range(2)))
        row.bfloat16()
        x = torch.empty(128, 64, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with fused_preact.backend("triton"), recording(Device("cuda", 90, 132)) as launches:
        y = row(x.requires_grad_())
        forward = [launch.kernel.__name__ for launch in launches]
        y.sum().backward()
    backward = [launch.kernel.__name__ for launch in launches[len(forward) :]]
    # The first unit computes the statistics of x: a pass and a merge. The last one hands none on: no merge.
    assert len(forward) == 2 + 2 * (1 + 3 * 2 + 1) - 1, forward
    # conv and weight gradient and their sums, a pending BN once for both or on load, the unit's own BN.
    assert len(backward) - backward.count("_bn_backward_apply_kernel") == 2 * 3 * 3
    assert 2 <= backward.count("_bn_backward_apply_kernel") <= 2 * 3
