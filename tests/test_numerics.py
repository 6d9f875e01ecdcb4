"""Where the numbers are awkward: constant channels, outliers, infinities, outputs that read only padding.

Of the operations of every backend, the compiled ones foremost; the ordinary numbers are in the kernels' own files.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers import BACKENDS, COMPILED, FORMATS
from torch import Tensor, nn

import fused_preact
from fused_preact import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

FLOATS = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ONE_BY_ONE = ([1, 1], [0, 0], [1, 1], 1)

# Of every size, and none whose small multiples a float holds exactly.
CONSTANTS = torch.tensor([0.0, 1 / 3, -7.7e-3, 0.1, -1.1, 33.3333, 1234.5678, -3.3e4, 1.2345e6, 9.87654e6])


def image(x: Tensor, device: str = "cpu") -> Tensor:
    return x.to(device).contiguous(memory_format=torch.channels_last)


# --- statistics -------------------------------------------------------------------------------------------


@BACKENDS
@FLOATS
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 3), (2, 9, 11), (3, 41, 37)], ids=str)
def test_statistics_of_constant_channels(backend, device, dtype, size):
    """Exactly the value and 0, by whoever makes them: in one tile or many, full or not."""
    n, h, w = size
    k = ops.table(backend, torch.empty(0, device=device))
    values = CONSTANTS[CONSTANTS.abs() < (6e4 if dtype == torch.float16 else 1e9)]
    channels = len(values)
    x = image(values.to(dtype).view(1, -1, 1, 1).expand(n, channels, h, w), device)
    mean, var = k.bn_stats(x)
    assert torch.equal(mean, x[0, :, 0, 0].float()), "mean"
    assert (var == 0).all(), "var"

    if backend == "reference" and dtype == torch.float32:
        return  # its convolution may round a bias and a residual differently from pixel to pixel
    zeros = torch.zeros(n, 4, h, w, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    vectors = torch.ones(4, device=device), torch.zeros(4, device=device)
    weight = torch.zeros(channels, 4, 1, 1, dtype=dtype, device=device)
    for residual in (None, x):
        bias = x[0, :, 0, 0] if residual is None else None
        y, mean, var = k.conv_fprop(zeros, *vectors, weight, bias, residual, *ONE_BY_ONE, True)
        assert torch.equal(y, x), "y"
        assert torch.equal(mean, y[0, :, 0, 0].float()), "mean of y"
        assert (var == 0).all(), "var of y"


@COMPILED
@HALVES
def test_statistics_of_a_constant_that_rounding_made(dtype):
    """The statistics are those of the stored output, which is constant where the sums behind it are not."""
    x = image(1 + torch.rand(2, 16, 13, 11) * 1e-3).to(torch.float32)
    x = x.to(dtype)
    weight = (torch.eye(16) * 1e-4).view(16, 16, 1, 1).to(dtype)
    bias = torch.full((16,), 100.0).to(dtype)
    vectors = torch.ones(16), torch.zeros(16)
    y, mean, var = torch.ops.fused_preact.conv_fprop(x, *vectors, weight, bias, None, *ONE_BY_ONE, True)
    assert (y == 100).all()
    assert (mean == 100).all()
    assert (var == 0).all()


@BACKENDS
@pytest.mark.parametrize("far", [1e2, -1e4])
@pytest.mark.parametrize("where", ["first", "scattered"])
@pytest.mark.parametrize("shape", [(1, 1, 90, 91), (2, 17, 40, 40)], ids=str)
def test_outliers_hide_no_variance(backend, device, far, where, shape):
    k = ops.table(backend, torch.empty(0, device=device))
    x = torch.randn(shape)
    rows = x.permute(0, 2, 3, 1).reshape(-1, shape[1])
    chosen = slice(0, 8) if where == "first" else slice(5, None, 1000)
    rows[chosen] += far
    x = image(rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2), device)

    def check(name, tensor, mean, var):
        exact_mean, exact_var = reference.bn_stats(tensor.double())
        assert ((var.double() - exact_var).abs() <= 1e-5 * exact_var).all(), f"var of {name}"
        allowed = 2e-6 * exact_var.sqrt() + 2.0**-23 * exact_mean.abs()
        assert ((mean.double() - exact_mean).abs() <= allowed).all(), f"mean of {name}"

    check("x", x, *k.bn_stats(x))
    zeros = torch.zeros(shape[0], 2, *shape[2:], device=device).contiguous(memory_format=torch.channels_last)
    vectors = torch.ones(2, device=device), torch.zeros(2, device=device)
    weight = torch.zeros(shape[1], 2, 1, 1, device=device)
    check("y", *k.conv_fprop(zeros, *vectors, weight, None, x, *ONE_BY_ONE, True))


# --- the prologue of a constant channel -------------------------------------------------------------------


@COMPILED
@FORMATS
@FLOATS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_constant_channel_is_normalised_as_plain_pytorch_does(backend, dtype, beta, memory_format):
    """s (x - mu) is 0, s x and s mu are 3e8: a rounding that does not cancel is all that is left of the channel."""
    for value in (1e3, 1.2345e3, 1.2345e4, 6e4, 1e5, 1.2345e5, 1e6):
        if dtype == torch.float16 and value > 65504:
            continue
        x = torch.randn(2, 4, 9, 7).to(dtype)
        x[:, 1] = value
        x = x.contiguous(memory_format=memory_format)
        error = {}
        for fused in (True, False):
            site = fused_preact.PreActConv2d(4, 2, 1, bias=False, fused=fused).to(dtype)
            bn, conv = site.children()
            nn.init.zeros_(conv.weight)
            nn.init.ones_(conv.weight[:, 1])
            nn.init.constant_(bn.bias, beta)
            worst = 0.0
            for gamma in (1.0, -1.0):  # the ReLU hides one sign of the error
                nn.init.constant_(bn.weight, gamma)
                with fused_preact.backend(backend):
                    worst = max(worst, (site(x).double() - beta).abs().max().item())
            error[fused] = worst
        if dtype == torch.float32:
            # PyTorch rounds as we do, but in channels_last its mean of a constant is off now and then.
            scale = value * 1e-5**-0.5
            # Two roundings, of t and of the product, where the instruction set has no fused multiply and add.
            assert error[True] <= max(error[False], 2.0**-23 * scale), (value, error)
        else:
            assert error[True] <= error[False], (value, error)
            assert error[True] == 0 or beta > 0, (value, error)


@COMPILED
@FLOATS
@pytest.mark.parametrize("groups", [1, 2])
def test_forward_and_backward_recompute_one_mask(dtype, groups):
    """Of values around the ReLU's kink, far from zero: no z is positive in one pass and not in the other."""
    k = torch.ops.fused_preact
    channels = 16
    offsets = torch.tensor([0.0, 3.0, 100.0, 1000.0]).repeat(4).view(1, -1, 1, 1)
    x = image((torch.randint(-2, 3, (2, channels, 12, 10)) * 0.5 + offsets).to(dtype))
    mean, var = k.bn_stats(x)
    beta = torch.tensor([0.0, 0.0, 1e-3, -1e-3]).repeat_interleave(4)
    scale, shift, rstd = k.bn_scale_shift(mean, var, torch.rand(channels) + 0.5, beta.to(dtype), 1e-5)
    conv = ([1, 1], [0, 0], [1, 1], groups)
    eye = torch.eye(channels // groups).repeat(groups, 1).view(channels, -1, 1, 1).to(dtype)
    a = k.conv_fprop(x, scale, shift, eye, None, None, *conv, False)[0]
    ones = torch.ones_like(a)
    passed = a > 0
    assert passed.any()
    assert not passed.all()
    g = k.conv_dgrad(ones, eye, x, scale, shift, mean, None, *conv)[0]
    assert torch.equal(g > 0, passed), "conv_dgrad"
    joint = k.conv_backward(
        ones, [], eye, x, [scale, shift, mean, rstd], None, None, *conv, False, False, True
    )
    assert torch.equal(joint[0] > 0, passed), "conv_backward"
    wgrad = k.conv_wgrad(ones, x, scale, shift, eye, *conv)
    in_group = channels // groups
    reaches = passed.any(3).any(2).any(0).view(groups, 1, in_group).expand(groups, in_group, in_group)
    for name, dweight in (("conv_backward", joint[3]), ("conv_wgrad", wgrad)):
        assert torch.equal(dweight.view(groups, in_group, in_group) != 0, reaches), f"dweight of {name}"
    head = torch.ones(2, channels).to(dtype)
    count = k.bn_relu_avg_pool_reduce(head, x, scale, shift, mean)[0] * 120
    torch.testing.assert_close(count, passed.sum((0, 2, 3)).float())
    dx = k.bn_relu_avg_pool_apply(head, x, scale, shift, mean, rstd, mean, mean, False)
    assert torch.equal(dx > 0, passed), "bn_relu_avg_pool_apply"


# --- infinities with running statistics ------------------------------------------------------------------


@BACKENDS
@FLOATS
@pytest.mark.parametrize("channels", [5, 80])
def test_with_running_statistics_dx_reads_no_x(backend, device, dtype, channels):
    """dx = s g, and not s g + 0 (x - mean): x may hold anything."""
    k = ops.table(backend, torch.empty(0, device=device))
    x, g = torch.randn(2, channels, 5, 4), torch.randn(2, channels, 5, 4)
    x[0, 1, 2, 3], x[1, channels - 1, 0, 0], x[1, 3, 4, 3] = float("nan"), float("inf"), -float("inf")
    x, g = image(x.to(dtype), device), image(g.to(dtype), device)
    vectors = torch.randn(3, channels).to(device)
    mean, scale, rstd = vectors
    sums = torch.randn(2, channels).to(device)
    expected = (g.float() * scale.view(1, -1, 1, 1)).to(dtype)
    close = {"rtol": torch.finfo(dtype).eps * 2, "atol": 0}
    dx = k.bn_backward_apply(g, x, mean, scale, rstd, *sums, False, None)
    torch.testing.assert_close(dx, expected, **close)

    dy = torch.randn(2, channels).to(dtype).to(device)
    shift = torch.zeros(channels, device=device)
    dx = k.bn_relu_avg_pool_apply(dy, x, scale, shift, mean, rstd, *sums, False)
    passes = ~(x.float() * scale.view(1, -1, 1, 1) <= 0)
    share = dy.float()[:, :, None, None] / 20 * scale.view(1, -1, 1, 1)
    torch.testing.assert_close(dx, torch.where(passes, share, 0.0).to(dtype), **close)

    # As the BN behind a convolution: what is pending is read on load.
    weight = (torch.randn(channels, 7, 3, 3) / 8).to(dtype).to(device)
    before = image(torch.randn(2, 7, 5, 4).to(dtype), device)
    bn = [torch.rand(7).to(device) + 0.5, torch.rand(7).to(device), *torch.rand(2, 7).to(device)]
    conv = ([1, 1], [1, 1], [1, 1], 1)
    got = k.conv_backward(g, [x, mean, scale, rstd], weight, before, bn, None, None, *conv, False, True, True)
    for name, tensor in zip(("dx", "sum_g", "sum_gx", "dweight", "dgamma"), got, strict=True):
        assert tensor.isfinite().all(), name
    same = k.conv_backward(expected, [], weight, before, bn, None, None, *conv, False, True, True)
    for name, actual, wanted in zip(("dx", "sum_g", "sum_gx", "dweight", "dgamma"), got, same, strict=True):
        size = wanted.float().square().mean().sqrt().item()
        torch.testing.assert_close(
            actual, wanted, rtol=0.02, atol=0.05 * size if dtype != torch.float32 else 1e-5 * size, msg=name
        )


# --- padding and nothing else -----------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_folded_unit_whose_first_rows_read_only_padding(kernel, dilation, threads):
    """Such rows are made before anything was read, and the chain of units runs in place."""
    unit = fused_preact.PreActBasicBlock(16, 16)
    lost = [dilation * (size - 1) for size in kernel]
    unit.conv1 = nn.Conv2d(16, 16, kernel, padding=0, dilation=dilation, bias=False)
    unit.conv2 = nn.Conv2d(16, 16, 1, padding=[n // 2 for n in lost], bias=True)
    nn.init.normal_(unit.conv2.bias)
    unit.eval()
    plain = copy.deepcopy(unit)
    plain.fused = False
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            fused_preact.optimize_for_inference(unit)
            for size in ((2, 16, 30, 150), (1, 16, 13, 12)):
                x = torch.randn(size)
                torch.testing.assert_close(unit(x), plain(x), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


# groups, C, K, (H, W), kernel, stride, padding, dilation: some tap reads nothing but padding. None with one column of
# outputs at a stride: in bf16 with AMX oneDNN itself is wrong there, whatever the padding (torch 2.13).
OUTSIDE = {
    "all-of-it": (2, 8, 2, (61, 1), (3, 1), (1, 2), (1, 1), (3, 2)),
    "no-groups": (1, 4, 16, (2, 1), (2, 1), (2, 3), (4, 2), (3, 2)),
    "left-tap": (4, 4, 32, (61, 4), (2, 2), (3, 3), (1, 4), (3, 6)),
    "two-taps": (1, 2, 4, (61, 1), (3, 3), (1, 1), (2, 2), (3, 2)),
    "some-columns": (2, 8, 4, (2, 9), (3, 3), (1, 1), (3, 3), (2, 2)),
}


def outside(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    groups, c, k, size, kernel, stride, padding, dilation = OUTSIDE[name]
    torch.manual_seed(0)
    x = torch.randn(5, c, *size).to(dtype).contiguous(memory_format=memory_format)
    exact = fused_preact.PreActConv2d(c, k, kernel, stride, padding, dilation, groups, fused=False).double()
    site = copy.deepcopy(exact).to(dtype)
    site.fused = True
    exact.load_state_dict(site.state_dict())
    wide = x.double().requires_grad_()
    x.requires_grad_()
    y, expected = site(x), exact(wide)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    pairs = {"y": (y, expected), "dx": (x.grad, wide.grad)}
    pairs |= {f"d{n}": (p.grad, dict(exact.named_parameters())[n].grad) for n, p in site.named_parameters()}
    for what, (actual, wanted) in pairs.items():
        off = (actual.double() - wanted).abs().max() / (wanted.abs().max() + 1e-3)
        assert off < (1e-5 if dtype == torch.float32 else 0.05), (name, what, off.item())
    outside_taps = exact.conv.weight.grad.abs().amax((0, 1)) == 0
    assert (site.conv.weight.grad[:, :, outside_taps] == 0).all(), (name, "dweight of a tap outside")


@COMPILED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_taps_that_read_only_padding(dtype):
    """Where PyTorch 2.13's own convolution of 16-bit tensors is wrong, or crashes: hence a process for it."""
    code = f"""
import sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import torch
from test_numerics import OUTSIDE, outside
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)
for memory_format in (torch.contiguous_format, torch.channels_last):
    for name in OUTSIDE:
        outside(name, torch.{dtype}, memory_format)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])
