"""Fused modules beside the same children run one by one: outputs, gradients, buffers, awkward settings."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import BACKENDS, FORMATS, MixedUnit, assert_within_policy, disturb, interpreting, set_fused
from torch import Tensor, nn

import fused_preact
from fused_preact import PreActBasicBlock, PreActBottleneck, PreActConv2d, PreActSequential, ops

pytestmark = [pytest.mark.usefixtures("poisoned", "exact_float32"), BACKENDS]


def run(module: nn.Module, x: Tensor, dy: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    return y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def compare(
    build: Callable[[], nn.Module],
    x: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
    prepare=lambda m: m,
) -> None:
    """Fused against the float64 plain module, by the policy; eager is the plain module in ``dtype``."""
    torch.manual_seed(1)
    plain = prepare(set_fused(disturb(build()), False)).to(x.device)
    oracle = copy.deepcopy(plain).double()
    plain = plain.to(dtype)
    fused = set_fused(copy.deepcopy(plain), True)
    x = x.to(dtype)
    dy = torch.randn_like(plain(x))
    plain.load_state_dict(fused.state_dict())
    oracle.load_state_dict(
        {k: v.double() if v.is_floating_point() else v for k, v in fused.state_dict().items()}
    )
    with fused_preact.backend(backend):
        y, dx, grads = run(fused, x, dy)
    eager_y, eager_dx, eager_grads = run(plain, x, dy)
    exact_y, exact_dx, exact_grads = run(oracle, x.double(), dy.double())
    assert_within_policy("y", y, eager_y, exact_y)
    assert_within_policy("dx", dx, eager_dx, exact_dx, ulps=8)
    assert grads.keys() == exact_grads.keys()
    for name in grads:
        assert_within_policy(name, grads[name], eager_grads[name], exact_grads[name], ulps=16)
    eager_buffers, exact_buffers = dict(plain.named_buffers()), dict(oracle.named_buffers())
    for name, buffer in fused.named_buffers():
        if buffer.is_floating_point():
            assert_within_policy(name, buffer, eager_buffers[name], exact_buffers[name])
        else:
            assert torch.equal(buffer, exact_buffers[name]), name


UNITS = {
    "basic": lambda: PreActBasicBlock(6, 6),
    "basic-projection": lambda: PreActBasicBlock(6, 9, 2),
    "basic-padding": lambda: PreActBasicBlock(6, 9, 2, shortcut="A"),
    "basic-shared-activation": lambda: PreActBasicBlock(6, 6, shortcut="A"),
    "basic-dilated": lambda: PreActBasicBlock(6, 6, dilation=2),
    "bottleneck": lambda: PreActBottleneck(12, 12),
    "bottleneck-3x3-stride": lambda: PreActBottleneck(6, 12, 2),
    "bottleneck-1x1-stride": lambda: PreActBottleneck(6, 12, 2, stride_on_1x1=True),
    "conv": lambda: PreActConv2d(6, 9, 3, 2, 1),
    "conv-even": lambda: PreActConv2d(6, 9, (2, 4), (1, 3), (1, 2), dilation=(2, 1)),
    "conv-grouped": lambda: PreActConv2d(6, 9, 3, 1, "same", groups=3),
    "conv-depthwise": lambda: PreActConv2d(6, 6, 3, padding="valid", groups=6, bias=False),
    "conv-plain-bn": lambda: PreActConv2d(6, 9, 1, affine=False, track_running_stats=False),
    "conv-cumulative": lambda: PreActConv2d(6, 9, 1, momentum=None, eps=1e-3),
    "conv-without-relu": lambda: PreActConv2d(6, 9, 3, 2, 1, relu=False),
    "conv-grouped-without-relu": lambda: PreActConv2d(6, 9, 3, 1, "same", groups=3, relu=False),
    "mixed-projection": lambda: MixedUnit(6, 9, 2),
    "mixed-identity": lambda: MixedUnit(6, 6),
}


@FORMATS
@pytest.mark.parametrize("unit", UNITS)
def test_unit(backend: str, device: str, unit: str, memory_format: torch.memory_format) -> None:
    x = (
        torch.randn(3, 12 if unit == "bottleneck" else 6, 7, 5)
        .to(device)
        .contiguous(memory_format=memory_format)
    )
    compare(UNITS[unit], x, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("unit", ["basic-projection", "bottleneck", "mixed-projection"])
def test_unit_16_bits(backend: str, device: str, unit: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 12 if unit == "bottleneck" else 6, 7, 5).to(device)
    compare(UNITS[unit], x, backend, dtype)


@pytest.mark.parametrize(
    "unit", ["basic", "basic-projection", "bottleneck", "conv", "conv-without-relu", "mixed-projection"]
)
def test_unit_eval(backend: str, device: str, unit: str) -> None:
    x = torch.randn(3, 12 if unit == "bottleneck" else 6, 7, 5).to(device)
    compare(UNITS[unit], x, backend, prepare=lambda m: m.eval())


def test_one_frozen_batch_norm(backend: str, device: str) -> None:
    """Fine-tuning with one BN in eval mode inside a unit that trains."""

    def prepare(unit: nn.Module) -> nn.Module:
        unit.train()
        unit.bn2.eval()
        return unit

    compare(lambda: PreActBottleneck(12, 12), torch.randn(3, 12, 5, 5).to(device), backend, prepare=prepare)


def test_statistics_are_handed_on(backend: str, device: str) -> None:
    """A row of units computes the statistics of its input once; the others come from epilogues."""
    row = PreActSequential(PreActBasicBlock(6, 6), PreActBasicBlock(6, 9, 2), PreActBottleneck(9, 12))
    calls = []
    table = ops.table(backend, torch.empty(0, device=device))

    class Counting:
        replayed = None  # every operation is to be heard

        def __getattr__(self, name):
            def call(*args):
                calls.append(name)
                return getattr(table, name)(*args)

            return call

    with pytest.MonkeyPatch.context() as patch, fused_preact.backend(backend):
        patch.setattr(ops, "table", lambda name, x: Counting())
        row.to(device)(torch.randn(2, 6, 5, 5, device=device, requires_grad=True)).sum().backward()
    assert calls.count("bn_stats") == 1
    assert calls.count("bn_scale_shift") == 3, (
        "a unit's first BN; the others' vectors come with the statistics"
    )
    assert calls.count("conv_fprop_bn") == 1 + 1 + 2, "the sites that another one of their unit follows"
    assert calls.count("conv_fprop") == 3 + 2, "the last sites and the 2 projections"
    assert calls.count("conv_backward") == 7
    assert calls.count("bn_backward_apply") == 0, "applied on load, or at a unit's input by conv_backward"
    compare(lambda: copy.deepcopy(row).cpu(), torch.randn(2, 6, 5, 5).to(device), backend)


class InPlace(nn.Module):
    """Foreign code between two units."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).add_(1)


def test_foreign_module_between_units(backend: str, device: str) -> None:
    """Statistics do not outlive the tensor that they were made of."""
    build = lambda: PreActSequential(PreActBasicBlock(6, 6), InPlace(), PreActBasicBlock(6, 6))  # noqa: E731
    compare(build, torch.randn(2, 6, 5, 5).to(device), backend)


def test_hook_changes_the_tensor(backend: str, device: str) -> None:
    def build() -> nn.Module:
        row = PreActSequential(PreActBasicBlock(6, 6), PreActBasicBlock(6, 6))
        row[0].register_forward_hook(lambda module, args, output: output * 2 + 1)
        return row

    compare(build, torch.randn(2, 6, 5, 5).to(device), backend)


def test_hook_on_a_child_is_called(backend: str, device: str) -> None:
    unit = PreActBottleneck(12, 12).to(device)
    seen = []
    handle = unit.conv2.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with fused_preact.backend(backend):
        unit(torch.randn(2, 12, 4, 4, device=device))
        assert len(seen) == 1
        handle.remove()
        unit(torch.randn(2, 12, 4, 4, device=device))
        assert len(seen) == 1


FROZEN = [
    "x",
    "bn1",
    "conv1",
    "bn2.weight",
    "conv3",
    "shortcut",
    "everything but x",
    "everything but bn3.bias",
]


@pytest.mark.parametrize("frozen", FROZEN)
def test_needs_input_grad(backend: str, device: str, frozen: str) -> None:
    """Frozen parameters get no gradient, the others the same one, and no kernel runs for nothing."""
    build = lambda: PreActBottleneck(8, 12, shortcut="B")  # noqa: E731
    torch.manual_seed(1)
    plain = set_fused(disturb(build()), False).to(device)
    for name, parameter in plain.named_parameters():
        if frozen.startswith("everything but"):
            parameter.requires_grad_(name == frozen.split()[-1])
        else:
            parameter.requires_grad_(not name.startswith(frozen))
    fused = set_fused(copy.deepcopy(plain), True)
    x = torch.randn(2, 8, 5, 3, device=device)
    inputs = [x.clone().requires_grad_(frozen not in ("x", "everything but bn3.bias")) for _ in range(2)]
    with fused_preact.backend(backend):
        y = fused(inputs[0])
        dy = torch.randn_like(y)
        y.backward(dy)
    plain(inputs[1]).backward(dy)
    assert (inputs[0].grad is None) == (inputs[1].grad is None)
    if inputs[0].grad is not None:
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
            assert a.grad.stride() == a.stride(), name


def test_nothing_frozen_runs_no_kernel(backend: str, device: str) -> None:
    """With only the last convolution trainable, backward is one wgrad."""
    unit = PreActBottleneck(8, 8).to(device).requires_grad_(False)
    unit.conv3.weight.requires_grad_(True)
    calls = []
    table = ops.table(backend, torch.empty(0, device=device))

    class Counting:
        replayed = None  # every operation is to be heard

        def __getattr__(self, name):
            calls.append(name)
            return getattr(table, name)

    with pytest.MonkeyPatch.context() as patch, fused_preact.backend(backend):
        y = unit(torch.randn(2, 8, 4, 4, device=device))
        patch.setattr(ops, "table", lambda name, x: Counting())
        y.sum().backward()
    assert calls == ["conv_wgrad"]


def test_gradient_is_not_written_to(backend: str, device: str) -> None:
    """In a residual net one gradient feeds two branches; expanded ones have one element of storage."""
    unit = PreActBasicBlock(6, 6).to(device)
    x = torch.randn(2, 6, 5, 5, device=device, requires_grad=True)
    with fused_preact.backend(backend):
        y = unit(x)
        dy = torch.randn(1, 6, 1, 1, device=device).expand_as(y)
        before = dy.clone()
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (again,) = torch.autograd.grad(y, x, before.contiguous())
    assert torch.equal(dy, before)
    assert torch.equal(dx, again), "two backward passes of one graph, with another layout, give the same bits"


def test_saved_tensors_are_raw_inputs_vectors_and_parameters(backend: str, device: str) -> None:
    unit = PreActBottleneck(32, 32).to(device)
    x = torch.randn(2, 32, 9, 9, device=device, requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with fused_preact.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        unit(x)
    images = [t for t in saved if t.dim() == 4 and t.shape[2:] == x.shape[2:]]
    assert sorted(t.shape[1] for t in images) == [8, 8, 32]
    vectors = [t for t in saved if t.dim() < 2]
    assert all(t.numel() <= 32 for t in vectors)
    known = {p.data_ptr() for p in unit.parameters()}
    rest = [t for t in saved if t.dim() == 4 and t.shape[2:] != x.shape[2:]]
    assert all(t.data_ptr() in known for t in rest)


def test_autocast(backend: str, device: str) -> None:
    """Convolutions run in the autocast dtype, BN parameters and gradients stay float32."""
    if interpreting() and backend == "triton":
        x = torch.randn(2, 6, 5, 4)
    else:
        x = torch.randn(4, 6, 9, 8)
    x = x.to(device).requires_grad_()
    unit = disturb(PreActBasicBlock(6, 9, 2)).to(device)
    plain = set_fused(copy.deepcopy(unit), False)
    exact = copy.deepcopy(plain).double()
    with fused_preact.backend(backend), torch.autocast(device, torch.bfloat16):
        y = unit(x)
    with torch.autocast(device, torch.bfloat16):
        expected = plain(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    oracle = exact(x.detach().double())
    assert_within_policy("y", y, expected, oracle)
    y.float().sum().backward()
    assert {p.grad.dtype for p in unit.parameters()} == {torch.float32}
    assert x.grad.dtype == torch.float32
