"""The compiled CPU kernels against the reference in float64.

The bar (design): the error of a kernel is at most twice that of the reference in the same dtype, plus a few ulp.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within_policy
from torch import Tensor

import fused_preact
from fused_preact import ops, reference

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is part of the checkout, not of the package

from benchmarks.correct import separated, separated_input

pytestmark = pytest.mark.skipif(
    ops._unavailable("cpu", None) is not None, reason=f"no CPU kernels: {ops._unavailable('cpu', None)}"
)

kernels = torch.ops.fused_preact


@pytest.fixture(autouse=True)
def _poisoned():
    """at::empty fills what it allocates with NaN, in C++ too, so that an element never written is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
EPS = 1e-5


def name_of(value):
    return NAMES.get(value)


# n, c, h, w, k, kernel, stride, padding, dilation
SHAPES = {
    "1x1": (2, 64, 8, 8, 16, 1, 1, 0, 1),
    "1x1-expand": (3, 16, 7, 5, 100, 1, 1, 0, 1),
    "1x1-one-row-tail": (1, 17, 1, 193, 65, 1, 1, 0, 1),
    "1x1-stride2": (2, 65, 9, 7, 33, 1, 2, 0, 1),
    "1x1-wide": (1, 1100, 5, 3, 70, 1, 1, 0, 1),
    "3x3-one-channel": (2, 1, 5, 6, 1, 3, 1, 1, 1),
    "3x3-three-channels": (1, 3, 11, 7, 17, 3, 1, 1, 1),
    "3x3-small": (3, 64, 7, 7, 64, 3, 1, 1, 1),
    "3x3-band": (2, 16, 32, 32, 16, 3, 1, 1, 1),
    "3x3-band-odd": (2, 17, 33, 19, 65, 3, 1, 1, 1),
    "3x3-band-wide-padding": (1, 20, 6, 15, 18, 3, 1, 2, 1),
    "3x3-valid": (2, 9, 17, 18, 10, 3, 1, 0, 1),
    "3x3-stride2": (2, 32, 15, 15, 40, 3, 2, 1, 1),
    "3x3-stride2-even": (2, 24, 14, 16, 24, 3, 2, 1, 1),
    "3x3-stride3": (1, 5, 10, 11, 6, 3, 3, 0, 1),
    "3x3-dilation2": (2, 17, 16, 15, 9, 3, 1, 2, 2),
    "3x3-stride2-dilation2": (1, 8, 13, 17, 9, 3, 2, 2, 2),
    "3x3-chunks": (1, 400, 7, 7, 130, 3, 1, 2, 2),
    "3x3-library": (2, 256, 5, 6, 230, 3, 1, 1, 1),
    "1x3": (2, 10, 8, 15, 12, (1, 3), (1, 2), (0, 1), 1),
    "5x5": (1, 12, 16, 17, 20, 5, 1, 2, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def pair(value):
    return list(value) if isinstance(value, tuple) else [value, value]


class Case:
    """Inputs of one site: fresh, with beta > 0 at the borders and gamma of both signs and zero."""

    def __init__(self, shape, dtype, mean=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(size, generator=generator)

        n, c, h, w, k, kernel, stride, padding, dilation = shape
        self.conv = (pair(stride), pair(padding), pair(dilation), 1)
        self.x = (randn(n, c, h, w) * (1 + torch.arange(c).view(1, -1, 1, 1) % 3) + mean).to(dtype)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.weight = (randn(k, c, *pair(kernel)) / (c * pair(kernel)[0]) ** 0.5).to(dtype)
        gamma, beta = randn(c), randn(c) + 0.7
        gamma[c // 2] = 0 if c > 1 else -1
        self.mean, self.var = reference.bn_stats(self.x)
        self.scale, self.shift, self.rstd = reference.bn_scale_shift(self.mean, self.var, gamma, beta, EPS)
        self.bias = randn(k).to(dtype)
        size = reference.conv_output_size((h, w), pair(kernel), *self.conv[:3])
        self.dy = randn(n, k, *size).to(dtype).contiguous(memory_format=torch.channels_last)
        self.residual = randn(n, k, *size).to(dtype).contiguous(memory_format=torch.channels_last)
        self.da = randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)

    def fprop(self, bias=True, residual=True, stats=True):
        return (
            self.x,
            self.scale,
            self.shift,
            self.weight,
            self.bias if bias else None,
            self.residual if residual else None,
            *self.conv,
            stats,
        )

    def dgrad(self, masked=True, da=True):
        vectors = (self.scale, self.shift, self.mean) if masked else (None, None, None)
        return (self.dy, self.weight, self.x, *vectors, self.da if da else None, *self.conv)

    def wgrad(self):
        return (self.dy, self.x, self.scale, self.shift, self.weight, *self.conv)


def widen(args):
    return [a.double() if isinstance(a, Tensor) else widen(a) if isinstance(a, list) else a for a in args]


def check(op, names, args, terms=None):
    """Compare ``op`` with the oracle; returns what it gave. ``terms``: of the outputs that cancel, by name."""
    got = getattr(kernels, op)(*args)
    same = getattr(reference, op)(*args)
    oracle = getattr(reference, op)(*widen(args))
    if isinstance(got, Tensor):
        got, same, oracle = (got,), (same,), (oracle,)
    results = dict(zip(names, oracle, strict=True))
    terms = dict(terms or {})
    if results.get("mean") is not None:
        # A mean is as exact as it need be where it is so by the measure of the values' spread.
        terms["mean"] = results["mean"].abs() + results["var"].sqrt()
    for name, a, b in zip(names, got, same, strict=True):
        assert_within_policy(name, a, b, results[name], terms=terms.get(name), compiled=True)
        assert a.dtype == b.dtype, name
        assert memory_formats(a) == memory_formats(b), name
    return got


def check_dgrad(case, masked=True, da=False):
    """conv_dgrad: g against the oracle, the sums against those of the g that was stored."""
    args = case.dgrad(masked, da)
    exact = reference.conv_dgrad(*widen(args))[0].abs()
    centred = (case.x.double() - case.mean.double().view(1, -1, 1, 1)).abs()
    unit = torch.finfo(case.x.dtype).eps / torch.finfo(torch.float32).eps  # g was stored in that dtype
    terms = {"sum_g": unit * exact.sum((0, 2, 3)), "sum_gx": unit * (exact * centred).sum((0, 2, 3))}
    g, *sums = check("conv_dgrad", ("g", "sum_g", "sum_gx"), args, terms if masked else None)
    if not masked:
        return
    wide = g.double(), g.double() * (case.x.double() - case.mean.double().view(1, -1, 1, 1))
    for name, actual, values in zip(("sum_g", "sum_gx"), sums, wide, strict=True):
        error = (actual.double() - values.sum((0, 2, 3))).abs()
        allowed = 4 * torch.finfo(torch.float32).eps * values.abs().sum((0, 2, 3))
        assert (error <= allowed).all(), f"{name} is not that of the stored g"


def memory_formats(x):
    formats = [torch.contiguous_format] + [torch.channels_last] * (x.dim() == 4)
    return [x.is_contiguous(memory_format=f) for f in formats]


# --- the ops --------------------------------------------------------------------------------------------


@dtypes
@shapes
def test_conv_fprop(shape, dtype):
    check("conv_fprop", ("y", "mean", "var"), Case(shape, dtype).fprop())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_conv_fprop_epilogues(bias, residual, stats):
    for name in ("1x1", "3x3-band-odd", "3x3-stride2"):
        args = Case(SHAPES[name], torch.float32).fprop(bias, residual, stats)
        check("conv_fprop", ("y", "mean", "var"), args)


@dtypes
@pytest.mark.parametrize("prologue", [False, True], ids=["folded", "prologue"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_conv_fprop_for_folded_norms(prologue, bias, residual, dtype):
    """Without the prologue x is read as it is; the ReLU comes after the bias and before the residual."""
    for name in ("1x1", "1x1-expand", "1x1-wide", "3x3-band-odd", "3x3-stride2"):
        # Statistics of 16-bit results are those of other rounded values than the oracle's.
        args = Case(SHAPES[name], dtype).fprop(bias, residual, stats=dtype == torch.float32)
        if not prologue:
            args = (args[0], None, None, *args[3:])
        y, _, _ = check("conv_fprop", ("y", "mean", "var"), (*args, True))
        assert residual or bool((y >= 0).all())


@dtypes
@shapes
def test_conv_dgrad(shape, dtype):
    case = Case(shape, dtype)
    check_dgrad(case)


@pytest.mark.parametrize("name", ["1x1-stride2", "3x3-band-odd", "3x3-stride3"])
def test_conv_dgrad_of_two_users(name):
    case = Case(SHAPES[name], torch.float32)
    check_dgrad(case, da=True)
    check_dgrad(case, masked=False)


@dtypes
@shapes
def test_conv_wgrad(shape, dtype):
    check("conv_wgrad", ("dweight",), Case(shape, dtype).wgrad())


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_take_the_split_path(groups):
    case = Case((2, 8, 9, 9, 8, 3, 1, 1, 1), torch.float32)
    case.weight = case.weight[:, : 8 // groups].contiguous()
    case.conv = (*case.conv[:3], groups)
    check("conv_fprop", ("y", "mean", "var"), case.fprop())
    check_dgrad(case, da=True)
    check("conv_wgrad", ("dweight",), case.wgrad())


@dtypes
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 5), (3, 17, 7, 9), (2, 65, 1, 1), (5, 100, 13, 11), (1, 3, 70, 67)]
)
def test_pointwise_ops(shape, dtype):
    case = Case((*shape, 4, 1, 1, 0, 1), dtype)
    check("bn_stats", ("mean", "var"), (case.x,))
    gamma, beta = torch.randn(shape[1]), torch.randn(shape[1])
    check("bn_scale_shift", ("scale", "shift", "rstd"), (case.mean, case.var, gamma, beta, EPS))
    check("bn_scale_shift", ("scale", "shift", "rstd"), (case.mean, case.var, None, None, EPS))
    sums = torch.randn(shape[1]), torch.randn(shape[1])
    vectors = (case.mean, case.scale, case.rstd, *sums)
    for training in (True, False):
        for residual in (None, case.x.flip(0).contiguous(memory_format=torch.channels_last)):
            check("bn_backward_apply", ("dx",), (case.da, case.x, *vectors, training, residual))
    dy = torch.randn(shape[:2]).to(dtype)
    affine = (case.scale, case.shift)
    check("bn_relu_avg_pool", ("pooled",), (case.x, *affine))
    share, centred = dy.double().abs(), case.x.double() - case.mean.double().view(1, -1, 1, 1)
    terms = {"sum_g": share.sum(0), "sum_gx": (share * centred.abs().mean((2, 3))).sum(0)}
    check("bn_relu_avg_pool_reduce", ("sum_g", "sum_gx"), (dy, case.x, *affine, case.mean), terms)
    for training in (True, False):
        args = (dy, case.x, *affine, case.mean, case.rstd, *sums, training)
        check("bn_relu_avg_pool_apply", ("dx",), args)


# --- statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e2, 1e4, -1e4])
def test_statistics_far_from_zero(offset):
    x = (torch.randn(8, 20, 31, 33) + offset).contiguous(memory_format=torch.channels_last)
    check("bn_stats", ("mean", "var"), (x,))
    case = Case((4, 20, 17, 17, 24, 1, 1, 0, 1), torch.float32)
    case.residual = case.residual + offset
    check("conv_fprop", ("y", "mean", "var"), case.fprop())


def test_statistics_of_a_constant_channel():
    x = torch.full((3, 4, 9, 9), 7.25).contiguous(memory_format=torch.channels_last)
    mean, var = kernels.bn_stats(x)
    assert (mean == 7.25).all()
    assert (var == 0).all()


@pytest.mark.parametrize("offset", [1e4])
def test_input_far_from_zero(offset):
    case = Case((4, 17, 9, 9, 12, 3, 1, 1, 1), torch.float32, mean=offset)
    check("conv_fprop", ("y", "mean", "var"), case.fprop())
    check("conv_wgrad", ("dweight",), case.wgrad())
    check_dgrad(case, da=True)


@dtypes
def test_statistics_are_those_of_the_stored_value(dtype):
    for name in ("1x1-expand", "3x3-band-odd"):
        y, mean, var = kernels.conv_fprop(*Case(SHAPES[name], dtype).fprop())
        exact_mean, exact_var = reference.bn_stats(y.double())
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-6)


# --- NaN ------------------------------------------------------------------------------------------------


@dtypes
def test_nan_stays_in_its_channel(dtype):
    x = Case((2, 20, 9, 9, 4, 1, 1, 0, 1), dtype).x
    x[1, 5, 3, 3] = float("nan")
    for tensor in kernels.bn_stats(x):
        assert tensor.isnan().nonzero().flatten().tolist() == [5]


@dtypes
def test_relu_keeps_nan(dtype):
    case = Case((2, 20, 15, 15, 4, 3, 1, 1, 1), dtype)
    case.x[1, 5, 3, 3] = float("nan")
    for op, args in (("conv_fprop", case.fprop()), ("conv_wgrad", case.wgrad())):
        got, expected = getattr(kernels, op)(*args), getattr(reference, op)(*args)
        first, same = (got[0], expected[0]) if isinstance(got, tuple) else (got, expected)
        assert first.isnan().any()
        assert torch.equal(first.isnan(), same.isnan())
    case = Case((2, 20, 15, 15, 4, 3, 1, 1, 1), dtype)
    case.dy[0, 2, 4, 4] = float("nan")
    case.x[1, 5, 3, 3] = float("nan")
    g, same = kernels.conv_dgrad(*case.dgrad())[0], reference.conv_dgrad(*case.dgrad())[0]
    assert torch.equal(g.isnan(), same.isnan())
    pooled = kernels.bn_relu_avg_pool(case.x, case.scale, case.shift)
    assert pooled.isnan().nonzero().tolist() == [[1, 5]]


# --- strides, formats, emptiness ------------------------------------------------------------------------


def test_gradients_of_any_strides():
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float32)
    shape = case.dy.shape
    variants = {
        "expanded": torch.randn(1, 1, 1, 1).expand(shape),
        "rows expanded": torch.randn(2, 10, 1, 1).expand(shape),
        "sliced": torch.randn(4, 12, 9, 16)[::2, 2:, :, ::2],
        "permuted": torch.randn(8, 9, 10, 2).permute(3, 2, 1, 0),
        "contiguous": torch.randn(shape),
    }
    for name, dy in variants.items():
        assert dy.shape == shape, name
        case.dy = dy
        check_dgrad(case, da=True)
        check("conv_wgrad", (f"dweight {name}",), case.wgrad())
        case.residual = dy
        check("conv_fprop", (f"y {name}", "mean", "var"), case.fprop())
        check(
            "bn_backward_apply",
            (f"dx {name}",),
            (dy, dy.clone(), *[torch.rand(10) for _ in range(5)], True, dy),
        )


def test_inputs_of_any_strides():
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float32)
    for x in (torch.randn(2, 6, 9, 8), torch.randn(4, 8, 9, 10)[::2, 1:7, :, ::1][..., :8]):
        case.x = x
        check("conv_fprop", ("y", "mean", "var"), case.fprop())
        check_dgrad(case, da=True)
        check("conv_wgrad", ("dweight",), case.wgrad())
        check("bn_stats", ("mean", "var"), (x,))
        check("bn_relu_avg_pool", ("pooled",), (x, case.scale, case.shift))


def test_weight_gradient_has_the_strides_of_the_weight():
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float32)
    for weight in (case.weight.contiguous(memory_format=torch.channels_last), case.weight.contiguous()):
        case.weight = weight
        assert kernels.conv_wgrad(*case.wgrad()).stride() == weight.stride()
        check("conv_wgrad", ("dweight",), case.wgrad())
        check("conv_fprop", ("y", "mean", "var"), case.fprop())


def test_inputs_are_not_written():
    case = Case((2, 16, 9, 8, 16, 3, 1, 1, 1), torch.float32)
    for op in ("fprop", "dgrad", "wgrad"):
        args = getattr(case, op)()
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        getattr(kernels, f"conv_{op}")(*args)
        for a, b in zip(args, before, strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, b)


def test_empty_batch_and_float64_go_to_the_reference():
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float32)
    case.x, case.dy, case.residual, case.da = (t[:0] for t in (case.x, case.dy, case.residual, case.da))
    for op, args in (("conv_fprop", case.fprop()), ("conv_dgrad", case.dgrad())):
        for got, expected in zip(getattr(kernels, op)(*args), getattr(reference, op)(*args), strict=True):
            torch.testing.assert_close(got, expected)
    assert (kernels.conv_wgrad(*case.wgrad()) == 0).all()
    case = Case((2, 6, 9, 8, 10, 3, 1, 1, 1), torch.float64)
    got, expected = kernels.conv_fprop(*case.fprop()), reference.conv_fprop(*case.fprop())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- threads, repeatability, processes ------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits_twice(count, threads):
    threads(count)
    for name in ("1x1-expand", "3x3-band-odd", "3x3-stride2", "3x3-chunks"):
        case = Case(SHAPES[name], torch.float32)
        check("conv_fprop", ("y", "mean", "var"), case.fprop())
        check("conv_wgrad", ("dweight",), case.wgrad())
        for op in ("fprop", "dgrad", "wgrad"):
            one, two = (getattr(kernels, f"conv_{op}")(*getattr(case, op)()) for _ in range(2))
            for a, b in zip(one, two, strict=True):
                assert torch.equal(a, b), f"{name} {op}"


_FORKED = """
import os, torch, fused_preact
torch.manual_seed(0)
x = torch.randn(2, 16, 9, 9)
unit = fused_preact.PreActBottleneck(16, 16)
if os.environ["WARM"] == "1":
    torch.set_num_threads(1)
    unit(x)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    unit(x).sum().backward()
    os._exit(0 if all(p.grad.isfinite().all() for p in unit.parameters()) else 1)
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("warm", ["0", "1"], ids=["cold", "warm"])
def test_forked_process(warm):
    subprocess.run([sys.executable, "-c", _FORKED], check=True, timeout=60, env={**os.environ, "WARM": warm})


# --- a whole unit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_unit_against_its_children(dtype, stride, training):
    """No pre-activation near zero: a ReLU that rounding switches is an error of the gradient's size, in eager too."""
    torch.manual_seed(0)
    plain = fused_preact.PreActBottleneck(32, 32 * stride, stride, fused=False)
    separated(plain)
    for bn in (plain.bn1, plain.bn2, plain.bn3):
        bn.running_var.uniform_(0.5, 2)
    plain = plain.to(dtype).to(torch.float64).train(training)
    x = separated_input((2, 32, 14, 14), torch.device("cpu")).to(dtype).double()
    dy = torch.randn(2, 32 * stride, 14 // stride, 14 // stride).to(dtype).double()
    results = {}
    for kind, wide in (("exact", torch.float64), ("same", dtype), ("fused", dtype)):
        unit = copy.deepcopy(plain).to(wide).to(memory_format=torch.channels_last)
        unit.fused = kind == "fused"
        leaf = x.to(wide).clone(memory_format=torch.channels_last).requires_grad_()
        if kind == "fused":
            assert fused_preact.serving_backend(leaf) == "cpu"
        y = unit(leaf)
        y.backward(dy.to(wide))
        results[kind] = {
            "y": y.detach(),
            "dx": leaf.grad,
            **{f"d{n}": p.grad for n, p in unit.named_parameters()},
            **{n: b for n, b in unit.named_buffers() if b.is_floating_point()},
        }
    for name, exact in results["exact"].items():
        assert_within_policy(
            name, results["fused"][name], results["same"][name], exact, ulps=8, compiled=True
        )


def test_backend_choice():
    x = torch.randn(1, 8, 4, 4)
    unit = fused_preact.PreActBottleneck(8, 8).eval()
    with fused_preact.backend("reference"):
        expected = unit(x)
    with fused_preact.backend("cpu"):
        assert fused_preact.serving_backend(x) == "cpu"
        got = unit(x)
    torch.testing.assert_close(got, expected)
    assert fused_preact.serving_backend(x.double()) == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 118, 66, 1000, 1, 2, 0, 1),  # tiles of 65 pixels whose last run has 32
        (1, 20, 7, 7, 40, 1, 1, 0, 1),
        (1, 20, 7, 7, 40, 3, 1, 1, 1),
        (1, 1040, 7, 7, 1024, 1, 1, 0, 1),  # dgrad and wgrad apart
    ],
    ids=["odd-tiles", "1x1", "3x3", "apart"],
)
def test_what_the_scratch_holds_does_not_matter(shape, dtype):
    """16-bit products take rows in pairs: the other half of an odd last one is zero, whatever ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that it is this thread's scratch
    try:
        nan = torch.full((1, 64, 72, 72), float("nan"), dtype=torch.bfloat16)
        nan = nan.contiguous(memory_format=torch.channels_last)
        weight = torch.full((64, 64, 3, 3), float("nan"), dtype=torch.bfloat16)
        case = Case(shape, dtype)
        kernels.conv_fprop(nan, None, None, weight, None, None, [1, 1], [1, 1], [1, 1], 1, False)
        vectors = [case.scale, case.shift, case.mean, case.rstd]
        dw = kernels.conv_backward(
            case.dy, [], case.weight, case.x, vectors, None, None, *case.conv, True, False, True
        )[3]
        kernels.conv_fprop(nan, None, None, weight, None, None, [1, 1], [1, 1], [1, 1], 1, False)
        apart = kernels.conv_wgrad(case.dy, case.x, case.scale, case.shift, case.weight, *case.conv)
    finally:
        torch.set_num_threads(threads)
    for name, tensor in (("dweight", dw), ("dweight of conv_wgrad", apart)):
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(tensor, apart, rtol=2e-2, atol=2e-1)
