"""What holds of all Triton kernels: NaN, large means, any strides, same bits, no shared memory, few launches."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DEVICES, Case, assert_within_policy, make_site, triton_ops

import fused_preact
from fused_preact import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned", "exact_float32"),
    pytest.mark.parametrize("device", DEVICES),
]


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
