"""What only a CUDA device can show: the compiler, graphs, other streams, TF32, sizes past 2^31. ``pytest -m gpu``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, assert_within_policy, make_site, triton_ops
from torch.utils._python_dispatch import TorchDispatchMode

import fused_preact
from fused_preact import PreActBasicBlock, PreActBottleneck, PreActSequential, models, ops, reference

pytestmark = pytest.mark.gpu


def small_network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    row = PreActSequential(PreActBasicBlock(16, 32, 2), PreActBottleneck(32, 64), PreActBottleneck(64, 64))
    return row.to("cuda", dtype, memory_format=torch.channels_last)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_triton_serves() -> None:
    assert fused_preact.serving_backend(image(1, 3, 2, 2)) == "triton"
    assert fused_preact.serving_backend(image(1, 3, 2, 2).double()) == "reference"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_fullgraph(mode: str) -> None:
    """No graph break, no recompilation for a second batch, the same outputs and gradients as eager."""
    torch._dynamo.reset()
    network = small_network()
    expected = copy.deepcopy(network)
    with torch._dynamo.config.patch(error_on_recompile=mode == "default"):
        compiled = torch.compile(network, fullgraph=True, mode=mode)
        for _ in range(3):
            x = image(4, 16, 16, 16).requires_grad_()
            same = x.detach().clone().requires_grad_()
            y, z = compiled(x), expected(same)
            y.square().sum().backward()
            z.square().sum().backward()
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(x.grad, same.grad, rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(network.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-3, atol=1e-2, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_cuda_graph(training: bool) -> None:
    """A captured step replays with new data: nothing synchronises, nothing is allocated outside the pool."""
    network = small_network().train(training)
    expected = copy.deepcopy(network)
    x = image(4, 16, 16, 16)

    def step(model: torch.nn.Module) -> torch.Tensor:
        y = model(x)
        y.square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            step(network)
    torch.cuda.current_stream().wait_stream(stream)
    network.load_state_dict(expected.state_dict())
    network.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(network)
    network.load_state_dict(expected.state_dict())
    x.copy_(image(4, 16, 16, 16))
    graph.replay()
    z = step(expected)
    torch.testing.assert_close(y, z)
    for (name, a), b in zip(network.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(network.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_graphed_callables() -> None:
    """``torch.cuda.make_graphed_callables``, by which a user trains with CUDA graphs, under autocast too."""
    network = small_network()
    expected = copy.deepcopy(network)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(network, (image(4, 16, 16, 16),))
    network.load_state_dict(expected.state_dict())  # the recording trained BN's statistics
    for _ in range(2):
        x = image(4, 16, 16, 16)
        for model in (graphed, expected):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            y.float().square().mean().backward()
        for (name, a), b in zip(network.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(network.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_launches_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of which the later ones are replayed have the bits of steps that are not."""
    network = small_network()
    losses = []
    for by_heart in (True, False):
        model = copy.deepcopy(network)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        if not by_heart:
            monkeypatch.setattr(ops, "run", lambda k, memo, key, function, *rest: function(k, *rest[:2]))
        torch.manual_seed(0)
        for _ in range(6):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(image(4, 16, 16, 16)).float().square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append([loss, *model.state_dict().values()])
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)


def test_other_stream() -> None:
    network = small_network()
    x = image(4, 16, 16, 16)
    network.eval()
    expected = network(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = network(x)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training(dtype: torch.dtype) -> None:
    """A whole network under autocast learns what the plain one learns."""
    torch.manual_seed(0)
    fused = models.cifar_preact_resnet20().cuda().to(memory_format=torch.channels_last)
    plain = models.cifar_preact_resnet20(fused=False).cuda().to(memory_format=torch.channels_last)
    plain.load_state_dict(fused.state_dict())
    x, target = image(64, 3, 32, 32), torch.randint(10, (64,), device="cuda")
    losses = []
    for model in (fused, plain):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        curve = []
        for _ in range(20):
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(model(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        losses.append(curve)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-2)
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=0.3)


def test_tf32_follows_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    s = make_site(Case(n=4, c=64, k=64, h=14, w=14), torch.float32, "cuda")
    d = s.double()
    oracle, _, _ = reference.conv_fprop(d.x, d.scale, d.shift, d.weight, None, None, *d.constants, False)
    errors = {}
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        arguments = (s.x, s.scale, s.shift, s.weight, None, None, *s.constants, False)
        y, _, _ = triton_ops.conv_fprop(*arguments)
        eager, _, _ = reference.conv_fprop(*arguments)
        assert_within_policy("y", y, eager, oracle)
        errors[allowed] = (y.double() - oracle).abs().max().item()
    assert errors[True] > 20 * errors[False]


# The tiles and warps that real sites choose: the interpreter cannot tell a miscompiled kernel.
REAL = [
    Case(n=16, c=64, h=56, w=56, k=64),
    Case(n=16, c=64, h=56, w=56, k=256, kernel=(1, 1), padding=(0, 0)),
    Case(n=16, c=256, h=56, w=56, k=64, kernel=(1, 1), padding=(0, 0)),
    Case(n=16, c=128, h=56, w=56, k=128, stride=(2, 2)),
    Case(n=16, c=256, h=56, w=56, k=512, stride=(2, 2), kernel=(1, 1), padding=(0, 0)),
    Case(n=16, c=256, h=14, w=14, k=256),
    Case(n=16, c=1024, h=14, w=14, k=256, kernel=(1, 1), padding=(0, 0)),
    Case(n=16, c=512, h=7, w=7, k=512),
    Case(n=64, c=16, h=32, w=32, k=16),
    Case(n=64, c=64, h=32, w=32, k=16, kernel=(1, 1), padding=(0, 0)),
    Case(n=64, c=16, h=32, w=32, k=64, kernel=(1, 1), padding=(0, 0)),
]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("case", REAL, ids=[c.id for c in REAL])
def test_real_sites(case: Case, dtype: torch.dtype) -> None:
    s = make_site(case, dtype, "cuda")
    d = s.double()
    y = triton_ops.conv_fprop(s.x, s.scale, s.shift, s.weight, None, s.residual, *s.constants, True)
    eager = reference.conv_fprop(s.x, s.scale, s.shift, s.weight, None, s.residual, *s.constants, True)
    oracle = reference.conv_fprop(d.x, d.scale, d.shift, d.weight, None, d.residual, *d.constants, True)
    assert_within_policy("y", y[0], eager[0], oracle[0])
    exact = reference.bn_stats(y[0].double())
    assert_within_policy("mean", y[1], y[1], exact[0])
    assert_within_policy("var", y[2], y[2], exact[1])
    g = triton_ops.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *s.constants)
    eager = reference.conv_dgrad(s.dy, s.weight, s.x, s.scale, s.shift, s.mean, s.da, *s.constants)
    oracle = reference.conv_dgrad(d.dy, d.weight, d.x, d.scale, d.shift, d.mean, d.da, *d.constants)
    # Where z is within rounding of 0 the mask is a matter of luck for every float32 computation.
    sure = ((d.x * d.scale.view(1, -1, 1, 1) + d.shift.view(1, -1, 1, 1)).abs() > 1e-4).double()
    assert_within_policy("g", g[0].double().mul(sure).to(dtype), eager[0] * sure, oracle[0] * sure)
    dweight = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    eager_dw = reference.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    oracle_dw = reference.conv_wgrad(d.dy, d.x, d.scale, d.shift, d.weight, *d.constants)
    assert_within_policy("dweight", dweight, eager_dw, oracle_dw, ulps=16)
    again = triton_ops.conv_wgrad(s.dy, s.x, s.scale, s.shift, s.weight, *s.constants)
    assert torch.equal(dweight, again), "two runs give the same bits"


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("channels", [256, 512])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "eval"])
def test_pending_bn_of_a_bottleneck(dtype: torch.dtype, channels: int, batch_stats: bool) -> None:
    """conv1 of ResNet-50's units: applied on load or stored, both as the oracle, twice the same bits."""
    from fused_preact.kernels.triton import choose

    width = channels // 4
    s = make_site(Case(n=8, c=channels, h=28, w=28, k=width, kernel=(1, 1), padding=(0, 0)), dtype, "cuda")
    d = s.double()
    rows = 8 * 28 * 28
    behind = [torch.rand(width, device="cuda") + 0.5 for _ in range(3)]
    if batch_stats:
        behind += [torch.rand(width, device="cuda") * rows for _ in range(2)]

    def run(k, t):
        pending = [t.residual, *(v.to(t.mean.dtype) for v in behind)]
        bn = [t.scale, t.shift, t.mean, t.rstd]
        return k.conv_backward(t.dy, pending, t.weight, t.x, bn, None, None, *s.constants, True, False, True)

    eager, oracle = run(reference, s), run(reference, d)
    for way in ("loaded", "stored"):
        with choose.forced(way, None):
            first, second = run(triton_ops, s), run(triton_ops, s)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert_within_policy(f"{way} g", first[0], eager[0], oracle[0])
        assert_within_policy(f"{way} dweight", first[3], eager[3], oracle[3], ulps=16)


def test_dispatch_modes_see_the_ops() -> None:
    """In eager PyTorch the launchers are called directly; a mode that wants to see the ops still does."""
    names = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    network = small_network()
    expected = copy.deepcopy(network)(x := image(4, 16, 16, 16))
    with Seen():
        y = network(x)
    assert {"fused_preact::bn_stats", "fused_preact::conv_fprop", "fused_preact::bn_update_running"} <= names
    assert torch.equal(y, expected)


def test_launches_of_unaligned_tensors_are_compiled_anew() -> None:
    """A kernel compiled for addresses that are multiples of 16 bytes must not serve others."""
    storage = torch.randn(2 * 16 * 8 * 8 + 1, device="cuda")
    mean, var = torch.zeros(16, device="cuda"), torch.ones(16, device="cuda")
    weight = torch.randn(16, 16, 1, 1, device="cuda").contiguous(memory_format=torch.channels_last)
    results = []
    for start in (0, 1, 0):
        x = storage[start : start + 2 * 16 * 8 * 8]
        x.copy_(torch.arange(x.numel(), device="cuda") % 7)
        x = x.view(2, 8, 8, 16).permute(0, 3, 1, 2)
        constants = ([1, 1], [0, 0], [1, 1], 1)
        results.append(triton_ops.conv_fprop(x, var, mean, weight, None, None, *constants, True)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets: the last image of a tensor past 2^31 elements."""
    free, _ = torch.cuda.mem_get_info()
    shape = (172, 64, 448, 448)
    assert torch.Size(shape).numel() > 2**31
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of device memory, {free / 2**30:.0f} are free")
    x = torch.randn(1, *shape[1:], device="cuda", dtype=torch.bfloat16)
    x = x.expand(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 1, 1, device="cuda", dtype=torch.bfloat16) / 8
    scale, shift = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    constants = ([1, 1], [0, 0], [1, 1], 1)
    y, _, _ = triton_ops.conv_fprop(x, scale, shift, weight, None, None, *constants, False)
    assert torch.equal(y[0], y[-1])
    g, _, _ = triton_ops.conv_dgrad(y, weight, x, scale, shift, shift, None, *constants)
    assert torch.equal(g[0], g[-1])
    mean, _ = triton_ops.bn_stats(x)
    expected, _ = triton_ops.bn_stats(x[:1])
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current() -> None:
    network = small_network().to("cuda:1")
    y = network(image(4, 16, 16, 16).to("cuda:1"))
    y.sum().backward()
    torch.cuda.synchronize(1)
    assert y.device.index == 1
    assert y.isfinite().all()


def test_peak_memory_of_a_step() -> None:
    """The saving is there in the allocator too, not only in what autograd keeps."""
    peaks = {}
    for fused in (True, False):
        model = models.preact_resnet50(fused=fused).to(
            "cuda", torch.bfloat16, memory_format=torch.channels_last
        )
        x = image(32, 3, 224, 224, dtype=torch.bfloat16)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            model(x).sum().backward()
        torch.cuda.synchronize()
        peaks[fused] = torch.cuda.max_memory_allocated()
        del model
    assert peaks[True] < 0.75 * peaks[False], peaks
