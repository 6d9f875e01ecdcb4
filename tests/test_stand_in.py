"""A fused call stands in for its children only where nobody could tell: one table of cases.

What may be done to a child, in every place where calls are fused, in training and in evaluation: the numbers are
those of the same modules run one by one, and whoever listens hears as many calls.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import disturb, set_fused
from torch import Tensor, nn

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActConv2d,
    PreActSequential,
    ResidualUnit,
    inference,
    models,
    modules,
    optimize_for_inference,
    units,
)
from fused_preact.models import network
from fused_preact.modules import Stem

pytestmark = pytest.mark.usefixtures("exact_float32")

Heard = Callable[[], None]
Change = Callable[[nn.Module, str, Heard, contextlib.ExitStack], None]
"""Does something to the child of that name; calls ``Heard`` when the child is called; the stack undoes it."""


# --- what may be done -----------------------------------------------------------------------------------------


def _put(make: Callable[[Any, Heard], nn.Module]) -> Change:
    """Another module in the child's place."""

    def change(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
        child = getattr(owner, name)
        new = make(child, heard)
        new.train(child.training)
        setattr(owner, name, new)

    return change


def _hook(register: str) -> Change:
    def change(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
        handle = getattr(getattr(owner, name), register)(lambda *args: heard())
        stack.callback(handle.remove)

    return change


def _global_hook(register: str) -> Change:
    def change(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
        kind = type(getattr(owner, name))

        def hook(module: nn.Module, *args: Any) -> None:
            if type(module) is kind:
                heard()

        handle = getattr(torch.nn.modules.module, register)(hook)
        stack.callback(handle.remove)

    return change


def _patched(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    """As libraries for quantisation and adapters do: ``forward`` on the instance."""
    child: Any = getattr(owner, name)
    plain = child.forward

    def forward(x: Tensor) -> Tensor:
        heard()
        return 2 * plain(x)

    child.forward = forward


def _class_patched(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    cls: Any = type(getattr(owner, name))
    plain = cls.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        heard()
        return 2 * plain(self, x)

    had = "forward" in vars(cls)
    cls.forward = forward
    stack.callback(lambda: setattr(cls, "forward", plain) if had else delattr(cls, "forward"))


def _replaced(method: str, where: str) -> Change:
    """What ``forward`` or the call itself is made of, on the instance, its class or all modules."""

    def change(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
        child: Any = getattr(owner, name)
        holder: Any = {"instance": child, "class": type(child), "modules": nn.Module}[where]
        plain, kind = getattr(holder, method), type(child)

        def call(*args: Any) -> Any:
            if where != "instance" and type(args[0]) is not kind:
                return plain(*args)
            heard()
            result = plain(*args)
            return None if result is None else 2 * result

        had = method in vars(holder)
        setattr(holder, method, call)
        stack.callback(lambda: setattr(holder, method, plain) if had else delattr(holder, method))

    return change


def _other_hooks(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    """Another dictionary of hooks, as one gets rid of all hooks at once."""
    child = getattr(owner, name)
    child._forward_hooks = collections.OrderedDict()
    child.register_forward_hook(lambda module, args, y: (heard(), 2 * y)[1])


def _call_patched(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    kind, plain = type(getattr(owner, name)), nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self) is kind:
            heard()
        return plain(self, *args, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    stack.callback(lambda: setattr(nn.Module, "__call__", plain))


def _compiled(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    """``child.compile()`` replaces the call; the backend stands for whatever a compiler does."""

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            heard()
            return graph(*args)

        return run

    getattr(owner, name).compile(backend=backend)


class _Frozen(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _Renamed(nn.BatchNorm2d):
    """A subclass that computes what its parent does."""


class _Any(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        input.data = 2 * input.data


class _Called(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def _like(bn: Any, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    new = kind(bn.num_features)
    new.load_state_dict(bn.state_dict())
    return new


class _Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Convolved(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class _Property(nn.Conv2d):
    """A property before the parameter of its name."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return 2 * self._parameters["weight"]

    def reset_parameters(self) -> None:
        nn.init.normal_(self._parameters["weight"], std=0.1)


class _SameConv(nn.Conv2d):
    """A subclass that computes what its parent does."""


def _conv_like(conv: Any, kind: Any = nn.Conv2d, **kwargs: Any) -> nn.Conv2d:
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
    arguments = {"padding": conv.padding, "bias": conv.bias is not None, **kwargs}
    return kind(*sizes, **arguments)


def _sized_like(conv: Any, kernel: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(conv.in_channels, conv.out_channels, kernel, bias=conv.bias is not None, **kwargs)


class _Adapted(nn.Module):
    """A wrapped convolution, as low-rank adapters are."""

    def __init__(self, conv: Any, heard: Heard) -> None:
        super().__init__()
        self.conv, self.down, self.heard = conv, _conv_like(conv), heard

    def forward(self, x: Tensor) -> Tensor:
        self.heard()
        return self.conv(x) + 0.5 * self.down(x)


def _set(**attributes: Any) -> Change:
    """A switch set after construction."""

    def change(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
        for attribute, value in attributes.items():
            setattr(getattr(owner, name), attribute, value)

    return change


def _shadowed(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    """An attribute of the instance before the parameter of its name."""
    child: Any = getattr(owner, name)
    child.__dict__["weight"] = 2 * child.weight.detach()


def _parametrised(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    torch.nn.utils.parametrizations.weight_norm(getattr(owner, name))


def _pruned(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(getattr(owner, name), "weight", 0.5)


def _function(owner: nn.Module, name: str, heard: Heard, stack: contextlib.ExitStack) -> None:
    """No module at all."""
    child: Any = getattr(owner, name)
    delattr(owner, name)

    def call(x: Tensor) -> Tensor:
        heard()
        return 2 * child(x)

    setattr(owner, name, call)


ANY: dict[str, Change] = {
    "function": _function,
    "forward-hook": _hook("register_forward_hook"),
    "forward-pre-hook": _hook("register_forward_pre_hook"),
    "backward-hook": _hook("register_full_backward_hook"),
    "backward-pre-hook": _hook("register_full_backward_pre_hook"),
    "global-forward-hook": _global_hook("register_module_forward_hook"),
    "global-forward-pre-hook": _global_hook("register_module_forward_pre_hook"),
    "global-backward-hook": _global_hook("register_module_full_backward_hook"),
    "global-backward-pre-hook": _global_hook("register_module_full_backward_pre_hook"),
    "forward-on-the-instance": _patched,
    "forward-on-the-class": _class_patched,
    "call-of-all-modules": _call_patched,
    "call-on-the-class": _replaced("__call__", "class"),
    "inner-call-of-all-modules": _replaced("_call_impl", "modules"),
    "inner-call-on-the-class": _replaced("_call_impl", "class"),
    "inner-call-on-the-instance": _replaced("_call_impl", "instance"),
    "other-hooks": _other_hooks,
    "compiled": _compiled,
    "sequential": _put(lambda child, heard: nn.Sequential(child)),
    "identity": _put(lambda child, heard: nn.Identity()),
}
NORM: dict[str, Change] = {
    "group-norm": _put(lambda bn, heard: nn.GroupNorm(1, bn.num_features)),
    "instance-norm": _put(lambda bn, heard: nn.InstanceNorm2d(bn.num_features)),
    "frozen": _put(lambda bn, heard: _like(bn, _Frozen)),
    "check-overridden": _put(lambda bn, heard: _like(bn, _Any)),
    "check-on-the-class": _replaced("_check_input_dim", "class"),
    "check-on-the-instance": _replaced("_check_input_dim", "instance"),
    "call-overridden": _put(lambda bn, heard: _like(bn, _Called)),
}
NORM_FUSED: dict[str, Change] = {
    "shadowed": _shadowed,
    "subclass": _put(lambda bn, heard: _like(bn, _Renamed)),
    "lazy": _put(lambda bn, heard: nn.LazyBatchNorm2d()),  # fused from the second call on
    "not-tracking": _set(track_running_stats=False),
    "no-buffers": _set(running_mean=None, running_var=None),
    "no-counter": _set(num_batches_tracked=None),
    "cumulative": _set(momentum=None),
    "cumulative-without-counter": _set(momentum=None, num_batches_tracked=None),
    "no-momentum": _set(momentum=0.0),
    "eps": _set(eps=0.5),
    "evaluating": lambda owner, name, heard, stack: getattr(owner, name).eval(),
    "training": lambda owner, name, heard, stack: getattr(owner, name).train(),
    "no-weight": _set(weight=None),
}
CONV: dict[str, Change] = {
    "standardised": _put(lambda conv, heard: _conv_like(conv, _Standardised)),
    "convolve-overridden": _put(lambda conv, heard: _conv_like(conv, _Convolved)),
    "convolve-on-the-class": _replaced("_conv_forward", "class"),
    "convolve-on-the-instance": _replaced("_conv_forward", "instance"),
    "wrapped": _put(lambda conv, heard: _Adapted(conv, heard)),
    "reflected": _put(lambda conv, heard: _conv_like(conv, padding_mode="reflect")),
    "reflected-later": _set(padding_mode="circular"),
    "same-uneven": _put(lambda conv, heard: _sized_like(conv, (2, 4), padding="same")),
    "pruned": _pruned,
}
CONV_FUSED: dict[str, Change] = {
    "shadowed": _shadowed,
    "subclass": _put(lambda conv, heard: _conv_like(conv, _SameConv)),
    "property": _put(lambda conv, heard: _conv_like(conv, _Property)),
    "weight-norm": _parametrised,
    "bias": _put(lambda conv, heard: _conv_like(conv, bias=True)),
    "same": _put(lambda conv, heard: _sized_like(conv, (3, 2), padding="same", dilation=(1, 2))),
    "valid": _put(lambda conv, heard: _sized_like(conv, 1, padding="valid")),
}
SHORTCUT: dict[str, Change] = {
    "average": _put(lambda conv, heard: nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(6, 9, 1))),
    "normalised": _put(lambda conv, heard: nn.Sequential(conv, nn.BatchNorm2d(9))),
    "wrapped": _put(lambda conv, heard: _Adapted(conv, heard)),
}
SHORTCUT_FUSED: dict[str, Change] = {"nothing": lambda owner, name, heard, stack: None}


# --- where ------------------------------------------------------------------------------------------------------


def _tiny() -> nn.Module:
    torch.manual_seed(3)
    stages = [PreActSequential(PreActBasicBlock(6, 8, 2), PreActBasicBlock(8, 8))]
    return network.PreActResNet(Stem(nn.Conv2d(6, 6, 3, padding=1)), stages, 8, 5, True)


def _row() -> nn.Module:
    return PreActSequential(
        PreActBasicBlock(6, 9, 2), PreActSequential(PreActBottleneck(9, 12), PreActBasicBlock(12, 12))
    )


PLACES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], tuple[nn.Module, str]], str]] = {
    "site-bn": (lambda: PreActConv2d(6, 6, 3, padding=1), lambda m: (m, "bn"), "bn"),
    "site-conv": (lambda: PreActConv2d(6, 6, 3, padding=1, bias=False), lambda m: (m, "conv"), "conv"),
    "unit-first-bn": (lambda: PreActBasicBlock(6, 9, 2), lambda m: (m, "bn1"), "bn"),
    "unit-last-conv": (lambda: PreActBottleneck(6, 12), lambda m: (m, "conv3"), "conv-1x1"),
    "unit-shortcut": (lambda: PreActBasicBlock(6, 9, 2), lambda m: (m, "shortcut"), "shortcut"),
    "unit-padding": (lambda: PreActBasicBlock(6, 9, 2, shortcut="A"), lambda m: (m, "shortcut"), "padding"),
    "residual-bn": (lambda: ResidualUnit(6, 6), lambda m: (m, "bn1"), "bn"),
    "residual-conv": (lambda: ResidualUnit(6, 6, order="bn_after_addition"), lambda m: (m, "conv2"), "conv"),
    "sequence-bn": (_row, lambda m: (m[1][0], "bn2"), "bn"),
    "sequence-conv": (_row, lambda m: (m[1][1], "conv1"), "conv"),
    "head": (_tiny, lambda m: (m, "bn"), "bn"),
}
_CHANGES = {
    "bn": ({**ANY, **NORM}, NORM_FUSED),
    "conv": ({**ANY, **CONV}, CONV_FUSED),
    "conv-1x1": (
        {k: v for k, v in {**ANY, **CONV}.items() if not k.startswith(("reflected", "identity"))},
        CONV_FUSED,
    ),
    "shortcut": ({**{k: v for k, v in ANY.items() if k != "identity"}, **SHORTCUT}, SHORTCUT_FUSED),
    "padding": ({k: v for k, v in ANY.items() if k != "identity"}, SHORTCUT_FUSED),
}
CASES = [
    pytest.param(place, change, fused, id=f"{place}-{name}")
    for place, (_, _, kind) in PLACES.items()
    for fused, changes in zip((False, True), _CHANGES[kind], strict=True)
    for name, change in changes.items()
    if (place, name) not in {("unit-last-conv", "standardised")}
]


def run(module: nn.Module, grad: bool) -> dict[str, Tensor]:
    """Two calls, with their backward; what they gave and what they left in the buffers."""
    torch.manual_seed(5)
    found: dict[str, Tensor] = {}
    for call in range(2):
        x = torch.randn(3, 6, 8, 6) + 0.3
        if not grad:
            found[f"y{call}"] = module(x)
            continue
        x.requires_grad_()
        y = module(x)
        y.backward(torch.randn(y.shape))
        found |= {f"y{call}": y.detach(), f"dx{call}": x.grad}
    found |= {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def made(place: str, change: Change, fused: bool, training: bool, stack: Any, after: Any = None) -> Any:
    """The module with the change done to it, and the list that grows as its child is called."""
    build, find, _ = PLACES[place]
    torch.manual_seed(1)
    torch._dynamo.reset()
    module = set_fused(disturb(build()), fused).train(training)
    if after is not None:
        after(module)
    calls: list[int] = []
    torch.manual_seed(2)
    change(*find(module), lambda: calls.append(1), stack)
    return module, calls


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every fused call of a module."""
    calls: list[str] = []
    for holder, name in (
        (modules, "residual_unit"),
        (modules, "preact_site"),
        (units, "preact_chain"),
        (network, "bn_relu_avg_pool2d"),
        (inference, "run_chain"),
    ):
        function = getattr(holder, name)

        def call(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)
    return calls


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as undo:
        yield undo


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("place", "change", "fused"), CASES)
def test_children(place: str, change: Change, fused: bool, training: bool, fused_calls: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        plain, plain_calls = made(place, change, False, training, stack)
        expected = run(plain, True)
        assert not fused_calls
    with contextlib.ExitStack() as stack:
        module, calls = made(place, change, True, training, stack)
        found = run(module, True)
    same(found, expected)
    assert len(calls) == len(plain_calls)
    if fused:
        assert fused_calls, "still fused"
        assert "bn_relu_avg_pool2d" in fused_calls or place != "head"
    elif place.startswith(("site", "unit", "residual")):
        assert not fused_calls


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("place", "change"),
    [case.values[:2] for case in CASES if case.values[0].startswith("sequence")],
    ids=[case.id for case in CASES if case.values[0].startswith("sequence")],
)
def test_folded(place: str, change: Change, when: str, stack: Any) -> None:
    """The change before ``optimize_for_inference``, or after it and a call with the old children."""
    with contextlib.ExitStack() as undo, torch.no_grad():
        plain, plain_calls = made(place, change, False, False, undo)
        expected = run(plain, False)

    def optimise(module: nn.Module) -> None:
        optimize_for_inference(module)(torch.randn(2, 6, 8, 6))

    with torch.no_grad():
        module, calls = made(place, change, True, False, stack, optimise if when == "after" else None)
        if when == "before":
            optimize_for_inference(module)
        found = run(module, False)
    same(found, expected)
    assert len(calls) == len(plain_calls)


@pytest.mark.parametrize("change", ["forward-hook", "forward-on-the-instance", "global-forward-hook"])
def test_folded_stem(change: str) -> None:
    results = []
    for optimise in (False, True):
        torch.manual_seed(0)
        net = models.preact_resnet18(4).eval()
        calls: list[int] = []
        with torch.no_grad(), contextlib.ExitStack() as undo:
            x = torch.randn(1, 3, 32, 32)
            if optimise:
                optimize_for_inference(net)(x)
            ANY[change](net.stem, "0", lambda calls=calls: calls.append(1), undo)
            results.append((net(x), len(calls)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    assert results[0][1] == results[1][1] > 0


# --- units and sequences that do something else ------------------------------------------------------------------


class Halved(PreActBasicBlock):
    """As stochastic depth and layer scale do it; with a parameter of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class Reversed(PreActSequential):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def _wrap(kind: Any) -> Callable[[], nn.Module]:
    return lambda: PreActSequential(PreActBasicBlock(6, 6), kind(), PreActBasicBlock(6, 6))


def _unit_patched() -> nn.Module:
    unit: Any = PreActBasicBlock(6, 6)
    plain = unit.forward
    unit.forward = lambda x: 0.5 * plain(x)
    return unit


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, y: 0.5 * y)
    return module


WRAPPED = {
    "unit-hooked": _wrap(lambda: _hooked(PreActBasicBlock(6, 6))),
    "sequence-hooked": _wrap(lambda: _hooked(PreActSequential(PreActBasicBlock(6, 6)))),
    "unit-subclass": _wrap(lambda: Halved(6, 6)),
    "unit-instance": _wrap(_unit_patched),
    "sequence-subclass": _wrap(lambda: Reversed(PreActBasicBlock(6, 6))),
    "foreign": _wrap(lambda: nn.Sequential(PreActBasicBlock(6, 6), nn.Tanh())),
}


@pytest.mark.parametrize("mode", ["train", "eval", "folded"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_units(wrapped: str, fused: bool, mode: str) -> None:
    """As ``nn.Sequential`` of the same modules; its own parameters get their gradient."""
    torch.manual_seed(1)
    module: Any = set_fused(disturb(WRAPPED[wrapped]()), fused).train(mode == "train")
    if mode == "folded":
        optimize_for_inference(module)
        with torch.no_grad():
            found = run(module, False)
            fused_preact.undo_optimize_for_inference(module)
            same(found, run(nn.Sequential(*set_fused(module, False)), False) | _buffers(module))
        return
    state = {k: v.clone() for k, v in module.state_dict().items()}
    found = run(module, True)
    module.load_state_dict(state)
    module.zero_grad()
    same(found, run_as_sequence(set_fused(module, False)))


@pytest.mark.parametrize("when", ["plain", "fused", "folded-before", "folded-after"])
@pytest.mark.parametrize("patched", ["unit", "sequence"])
def test_forwards_patched_on_our_classes(patched: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row: Any = disturb(PreActSequential(PreActSequential(PreActBasicBlock(6, 6)))).eval()
    set_fused(row, when != "plain")
    x = torch.randn(2, 6, 5, 5)
    cls: Any = PreActSequential if patched == "sequence" else modules._PreActUnit
    forward = cls.forward
    with torch.no_grad():
        expected = row(x)
        if when == "folded-after":
            optimize_for_inference(row)(x)
        monkeypatch.setattr(cls, "forward", lambda self, x: 2 * forward(self, x))
        if when == "folded-before":
            optimize_for_inference(row)
        torch.testing.assert_close(row(x), expected * (4 if patched == "sequence" else 2))


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers())


def run_as_sequence(module: Any) -> dict[str, Tensor]:
    return run(nn.Sequential(*module), True)


@pytest.mark.parametrize("mode", ["train", "eval", "folded"])
def test_global_hooks_hear_every_module(mode: str) -> None:
    """In the order of the plain model's calls, units and sequences too."""
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        net = set_fused(disturb(_tiny()), fused).train(mode == "train")
        names = {module: name for name, module in net.named_modules()}
        heard: list[str] = []
        x = torch.randn(3, 6, 8, 6)
        with torch.set_grad_enabled(mode == "train"):
            if mode == "folded" and fused:
                optimize_for_inference(net)(x)
            handle = nn.modules.module.register_module_forward_pre_hook(
                lambda module, args, heard=heard, names=names: heard.append(names[module])
            )
            net(x)
        handle.remove()
        found.append(heard)
    assert found[0] == found[1]
    assert len(found[0]) == len(names)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_missing_weight_is_an_attribute_error(fused: bool) -> None:
    for child in ("bn", "conv"):
        site = PreActConv2d(6, 6, 3, fused=fused)
        del getattr(site, child).weight
        with pytest.raises(AttributeError, match="weight"):
            site(torch.randn(2, 6, 5, 5))


# --- transforms and tracers ---------------------------------------------------------------------------------------


NETS = {
    "site": lambda: PreActConv2d(6, 6, 3, padding=1),
    "unit": lambda: PreActBasicBlock(6, 9, 2),
    "net": _tiny,
}


def _plain_and_fused(name: str, training: bool = False) -> list[nn.Module]:
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        found.append(set_fused(disturb(NETS[name]()), fused).train(training))
    return found


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(lambda t: f(t[None]))(x),
    "forward-mode": lambda f, x: _forward_mode(f, x),
    "hvp": lambda f, x: torch.func.jvp(torch.func.grad(lambda t: f(t).square().sum()), (x,), (x,))[1],
    "jit-trace": lambda f, x: torch.jit.trace(f, x, check_trace=False)(x),
    "fx": lambda f, x: torch.fx.symbolic_trace(f)(x),
}


def _forward_mode(f: Any, x: Tensor) -> Tensor:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "transform", "optimised"),
    [
        pytest.param(name, transform, optimised, id=f"{name}-{transform}{'-optimised' * optimised}")
        for name in NETS
        for transform in TRANSFORMS
        for optimised in (False, True)
        # A site has nothing to fold, and symbolic tracing of its optional argument fails plain too.
        if name != "site" or not (optimised or transform == "fx")
    ],
)
def test_transforms(name: str, transform: str, optimised: bool) -> None:
    plain, fused = _plain_and_fused(name)
    x = torch.randn(3, 6, 8, 6)
    if optimised:
        with torch.no_grad():
            optimize_for_inference(fused)(x)
    torch.testing.assert_close(
        TRANSFORMS[transform](fused, x), TRANSFORMS[transform](plain, x), rtol=1e-3, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", ["forward-mode", "jit-trace", "fx"])
def test_transforms_in_training(transform: str) -> None:
    plain, fused = _plain_and_fused("net", training=True)
    x = torch.randn(3, 6, 8, 6)
    torch.testing.assert_close(
        TRANSFORMS[transform](fused, x), TRANSFORMS[transform](plain, x), rtol=1e-3, atol=1e-3
    )
    for (key, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("name", NETS)
def test_make_fx_keeps_the_operations(name: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    module = _plain_and_fused(name)[1].requires_grad_(False)
    x = torch.randn(3, 6, 8, 6)
    traced = make_fx(module)(x)
    called = {str(node.target) for node in traced.graph.nodes}
    assert any(target.startswith("fused_preact.conv_fprop") for target in called)
    assert "aten.relu.default" not in called
    torch.testing.assert_close(traced(x), module(x))


def test_functions_under_transforms() -> None:
    """Without modules too: PyTorch's own operations serve."""
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    mean, var = torch.randn(4), torch.rand(4) + 0.5

    def ours(t: Tensor) -> Tensor:
        return fused_preact.functional.preact_conv2d(t, weight, running_mean=mean, running_var=var)

    def plain(t: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.batch_norm(t, mean, var)), weight)

    def our_head(t: Tensor) -> Tensor:
        bn = fused_preact.functional.BatchNorm(running_mean=mean, running_var=var)
        return fused_preact.functional.bn_relu_avg_pool2d(t, bn)

    def plain_head(t: Tensor) -> Tensor:
        return F.relu(F.batch_norm(t, mean, var)).mean((2, 3))

    for name in ("grad", "jvp", "vmap", "forward-mode"):
        for f, g in ((ours, plain), (our_head, plain_head)):
            torch.testing.assert_close(TRANSFORMS[name](f, x), TRANSFORMS[name](g, x), rtol=1e-3, atol=1e-3)


class Tagged(Tensor):
    """A tensor subclass that hears the operations made with it."""

    heard: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("where", ["input", "weight"])
def test_tensor_subclasses_keep_their_operations(where: str) -> None:
    site = PreActConv2d(4, 4, 1).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = site(x)
    if where == "input":
        x = x.as_subclass(Tagged)
    else:
        weight = site.conv.weight.detach().as_subclass(Tagged)
        del site.conv.weight
        site.conv.weight = weight
    Tagged.heard.clear()
    y = site(x)
    assert "conv2d" in Tagged.heard
    torch.testing.assert_close(y.as_subclass(Tensor), expected)


# --- batches and checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", NETS)
def test_empty_batch_changes_no_statistics(name: str, momentum: float | None) -> None:
    buffers = []
    for module in _plain_and_fused(name, training=True):
        for bn in module.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.momentum = momentum
        module(torch.empty(0, 6, 8, 6))
        buffers.append(dict(module.named_buffers()))
    for key, value in buffers[0].items():
        assert torch.equal(buffers[1][key], value), key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_value_per_channel(training: bool) -> None:
    for fused in (True, False):
        site = PreActConv2d(4, 4, 1, track_running_stats=False, fused=fused).train(training)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            site(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("segments", [1, 2])
def test_checkpoints_update_statistics_once(reentrant: bool, segments: int) -> None:
    """As without a checkpoint, fused and plain; ``torch.nn.BatchNorm2d`` alone would count the batch twice."""
    from torch.utils.checkpoint import checkpoint_sequential

    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        row = PreActSequential(*(PreActBasicBlock(6, 6) for _ in range(4)))
        row = set_fused(disturb(row), fused).train()
        direct = copy.deepcopy(row)
        x = torch.randn(2, 6, 5, 5, requires_grad=True)
        checkpoint_sequential(row, segments, x, use_reentrant=reentrant).sum().backward()
        assert x.grad is not None
        found.append({"dx": x.grad, **dict(row.named_buffers())})
        x.grad = None
        direct(x).sum().backward()
        same(found[-1], {"dx": x.grad, **dict(direct.named_buffers())})
    same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_a_network(reentrant: bool) -> None:
    """Head and site too, and a converted model's fused sites."""
    from torch.utils.checkpoint import checkpoint

    for fused in (True, False):
        net = set_fused(disturb(_tiny()), fused).train()
        x = torch.randn(2, 6, 8, 6, requires_grad=True)
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
        site = PreActConv2d(6, 6, 3, fused=fused)
        checkpoint(site, x, use_reentrant=reentrant).sum().backward()
        norms = [m for part in (net, site) for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {int(bn.num_batches_tracked) for bn in norms} == {1}
    plain = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3))
    model: Any = fused_preact.fuse(plain)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert int(model[0].num_batches_tracked) == 1
