"""The Triton kernels around the convolutions against the float64 oracle: statistics, head, sums, BN backward."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICES, DTYPES, Case, assert_within_policy, make_site, triton_ops

from fused_preact import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned", "exact_float32"),
    pytest.mark.parametrize("device", DEVICES),
]


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
@pytest.mark.parametrize(
    # In the last one each program walks over several blocks of rows.
    "shape",
    [(2, 17, 7, 9), (1, 1, 5, 3), (5, 65, 4, 4), (2, 3, 1, 1), (1, 100, 70, 3), (4, 100, 50, 51)],
)
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
