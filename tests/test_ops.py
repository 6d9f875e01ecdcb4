"""The registered ops: schemas, fake kernels, dispatch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import FORMATS, Case, make_site, triton_ops
from torch import Tensor

from fused_preact import ops, reference

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = list(ops._SCHEMAS)


def samples(
    name: str, device: str, memory_format: torch.memory_format, dtype: torch.dtype = torch.float32
) -> list[tuple[Any, ...]]:
    """Arguments of one op: with and without each of its optional parts."""
    s = make_site(Case(c=5, k=4, stride=(2, 1)), dtype, device, memory_format)
    vectors = (s.scale, s.shift)
    gamma = torch.randn(5, device=device)
    pooled = torch.randn(2, 5, device=device).to(dtype)
    sums = (s.mean + 1, s.mean - 1)
    bn = [*vectors, s.mean, s.rstd]
    behind = [s.residual, *(torch.rand(4, device=device) for _ in range(5))]
    return {
        "bn_stats": [(s.x,)],
        "bn_scale_shift": [(s.mean, s.rstd, gamma, s.scale + 1, 1e-5), (s.mean, s.rstd, None, None, 1e-3)],
        "bn_update_running": [
            ([s.mean], [s.rstd], [s.scale + 1], [s.shift + 1], [torch.tensor(3, device=device)], 0.1, [70]),
            (
                *([t, torch.rand(3, device=device)] for t in (s.mean, s.rstd, s.scale + 1, s.shift + 1)),
                [torch.tensor(3, device=device), torch.tensor(4, device=device)],
                None,
                [70, 8],
            ),
            ([s.mean], [s.rstd], [s.scale + 1], [s.shift + 1], [], 0.1, [70]),
        ],
        "conv_fprop": [
            (s.x, *vectors, s.weight, s.bias, s.residual, *s.constants, True),
            (s.x, *vectors, s.weight, None, None, *s.constants, False),
            (s.x, *vectors, s.weight, None, None, *s.constants, False, True, False),
        ],
        "conv_fprop_bn": [
            (s.x, *vectors, s.weight, s.bias, *s.constants, gamma[:4], gamma[1:], 1e-5),
            (s.x, *vectors, s.weight, None, *s.constants, None, None, 1e-3),
            (s.x, *vectors, s.weight, None, *s.constants, None, None, 1e-3, False),
        ],
        "conv_dgrad": [
            (s.dy, s.weight, s.x, *vectors, s.mean, s.da, *s.constants),
            (s.dy, s.weight, s.x, None, None, None, None, *s.constants),
            (s.dy, s.weight, s.x, *vectors, s.mean, s.da, *s.constants, False),
        ],
        "conv_wgrad": [
            (s.dy, s.x, *vectors, s.weight, *s.constants),
            (s.dy, s.x, *vectors, s.weight, *s.constants, False),
        ],
        "conv_backward": [
            (s.dy, [], s.weight, s.x, bn, s.da, s.da + 1, *s.constants, True, True, True),
            (s.dy, behind, s.weight, s.x, bn, None, None, *s.constants, True, False, True),
            (s.dy, behind[:4], s.weight, s.x, bn, None, None, *s.constants, False, True, False),
            (s.dy, [], s.weight, s.x, bn, None, None, *s.constants, True, False, False, False),
            (s.dy, [], s.weight, s.x, bn, None, None, *s.constants, True, True, True, False),
        ],
        "bn_backward_apply": [
            (s.da, s.x, s.mean, s.scale, s.rstd, *sums, True, s.da + 1),
            (s.da, s.x, s.mean, s.scale, s.rstd, *sums, False, None),
        ],
        "bn_relu_avg_pool": [(s.x, *vectors)],
        "bn_relu_avg_pool_reduce": [(pooled, s.x, *vectors, s.mean)],
        "bn_relu_avg_pool_apply": [(pooled, s.x, *vectors, s.mean, s.rstd, *sums, True)],
    }[name]


@FORMATS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, device: str, memory_format: torch.memory_format) -> None:
    """Schema, fake kernel and functionalisation; the ops themselves take no gradients."""
    op = getattr(torch.ops.fused_preact, name).default
    for sample in samples(name, device, memory_format):
        torch.library.opcheck(op, sample)


def described(results: Tensor | tuple[Tensor, ...] | None) -> list[tuple[Any, ...]]:
    results = (results,) if isinstance(results, Tensor) else results or ()
    # Strides of sizes 0 and 1 are free.
    return [
        (t.shape, t.dtype, [st for st, size in zip(t.stride(), t.shape, strict=True) if size > 1])
        for t in results
    ]


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_backends_return_the_same_kind(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Shapes, dtypes and strides of the Triton launchers, the reference and the fake kernels agree."""
    for sample in samples(name, "cpu", memory_format, dtype):
        expected = described(getattr(reference, name)(*sample))
        assert described(getattr(triton_ops, name)(*sample)) == expected
        fake = [
            [t.to("meta") if isinstance(t, Tensor) else t for t in a]
            if isinstance(a, list)
            else a.to("meta")
            if isinstance(a, Tensor)
            else a
            for a in sample
        ]
        assert described(getattr(torch.ops.fused_preact, name)(*fake)) == expected


TABLES = [
    pytest.param(reference, "cpu", id="reference"),
    pytest.param(torch.ops.fused_preact, "cpu", id="cpu"),
    pytest.param(triton_ops, "cpu", id="interpreter"),
    pytest.param(torch.ops.fused_preact, "cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("table", "device"), TABLES)
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_running_statistics_are_those_of_batch_norm(
    table: Any, device: str, momentum: float | None, dtype: torch.dtype
) -> None:
    """As nn.BatchNorm2d's, over a few steps, the counters included; also into buffers that are not dense.

    Four BNs of their own sizes: one more than a Triton launch takes.
    """
    sizes = (1300, 5, 64, 33)
    modules = [torch.nn.BatchNorm2d(c, momentum=momentum).to(device, dtype) for c in sizes]
    means, variances = (
        [torch.zeros(c, 2, device=device, dtype=dtype).t()[0] for c in sizes] for _ in range(2)
    )
    for var in variances:
        var += 1
    counters = [torch.tensor(i, device=device) for i in range(len(sizes))]
    for module, counter in zip(modules, counters, strict=True):
        module.num_batches_tracked.copy_(counter)
    buffers = [*means, *variances, *counters]
    versions = [t._version for t in buffers]
    for _ in range(3):
        found, counts = [], []
        for i, module in enumerate(modules):
            x = (torch.randn(2, sizes[i], 2, 2 + i, device=device) * 3 + i).to(dtype)
            module(x)
            found.append(reference.bn_stats(x))
            counts.append(8 + 4 * i)
        new = [list(t) for t in zip(*found, strict=True)]
        table.bn_update_running(*new, means, variances, counters, momentum, counts)
    tolerance = 8 * torch.finfo(dtype).eps
    for i, module in enumerate(modules):
        assert counters[i].item() == module.num_batches_tracked.item() == 3 + i
        torch.testing.assert_close(means[i], module.running_mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(variances[i], module.running_var, rtol=tolerance, atol=tolerance)
    assert all(t._version > v for t, v in zip(buffers, versions, strict=True)), (
        "autograd would not see that a saved buffer has changed"
    )


def test_float64_is_served_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    s = make_site(Case(), torch.float64, "cpu")
    d = s.double()
    monkeypatch.setattr(ops, "_triton_table", lambda: pytest.fail("float64 went to Triton"))
    y, _, _ = triton_ops.conv_fprop(d.x, d.scale, d.shift, d.weight, None, None, *d.constants, True)
    expected, _, _ = reference.conv_fprop(d.x, d.scale, d.shift, d.weight, None, None, *d.constants, True)
    assert torch.equal(y, expected)


def test_a_launcher_keeps_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton binds the first launch of a kind, those at addresses that are no multiples of 16, of a device that is
    not the current one, and those that a profiler listens to.
    """
    import triton

    from fused_preact.kernels.triton.common import Launcher

    bound, launched = [], []
    current = [-1]  # a CPU tensor's device
    driver = SimpleNamespace(get_current_device=lambda: current[0], get_current_stream=lambda device: 5)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)

    class Kernel:
        """A JIT function as far as a launcher looks."""

        arg_names = ("x_ptr", "y_ptr", "rows", "BLOCK_M")

        def __getitem__(self, grid):
            def run(*arguments, num_warps, num_stages):
                bound.append((grid, arguments, num_warps, num_stages))
                return SimpleNamespace(
                    run=lambda *arguments: launched.append(arguments), function="code", packed_metadata="meta"
                )

            return run

    launcher = Launcher(Kernel(), (3,), num_warps=4, num_stages=2, BLOCK_M=64, rows=7)
    x = torch.zeros(65)
    launcher(x, None)
    assert bound == [((3, 1, 1), (x, None, 7, 64), 4, 2)]
    launcher(x, None)
    assert launched == [(3, 1, 1, 5, "code", "meta", None, None, None, x.data_ptr(), 0, 7, 64)]
    for other in (x[1:], x[1:], x.double()):
        launcher(other, None)
    assert (len(bound), len(launched)) == (4, 1)
    launcher(x.double(), None)
    assert (len(bound), len(launched)) == (4, 2), "the dtype launched last is kept"
    launcher(x, None)
    launcher(x, None)
    assert (len(bound), len(launched)) == (5, 3)
    current[0] = 0
    launcher(x, None)
    assert (len(bound), len(launched)) == (6, 3)
    current[0] = -1
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        launcher(x, None)
    finally:
        hook.remove(print)
    assert (len(bound), len(launched)) == (7, 3)
    with pytest.raises(KeyError):
        Launcher(Kernel(), (3,), num_warps=4, rows=7, other=64)
