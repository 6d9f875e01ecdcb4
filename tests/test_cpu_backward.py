"""The compiled joint backward of a site against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from test_cpu_ops import (
    SHAPES,
    Case,
    check,
    compare,
    dtypes,
    kernels,
    pytestmark,
    shapes,
    threads,
    widen,
)

from fused_preact import reference

__all__ = ["pytestmark", "threads"]

NAMES = ("g", "sum_g", "sum_gx", "dweight")
SOME = ("1x1-stride2", "1x1-one-row-tail", "3x3-small", "3x3-band-odd", "3x3-stride2-even", "3x3-chunks")


def arguments(
    case, *, pending="batch", da=False, residual=False, training=True, apply=False, weight_grad=True
):
    """Arguments of the operation; ``pending``: None, "batch" or "running"."""
    behind = []
    if pending is not None:
        y = case.residual
        mean, var = y.float().mean((0, 2, 3)), y.float().var((0, 2, 3), correction=0)
        rstd = (var + 1e-5).rsqrt()
        behind = [y, mean, rstd * torch.linspace(-1, 2, len(rstd)), rstd]
        if pending == "batch":
            behind += [torch.linspace(-3, 4, len(rstd)), torch.linspace(5, -2, len(rstd))]
    return (
        case.dy,
        behind,
        case.weight,
        case.x,
        [case.scale, case.shift, case.mean, case.rstd],
        case.da if da else None,
        case.da.flip(0) if residual else None,
        *case.conv,
        training,
        apply,
        weight_grad,
    )


@dtypes
@shapes
def test_conv_backward(shape, dtype):
    case = Case(shape, dtype)
    args = arguments(case)
    if dtype == torch.float32:
        check("conv_backward", NAMES, args, ulps=16)
        return
    # In 16 bits the error of a sum is that of the stored g: by chance it may vanish in one of the two.
    g, sum_g, sum_gx, dweight = kernels.conv_backward(*args)
    same, exact = reference.conv_backward(*args), reference.conv_backward(*widen(args))
    compare("g", g, same[0], exact[0])
    compare("dweight", dweight, same[3], exact[3])
    distance = case.x.double() - case.mean.double().view(1, -1, 1, 1)
    for name, got, terms in (("sum_g", sum_g, g.double()), ("sum_gx", sum_gx, g.double() * distance)):
        error, scale = (got - terms.sum((0, 2, 3))).abs(), terms.abs().sum((0, 2, 3))
        assert (error <= 4 * torch.finfo(torch.float32).eps * scale).all(), name


@pytest.mark.parametrize("name", SOME)
def test_every_part_is_optional(name):
    case = Case(SHAPES[name], torch.float32)
    for pending in (None, "running"):
        check("conv_backward", NAMES, arguments(case, pending=pending), ulps=16)
    for da in (False, True):
        for weight_grad in (False, True):
            check("conv_backward", NAMES, arguments(case, da=da, weight_grad=weight_grad), ulps=16)
    for training in (False, True):
        for residual in (False, True):
            args = arguments(case, da=True, residual=residual, training=training, apply=True)
            check("conv_backward", ("dx", *NAMES[1:]), args, ulps=16)


def test_gradients_of_any_strides():
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float32)
    variants = {
        "expanded": torch.randn(1, 1, 1, 1).expand(case.dy.shape),
        "rows expanded": torch.randn(2, 10, 1, 1).expand(case.dy.shape),
        "sliced": torch.randn(4, 12, 9, 16)[::2, 2:, :, ::2],
        "contiguous": torch.randn(case.dy.shape),
    }
    for name, dy in variants.items():
        case.dy = dy
        for pending in (None, "batch"):
            check("conv_backward", (f"g {name}", *NAMES[1:]), arguments(case, pending=pending), ulps=16)
    case.x = torch.randn(2, 6, 9, 8)
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)
    got = check("conv_backward", NAMES, arguments(case, apply=True, residual=True), ulps=16)
    assert got[3].stride() == case.weight.stride()


def test_inputs_are_not_written():
    case = Case((2, 16, 9, 8, 16, 3, 1, 1, 1), torch.float32)
    args = arguments(case, da=True, residual=True, apply=True)
    flat = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in flat]
    kernels.conv_backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(flat, before, strict=True))


def test_relu_mask_keeps_nan():
    case = Case((2, 20, 15, 15, 4, 3, 1, 1, 1), torch.float32)
    case.dy[0, 2, 4, 4] = float("nan")
    case.x[1, 5, 3, 3] = float("nan")
    args = arguments(case, pending=None)
    got, same = (
        kernels.conv_backward(*args),
        torch.ops.fused_preact.conv_dgrad(
            case.dy, case.weight, case.x, case.scale, case.shift, case.mean, None, *case.conv
        ),
    )
    assert torch.equal(got[0].isnan(), same[0].isnan())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits_twice(count, threads):
    threads(count)
    for name in ("1x1-expand", "1x1-wide", "3x3-band-odd", "3x3-stride2", "3x3-chunks"):
        args = arguments(Case(SHAPES[name], torch.float32), apply=True)
        check("conv_backward", ("dx", *NAMES[1:]), args, ulps=16)
        for a, b in zip(kernels.conv_backward(*args), kernels.conv_backward(*args), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(1, 300, 12, 12, 256, 3, 1, 1, 1), (2, 512, 12, 12, 700, 1, 1, 0, 1)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_beyond_the_cache(shape, count, threads):
    """Blocks of columns: their sums, statistics and gradients come from different tasks."""
    threads(count)
    case = Case(shape, torch.float32)
    check("conv_backward", NAMES, arguments(case), ulps=16)
    check("conv_fprop", ("y", "mean", "var"), case.fprop())
    check("conv_dgrad", ("g", "sum_g", "sum_gx"), case.dgrad(), ulps=16)
