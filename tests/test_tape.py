"""Launches made by heart: the same bits as the function that they were learnt from, on whatever tensors come."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import fused_preact
from fused_preact import PreActBasicBlock, PreActBottleneck, PreActConv2d, arguments, functional, ops
from fused_preact.kernels.triton import choose, common, tape
from fused_preact.kernels.triton.configs import ConvConfig


def tensor_at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor there, of which the interpreter asks for nothing but dtype and address."""
    if address == 0:  # of a tensor without elements
        return torch.empty(0, dtype=dtype)
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), 16)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (1,))


@pytest.fixture
def kept_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launchers keep the interpreter's kernels as they keep compiled ones."""
    call = common.Launcher.__call__

    def keeping(self: Any, *tensors: Tensor | None) -> None:
        kinds = [None if t is None else t.dtype for t in tensors]

        def run(gx: int, gy: int, gz: int, *rest: Any) -> None:
            stream, function, metadata, *nothing = rest[:6]
            assert (stream, function, metadata, nothing) == (7, "code", "meta", [None] * 3)
            addresses, values = rest[6 : 6 + len(kinds)], rest[6 + len(kinds) :]
            assert values == self.values
            with _disable_current_modes():
                given = [
                    tensor_at(at, kind) if kind is not None else None
                    for at, kind in zip(addresses, kinds, strict=True)
                ]
                self._kernel[gx, gy, gz](*given, *values, num_warps=self._num_warps)

        call(self, *tensors)
        if -1 not in self.ready:
            self.ready[-1] = common.Ready(kinds, run, "code", "meta", lambda: -1, lambda index: 7)

    monkeypatch.setattr(common.Launcher, "__call__", keeping)
    # The interpreter's own work on tensors is none of the recorder's business.
    monkeypatch.setattr(common, "_current", lambda device: _disable_current_modes())
    clear()
    yield
    clear()


def clear() -> None:
    """Forget launchers and plans, of which those of this module run stand-ins."""
    from fused_preact.kernels.triton import bn_backward_apply, bn_stats, bn_update_running, finalize

    arguments._remembered.cache_clear()
    choose.reload()
    for module in (bn_backward_apply, bn_stats, bn_update_running, finalize):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that ran, not replayed."""
    ran: list[str] = []
    run = ops.run

    def listen(k: Any, memo: Any, key: Any, function: Any, *rest: Any) -> Any:
        def heard(*args: Any) -> Any:
            ran.append(function.__name__)
            return function(*args)

        return run(k, memo, key, heard, *rest)

    monkeypatch.setattr(ops, "run", listen)
    return ran


def step(module: nn.Module, x: Tensor, dy: Tensor, by_heart: bool = True) -> list[Tensor]:
    """Output, gradients and buffers of one training step."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, fused_preact.backend("triton"):
        if not by_heart:
            patch.setattr(ops, "run", lambda k, memo, key, function, *rest: function(k, *rest[:2]))
        y = module(x)
        y.backward(dy)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in module.buffers())]


def check(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    """A step with replay has the bits and the strides of one without."""
    twin = copy.deepcopy(module)
    for a, b in zip(step(module, x, dy), step(twin, x, dy, by_heart=False), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


UNITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bottleneck": (lambda: PreActBottleneck(16, 16), (2, 16, 4, 3)),
    "bottleneck-stride": (lambda: PreActBottleneck(8, 16, 2), (2, 8, 6, 5)),
    "basic": (lambda: PreActBasicBlock(5, 5), (2, 5, 4, 3)),
    "site": (lambda: PreActConv2d(16, 8, 3, padding=1, bias=False), (2, 16, 4, 4)),
    "row": (
        lambda: fused_preact.PreActSequential(PreActBottleneck(8, 8), PreActBottleneck(8, 8)),
        (2, 8, 3, 2),
    ),
}


def make(name: str) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    build, shape = UNITS[name]
    module = build().to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = module(torch.randn(shape)).shape

    def batch() -> tuple[Tensor, Tensor]:
        last = torch.channels_last
        return torch.randn(shape).to(memory_format=last), torch.randn(out).to(memory_format=last)

    return module, batch


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("training", [True, False])
def test_replay_gives_the_same_bits(kept_kernels: None, calls: list[str], name: str, training: bool) -> None:
    module, batch = make(name)
    module.train(training)
    calls.clear()
    for _ in range(2):
        check(module, *batch())
    once = ["_forward", "_update", "_backward"] if training else ["_forward", "_backward"]
    # Two units of one signature are learnt together.
    assert calls == 2 * once or (name == "row" and 4 <= len(calls) <= 12)
    calls.clear()
    versions = [b._version for b in module.buffers()]
    check(module, *batch())
    assert not calls
    assert all((b._version > v) == training for b, v in zip(module.buffers(), versions, strict=True))


def test_what_is_not_of_the_kind_runs_as_it_is(kept_kernels: None, calls: list[str]) -> None:
    module, batch = make("site")
    module.eval()
    for _ in range(3):
        check(module, *batch())
    calls.clear()
    x, dy = batch()
    check(module, x, dy.contiguous())
    check(module, x, torch.ones(()).expand(dy.shape))
    assert calls == ["_backward"] * 2, "gradients of other strides"
    calls.clear()
    module.conv.weight.requires_grad_(False)
    check(module, x, dy)
    module.conv.weight.requires_grad_(True)
    assert calls == ["_backward"], "other gradients asked for"
    calls.clear()
    unaligned = torch.empty(x.numel() + 1)[1:].view(2, 4, 4, 16).permute(0, 3, 1, 2).copy_(x)
    check(module, unaligned, dy)
    assert calls == ["_forward", "_backward"]
    calls.clear()
    with choose.forced("fused", ConvConfig(16, 16, 16, 4, 1)):
        check(module, x, dy)
    choose.reload()
    check(module, x, dy)
    assert calls == ["_forward", "_backward"] * 2, "another choice, other tables"
    calls.clear()
    for _ in range(2):
        check(module, x, dy)
    assert calls == ["_forward", "_backward"]
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        check(module, x, dy)
    finally:
        hook.remove(print)
    assert calls == ["_forward", "_backward"] * 2, "a profiler hears of launches"


def test_copies_and_aliases_are_not_learnt(kept_kernels: None, calls: list[str]) -> None:
    """A copy is no launch; of one tensor in two places nobody knows which one the next call changes."""
    module, batch = make("site")
    module.eval()
    x, dy = batch()
    module.conv.weight.data = module.conv.weight.data.contiguous()  # copied to channels_last by every call
    for _ in range(3):
        check(module, x, dy)
    calls.clear()
    check(module, x, dy)
    assert calls == ["_forward", "_backward"]
    calls.clear()
    weight, mean, var = torch.randn(16, 16, 1, 1), torch.zeros(16), torch.ones(16)
    found = []
    with fused_preact.backend("triton"):
        for residual in (x, x, x, x + 1):
            kept = {"running_mean": mean, "running_var": var, "residual": residual}
            found.append(functional.preact_conv2d(x, weight, **kept))
    assert calls == ["_forward"] * 4
    torch.testing.assert_close(found[3], found[2] + 1)


def test_a_folded_chain_is_replayed(kept_kernels: None, calls: list[str]) -> None:
    module, _ = make("row")
    module.eval()
    fused_preact.optimize_for_inference(module)
    for shape in ((2, 8, 3, 2), (3, 8, 3, 2)):
        for _ in range(3):
            x = torch.randn(shape).to(memory_format=torch.channels_last)
            with torch.no_grad(), fused_preact.backend("triton"):
                y = module(x)
                plain = fused_preact.undo_optimize_for_inference(copy.deepcopy(module))(x)
            torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
        assert calls.count("_run_sites") == 2
        calls.clear()
    with torch.no_grad(), fused_preact.backend("triton"):
        module[0].bn2.running_mean.add_(1)
        moved = module(x)
    assert calls == ["_run_sites"], "other weights"
    assert not torch.allclose(moved, y)


def test_work_beside_the_launches_is_not_lost(kept_kernels: None) -> None:
    def function(k: Any, shift: float, tensors: Any) -> list[Any]:
        mean, var = k.bn_stats(tensors[0])
        return [mean.add_(shift), var]

    memo: dict[Any, Any] = {}
    for _ in range(4):
        x = make("basic")[1]()[0]
        mean, _ = tape.replayed(ops._triton_table(), memo, "key", function, 5.0, (x,))
        torch.testing.assert_close(mean, x.mean((0, 2, 3)) + 5)
    assert list(memo.values()) == ["aten.add_.Tensor runs beside the launches"]


def test_results_outlive_the_next_replay(kept_kernels: None) -> None:
    module, batch = make("basic")
    found, batches = [], [batch() for _ in range(5)]
    with fused_preact.backend("triton"):
        for x, _ in batches:
            found.append(module(x))
        again = [module(x) for x, _ in batches]
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)
    assert len({y.data_ptr() for y in found + again}) == 10


def test_a_memo_does_not_grow_without_end(kept_kernels: None) -> None:
    memo: dict[Any, Any] = {}
    for key in range(3 * tape._MOST):
        x = torch.ones(1)
        assert tape.replayed(None, memo, key, lambda k, constants, tensors: list(tensors), None, (x,)) == [x]
        assert len(memo) <= tape._MOST


def test_buffers_in_use_at_a_time_do_not_overlap() -> None:
    generator = random.Random(0)
    for _ in range(200):
        buffers = []
        for _ in range(generator.randrange(12)):
            first = generator.randrange(10)
            buffers.append((generator.randrange(2000), first, first + generator.randrange(4)))
        offsets, total = tape.packed(buffers)
        for i, (size, first, last) in enumerate(buffers):
            assert offsets[i] % 256 == 0
            assert offsets[i] + size <= total
            for j, (other, begin, until) in enumerate(buffers[:i]):
                if begin <= last and first <= until:
                    assert offsets[i] + size <= offsets[j] or offsets[j] + other <= offsets[i]
    assert tape.packed([(1000, 0, 1), (1000, 2, 3), (10, 1, 2)]) == ([0, 0, 1024], 1280)
    # The gradients of a bottleneck's three sites: the last, as large as its input, lies where the first one was.
    assert tape.packed([(1024, 0, 1), (1024, 1, 2), (4096, 2, 3)]) == ([0, 4096, 0], 5120)
