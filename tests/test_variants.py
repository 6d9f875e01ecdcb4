"""Units of every order, shortcut and body (Figs. 2 and 4) beside the same written from the figures."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import paper_units
import pytest
import torch
from helpers import BACKENDS, COMPILED, assert_within_policy, disturb, set_fused
from torch import Tensor, nn

import fused_preact
from fused_preact import PreActBottleneck, PreActSequential, ResidualUnit
from fused_preact.convert import explain
from fused_preact.functional import Convolution, conv2d_with_statistics
from fused_preact.modules import IdentityProjection
from fused_preact.units import BODIES, ORDERS, Shortcut, ShortcutDropout, make_unit

pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")

KINDS = (
    *("A", "B", "scaling:0:1", "scaling:0.5:1", "scaling:0.5:0.5", "exclusive_gating:-1"),
    *("shortcut_gating:-2", "conv", "dropout:0.5"),
)
SHAPES = {"keeps": (8, 8, 1), "shrinks": (8, 12, 2), "widens": (4, 8, 1)}
# The worst of few elements' errors says little: in float32 there are more.
WIDER = {"wide-keeps": (32, 32, 1), "wide-shrinks": (32, 48, 2)}
SHAPES |= WIDER


def case(order: str, kind: str, body: str, shape: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    module = make_unit(*SHAPES[shape], order=order, shortcut=kind, body=body, **options)
    return disturb(module)


def image(shape: str) -> Tensor:
    return torch.randn(3, SHAPES[shape][0], 7, 6, generator=torch.Generator().manual_seed(3))


def run(module: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of one call."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(7)
    y = module(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {n: b for n, b in module.named_buffers() if n.endswith(("mean", "var"))}


def from_the_figures(module: nn.Module, x: Tensor, dy: Tensor, **how: Any) -> dict[str, Tensor]:
    """The same of :mod:`paper_units`, with gradients by autograd."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    state = {n: b.clone() for n, b in module.named_buffers()} | leaves
    x = x.detach().clone().requires_grad_()
    p = paper_units.Tensors(state, module.training)
    torch.manual_seed(7)
    y = paper_units.unit(p, x, **how)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    kept = {n: b for n, b in state.items() if n.endswith(("running_mean", "running_var"))}
    return found | kept | p.tracked


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        size = expected[name].abs().max().clamp_min(1.0)
        error = ((tensor - expected[name]).abs().max() / size).item()
        assert error < 1e-12, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_units_are_those_of_the_figures(order: str, kind: str, body: str) -> None:
    """Outputs, gradients of the input and all parameters, running statistics in float64; fused and plain."""
    for shape, first, training in itertools.product(
        ("keeps", "shrinks", "widens"), (False, True), (True, False)
    ):
        if first and shape != "keeps":
            continue
        how = {"order": order, "kind": kind, "body": body, "stride": SHAPES[shape][2], "first": first}
        on_1x1 = not training
        plain = case(order, kind, body, shape, first=first, stride_on_1x1=on_1x1).double().train(training)
        set_fused(plain, False)
        fused = set_fused(copy.deepcopy(plain), True)
        x = image(shape).double()
        dy = torch.randn_like(copy.deepcopy(plain)(x))
        expected = from_the_figures(plain, x, dy, **how, stride_on_1x1=on_1x1)
        assert_same(run(fused, x, dy), expected)
        assert_same(run(plain, x, dy), expected)


def record_terms(module: nn.Module) -> dict[str, Tensor]:
    """What the gradients of biases and weights are sums of, in magnitude: a BN behind makes these sums cancel."""
    terms: dict[str, Tensor] = {}

    def record(name: str, layer: Any, dy: Tensor) -> None:
        terms[f"d{name}.bias"] = dy.abs().sum((0, 2, 3))
        if isinstance(layer, nn.Conv2d):
            shape, how = layer.weight.shape, (layer.stride, layer.padding)
            terms[f"d{name}.weight"] = torch.nn.grad.conv2d_weight(layer.read.abs(), shape, dy.abs(), *how)

    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d | nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, _: layer.__dict__.update(read=args[0].detach()))
            layer.register_full_backward_hook(lambda m, _, dy, name=name: record(name, m, dy[0]))
    return terms


def compare(module: nn.Module, x: Tensor, backend: str) -> None:
    """Fused in float32 against plain float64, by the policy of CONTRIBUTING.md."""
    plain = set_fused(module, False)
    exact, fused = copy.deepcopy(plain).double(), set_fused(copy.deepcopy(plain), True)
    dy = torch.randn_like(copy.deepcopy(plain)(x))
    with fused_preact.backend(backend):
        found = run(fused, x, dy)
    terms = record_terms(exact)
    eager, oracle = run(plain, x, dy), run(exact, x.double(), dy.double())
    assert found.keys() == oracle.keys()
    for name, tensor in found.items():
        ulps = 4 if name == "y" else 16
        assert_within_policy(name, tensor, eager[name], oracle[name], ulps=ulps, terms=terms.get(name))


@COMPILED
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("dropout")])
@pytest.mark.parametrize("order", ORDERS)
def test_fused_in_float32(order: str, kind: str) -> None:
    for body, shape in itertools.product(BODIES, WIDER):
        x = image(shape).contiguous(memory_format=torch.channels_last)
        compare(case(order, kind, body, shape), x, "cpu")


@BACKENDS
@pytest.mark.parametrize("order", ORDERS)
def test_fused_on_every_backend(backend: str, device: str, order: str) -> None:
    compare(
        case(order, "shortcut_gating:-2", "bottleneck", "keeps").to(device),
        image("keeps").to(device),
        backend,
    )


def calls_of(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sites of each fused call, negative where it added a tensor; and how many BNs ran outside of them."""
    calls: list[int] = []
    real = fused_preact.units.preact_chain

    def chain(x: Tensor, sites: Any, residual: Any = None, **rest: Any) -> Any:
        calls.append(len(sites) if residual is None else -len(sites))
        return real(x, sites, residual, **rest)

    monkeypatch.setattr(fused_preact.units, "preact_chain", chain)
    module(x)
    return calls


FUSED = [
    ("original", "A", "basic", "keeps", [1]),
    ("original", "A", "bottleneck", "keeps", [2]),
    ("original", "A", "single", "keeps", []),
    ("bn_after_addition", "A", "basic", "keeps", [-1]),
    ("bn_after_addition", "B", "bottleneck", "shrinks", [-2]),
    ("bn_after_addition", "exclusive_gating", "basic", "keeps", [1]),
    ("relu_before_addition", "A", "basic", "keeps", [1]),
    ("relu_only_preact", "A", "bottleneck", "keeps", [2]),
    ("preact", "scaling:0.5", "basic", "keeps", [-2]),
    ("preact", "scaling:0.5:0.5", "basic", "keeps", [2]),
    ("preact", "shortcut_gating", "bottleneck", "keeps", [-3]),
    ("preact", "dropout", "basic", "shrinks", [-1]),
]


@pytest.mark.parametrize(("order", "kind", "body", "shape", "calls"), FUSED)
def test_what_runs_fused(
    order: str, kind: str, body: str, shape: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every BN -> ReLU -> convolution site, in rows, and the addition where a convolution comes right before it."""
    module = case(order, kind, body, shape)
    assert calls_of(module, image(shape), monkeypatch) == calls
    rows = explain(nn.Sequential(module)).rows
    assert sum(row.fused for row in rows if row.kind == "site") == sum(map(abs, calls))
    left = [row for row in rows if row.kind == "addition"]
    assert bool(left) == (not calls or calls[-1] > 0)
    assert all(row.reason for row in rows if not row.fused)


@pytest.mark.parametrize("kind", ["A", "B", "conv"])
@pytest.mark.parametrize("body", BODIES)
def test_full_preactivation_is_one_call(body: str, kind: str) -> None:
    """What the library fuses whole stays the class that it was, and is what ResidualUnit would be."""
    for shape, first in (("keeps", False), ("keeps", True), ("shrinks", False)):
        own = case("preact", kind, body, shape, first=first).double()
        assert not isinstance(own, ResidualUnit)
        general = ResidualUnit(*SHAPES[shape], order="preact", shortcut=kind, body=body, first=first)
        general.double().load_state_dict(own.state_dict())
        x = image(shape).double()
        torch.testing.assert_close(own(x), general(x), rtol=1e-12, atol=1e-12)


def test_statistics_travel_between_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full pre-activation unit of any shortcut takes those of its input and hands on those of its output."""
    row = PreActSequential(
        PreActBottleneck(8, 8),
        ResidualUnit(8, 8, order="preact", shortcut="scaling:0.5"),
        PreActBottleneck(8, 8),
    )
    seen = []
    table = fused_preact.ops.table("reference", torch.empty(0))

    class Counting:
        replayed = None

        def __getattr__(self, name: str) -> Any:
            seen.append(name)
            return getattr(table, name)

    monkeypatch.setattr(fused_preact.ops, "table", lambda name, x: Counting())
    row(image("keeps"))
    assert seen.count("bn_stats") == 1


class Counted:
    """The reference's operations, and the names of those that were called."""

    replayed = None

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.table = fused_preact.ops.table("reference", torch.empty(0))

    def __getattr__(self, name: str) -> Any:
        self.seen.append(name)
        return getattr(self.table, name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "order", ["original", "bn_after_addition", "relu_before_addition", "relu_only_preact"]
)
def test_a_convolution_makes_the_statistics_of_the_site_behind_it(
    order: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = case(order, "A", "bottleneck", "keeps").train(training)
    counted = Counted()
    monkeypatch.setattr(fused_preact.ops, "table", lambda name, x: counted)
    monkeypatch.setattr(fused_preact.ops, "serving_backend", lambda x: "cpu")
    module(image("keeps"))
    assert "bn_stats" not in counted.seen
    # conv1, whose epilogue makes them where the batch's are asked for, and the two sites.
    convolutions = [name for name in counted.seen if name.startswith("conv_fprop")]
    assert len(convolutions) == (3 if training else 2)


@BACKENDS
def test_a_convolution_with_statistics(backend: str, device: str) -> None:
    """Against the convolution itself: values, gradients, gradients of gradients; and the statistics."""
    torch.manual_seed(4)
    conv = nn.Conv2d(20, 36, 3, 2, 1).to(device)
    x = torch.randn(3, 20, 9, 7, device=device, requires_grad=True)
    exact_x, exact_conv = x.detach().double().requires_grad_(), copy.deepcopy(conv).double()

    def found(conv: nn.Conv2d, x: Tensor, how: Any) -> dict[str, Tensor]:
        y, *made = how(conv, x)
        leaves = (x, *conv.parameters())
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        named = {"y": y, **dict(zip(("dx", "dweight", "dbias"), grads, strict=True))}
        named |= dict(zip(("ddx", "ddweight", "ddbias"), second, strict=True))
        return {n: t.detach() for n, t in named.items()} | dict(zip(("mean", "var"), made, strict=True))

    def plain(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, ...]:
        y = conv(x)
        return y, y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)

    def fused(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, ...]:
        with fused_preact.backend(backend):
            y, statistics = conv2d_with_statistics(x, Convolution.of(conv))
        return y, *(statistics or plain(conv, x)[1:])

    ours, eager, exact = (
        found(conv, x, fused),
        found(conv, x, plain),
        found(exact_conv, exact_x, plain),
    )
    for name, tensor in ours.items():
        terms = exact["var"].sqrt() + exact["mean"].abs() if name == "mean" else None
        assert_within_policy(name, tensor, eager[name].detach(), exact[name].detach(), terms=terms)
    with pytest.raises(ValueError, match=r"weight: got shape \(36, 20, 3, 3\) with groups 1"):
        conv2d_with_statistics(x[:, :3], Convolution.of(conv))


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_and_changed_children_are_respected(order: str) -> None:
    """A site with a listener, or with a child that does something else, runs child by child."""
    module = case(order, "A" if order != "preact" else "scaling:0.5", "basic", "keeps")
    plain = set_fused(copy.deepcopy(module), False)
    x, heard = image("keeps"), []
    handle = module.conv2.register_forward_hook(lambda *_: heard.append("conv2"))
    module(x)
    assert heard == ["conv2"]
    handle.remove()
    for changed in (module, plain):
        torch.manual_seed(5)
        changed.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_the_input_is_not_written_to(order: str) -> None:
    """A ReLU in place as first operation would overwrite the identity path, with no error from autograd."""
    for kind, fused in itertools.product(("A", "scaling:0.5:0.5"), (True, False)):
        module, x = set_fused(case(order, kind, "basic", "keeps"), fused), image("keeps")
        before = x.clone()
        module(x)
        assert torch.equal(x, before)


def test_checkpointed_units_update_statistics_once() -> None:
    for order in ORDERS:
        module = case(order, "conv", "basic", "keeps").double()
        twin = copy.deepcopy(module)
        x = image("keeps").double().requires_grad_()
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
        twin(x).sum().backward()
        for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), (order, name)


@pytest.mark.parametrize(
    ("order", "kind"),
    [("original", "exclusive_gating:-1"), ("bn_after_addition", "B"), ("preact", "scaling")],
)
def test_compiled_without_a_graph_break(order: str, kind: str) -> None:
    torch._dynamo.reset()
    module = case(order, kind, "basic", "shrinks").double()
    twin, x = copy.deepcopy(module), image("shrinks").double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in run(compiled, x).items()}
    assert_same(found, run(twin, x))


def test_dropout_is_not_inverted() -> None:
    """x mask in training, 0.5 x in evaluation: nn.Dropout would keep the expectation at 1."""
    x = torch.rand(4, 8, 16, 16) + 1
    dropout = ShortcutDropout(0.5)
    torch.manual_seed(0)
    y = dropout(x)
    kept = y != 0
    assert torch.equal(y[kept], x[kept])
    assert 0.45 < kept.double().mean() < 0.55
    assert torch.equal(dropout.eval()(x), 0.5 * x)


@pytest.mark.parametrize("kind", ["exclusive_gating:-6", "shortcut_gating:-6", "shortcut_gating:0"])
def test_gates(kind: str) -> None:
    """A 1x1 convolution with as many channels as F, the unit's stride, a bias that begins at b_g, and no BN."""
    unit = ResidualUnit(8, 16, 2, shortcut=kind)
    gate = unit.gate
    assert gate is not None
    assert (gate.in_channels, gate.out_channels, gate.kernel_size, gate.stride) == (8, 16, (1, 1), (2, 2))
    assert gate.bias is not None
    assert gate.bias.tolist() == [float(kind.split(":")[1])] * 16
    assert isinstance(unit.shortcut, IdentityProjection), "the gate multiplies what option A makes"


BAD = {
    "order": (lambda: ResidualUnit(8, 8, order="post"), ["order", "'post'", *ORDERS]),
    "body": (lambda: make_unit(8, 8, body="wide"), ["body", "'wide'", *BODIES]),
    "kind": (lambda: ResidualUnit(8, 8, shortcut="C"), ["shortcut", "'C'", "exclusive_gating[:gate_bias]"]),
    "number": (
        lambda: Shortcut.parse("scaling:half", "A"),
        ["scaling:half", "scaling[:on_shortcut[:on_branch]]"],
    ),
    "too-many": (lambda: Shortcut.parse("dropout:0.5:1", "A"), ["dropout:0.5:1", "dropout[:p]"]),
    "not-finite": (lambda: Shortcut.parse("scaling:nan", "A"), ["scaling:nan", "finite"]),
    "dropout": (lambda: Shortcut.parse("dropout:1", "A"), ["dropout:1", "below 1"]),
    "width": (lambda: ResidualUnit(8, 6, body="bottleneck"), ["out_channels", "6", "multiples of 4"]),
    "narrower": (lambda: ResidualUnit(8, 4, shortcut="A"), ["out_channels", "4", "8"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    call, words = BAD[bad]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - its words are looked at below
        call()
    for word in words:
        assert word in str(raised.value), raised.value
