"""Workflows: ``torch.func``, forward-mode AD and tracers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from convert_helpers import assert_close
from torch import Tensor, fx, nn
from torch.autograd import forward_ad, gradgradcheck
from workflows import NOT_FUSED, Subject, elsewhere, workflow

GROUP = "Transforms and tracers"


def with_state(model: nn.Module, x: Tensor) -> tuple[Callable[..., Tensor], Any]:
    """The loss as a function of parameters and buffers, and copies of these."""
    state = {n: p.detach() * 0.9 for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def loss(parameters: Any) -> Tensor:
        y: Tensor = torch.func.functional_call(model, (parameters, buffers), (x,))
        return y.square().sum()

    return loss, (state, buffers)


@workflow("functional-call", "torch.func.functional_call, with backward", GROUP)
def functional_call(s: Subject) -> None:
    x, found = s.image(), []
    for m in s.pair():
        before = {n: b.clone() for n, b in m.named_buffers()}
        loss, (state, buffers) = with_state(m, x)
        state = {n: p.requires_grad_() for n, p in state.items()}
        value = loss(state)
        grads = torch.autograd.grad(value, list(state.values()))
        grads_by_name = dict(zip(state, grads, strict=True))
        found.append({"loss": value, **grads_by_name, **{f"buffer {n}": b for n, b in buffers.items()}})
        for name, b in m.named_buffers():
            assert torch.equal(b, before[name]), f"{name}: the model's own was written to"
    for name, tensor in found[0].items():
        assert_close(name, found[1][name], tensor)


@workflow("func-grad", "torch.func.grad", GROUP, outcome=NOT_FUSED)
def func_grad(s: Subject) -> None:
    x, found = s.image(), []
    for m in s.pair(training=False):
        loss, (state, _) = with_state(m, x)
        found.append(torch.func.grad(loss)(state))
    for name, tensor in found[0].items():
        assert_close(name, found[1][name], tensor)


@workflow("vmap", "torch.vmap, in evaluation", GROUP, outcome=NOT_FUSED)
def vmap(s: Subject) -> None:
    plain, model = s.pair(training=False)
    x = torch.stack([s.image() for _ in range(3)])
    assert_close("output", torch.vmap(model)(x), torch.vmap(plain)(x))


@workflow("per-sample-gradients", "per-sample gradients: vmap of grad", GROUP, outcome=NOT_FUSED)
def per_sample(s: Subject) -> None:
    x, found = s.image(3), []
    for m in s.pair(training=False):
        parameters = {n: p.detach() for n, p in m.named_parameters()}

        def loss(parameters: Any, image: Tensor, m: Any = m) -> Tensor:
            y: Tensor = torch.func.functional_call(m, parameters, (image[None],))
            return y.square().sum()

        found.append(torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    for name, tensor in found[0].items():
        assert_close(name, found[1][name], tensor)


@workflow("jvp", "torch.func.jvp", GROUP, outcome=NOT_FUSED)
def jvp(s: Subject) -> None:
    x, t = s.image(), s.image()
    found = [torch.func.jvp(m, (x,), (t,)) for m in s.pair(training=False)]
    for name, actual, expected in zip(("output", "tangent"), found[1], found[0], strict=True):
        assert_close(name, actual, expected)


@workflow("forward-ad", "forward-mode AD, training", GROUP, outcome=NOT_FUSED)
def forward_mode(s: Subject) -> None:
    x, t, found = s.image(), s.image(), []
    for m in s.pair():
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(m(forward_ad.make_dual(x, t))).tangent)
    assert_close("tangent", found[1], found[0])


UNITS = "test_double_backward.py::test_gradgradcheck"


@workflow(
    "gradgradcheck",
    "gradgradcheck, float64",
    GROUP,
    but={"own": elsewhere(f"{UNITS}[train]", remark="units, sites and the head by themselves")},
)
def check_second(s: Subject) -> None:
    """Of a convolution's weight in the first unit, through all that comes after it."""
    model = s.pair(training=False)[1]
    x = s.image(1)
    name = next(n for n, p in model.named_parameters() if p.dim() == 4 and p.shape[1] > 4)
    weight = dict(model.named_parameters())[name].detach().clone().requires_grad_()

    def function(weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, {name: weight}, (x,))
        return y.square().sum()

    assert gradgradcheck(function, (weight,), fast_mode=True)


@workflow("jit-trace", "torch.jit.trace", GROUP, outcome=NOT_FUSED)
def jit_trace(s: Subject) -> None:
    plain, model = s.pair(training=False)
    x = s.image()
    traced = torch.jit.trace(model, x, check_trace=False)
    graphs = [t.inlined_graph for t in (torch.jit.trace(plain, x, check_trace=False), traced)]
    kinds = [{n.kind() for n in graph.nodes()} for graph in graphs]
    assert kinds[0] == kinds[1]
    assert_close("output", traced(x), plain(x))


@workflow("fx", "torch.fx.symbolic_trace", GROUP, outcome=NOT_FUSED)
def symbolic_trace(s: Subject) -> None:
    x = s.image()
    for training in (True, False):
        plain, model = s.pair(training)
        traced = [fx.symbolic_trace(m) for m in (plain, model)]
        operations = [[(n.op, str(n.target)) for n in t.graph.nodes] for t in traced]
        assert operations[0] == operations[1]
    assert_close("output", traced[1](x), plain(x))
