"""The compiled joint backward of a site against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from test_cpu_ops import SHAPES, Case, _poisoned, check, dtypes, kernels, pytestmark, shapes, threads, widen

from fused_preact import reference

__all__ = ["_poisoned", "pytestmark", "threads"]  # fixtures and the mark that serve here too

NAMES = ("g", "sum_g", "sum_gx", "dweight", "dgamma")
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


def check_backward(case, **options):
    """The results against the oracle, and the sums against those of the g that was stored."""
    args = arguments(case, **options)
    centred = case.x.double() - case.mean.double().view(1, -1, 1, 1)
    exact = reference.conv_backward(*widen(args))[0].abs()
    if options.get("apply"):
        exact = reference.conv_backward(*widen(arguments(case, **{**options, "apply": False})))[0].abs()
    unit = torch.finfo(case.x.dtype).eps / torch.finfo(torch.float32).eps  # g was stored in that dtype
    terms = {
        "sum_g": unit * exact.sum((0, 2, 3)),
        "sum_gx": unit * (exact * centred.abs()).sum((0, 2, 3)),
    }
    terms["dgamma"] = case.rstd * terms["sum_gx"]
    got = check("conv_backward", ("dx" if options.get("apply") else "g", *NAMES[1:]), args, terms)
    if options.get("apply"):
        return got
    wide = got[0].double()
    for name, actual, values in zip(NAMES[1:3], got[1:3], (wide, wide * centred), strict=True):
        error = (actual.double() - values.sum((0, 2, 3))).abs()
        allowed = 4 * torch.finfo(torch.float32).eps * values.abs().sum((0, 2, 3))
        assert (error <= allowed).all(), f"{name} is not that of the stored g"
    return got


@dtypes
@shapes
def test_conv_backward(shape, dtype):
    check_backward(Case(shape, dtype))


@pytest.mark.parametrize("name", SOME)
def test_every_part_is_optional(name):
    case = Case(SHAPES[name], torch.float32)
    for pending in (None, "running"):
        check_backward(case, pending=pending)
    for da in (False, True):
        for weight_grad in (False, True):
            check_backward(case, da=da, weight_grad=weight_grad)
    for training in (False, True):
        for residual in (False, True):
            check_backward(case, da=True, residual=residual, training=training, apply=True)


def test_gradients_of_any_strides():
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float32)
    variants = {
        "expanded": torch.randn(1, 1, 1, 1).expand(case.dy.shape),
        "rows expanded": torch.randn(2, 10, 1, 1).expand(case.dy.shape),
        "sliced": torch.randn(4, 12, 9, 16)[::2, 2:, :, ::2],
        "contiguous": torch.randn(case.dy.shape),
    }
    for dy in variants.values():
        case.dy = dy
        for pending in (None, "batch"):
            check_backward(case, pending=pending)
    case.x = torch.randn(2, 6, 9, 8)
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)
    got = check_backward(case, apply=True, residual=True)
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
        case = Case(SHAPES[name], torch.float32)
        args = arguments(case, apply=True)
        check_backward(case, apply=True)
        for a, b in zip(kernels.conv_backward(*args), kernels.conv_backward(*args), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(8, 300, 12, 12, 256, 3, 1, 1, 1), (2, 512, 12, 12, 700, 1, 1, 0, 1)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_beyond_the_cache(shape, count, threads):
    """Blocks of columns: their sums and gradients come from different tasks."""
    threads(count)
    check_backward(Case(shape, torch.float32))


def test_weights_too_large_for_one_pass():
    case = Case((1, 1024, 3, 3, 1030, 1, 1, 0, 1), torch.float32)
    check_backward(case, apply=True)


def test_a_large_block_is_used_again():
    """Above 32 MiB, memory that was freed comes back; a tensor that is alive keeps its own."""
    x = torch.randn(1, 64, 400, 400).contiguous(memory_format=torch.channels_last)
    vectors = [torch.rand(64) for _ in range(5)]
    first = kernels.bn_backward_apply(x, x, *vectors, True, None)
    second = kernels.bn_backward_apply(x, x, *vectors, True, None)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    freed = second.data_ptr()
    del second
    third = kernels.bn_backward_apply(x, x, *vectors, True, None)
    assert third.data_ptr() == freed
    assert torch.equal(first, third)
    third.resize_((2, 64, 400, 400), memory_format=torch.channels_last)
    assert torch.equal(third[:1], first)
