"""What is noticed at the next call of a fused model: hooks and changes of its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import (
    ALL,
    Block,
    assert_close,
    assert_same,
    assert_same_step,
    awkward,
    counts,
    image,
    net,
    pair,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fused_preact import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


# --- hooks -----------------------------------------------------------------------------------------------


def _count(calls: list[str], name: str) -> Callable[..., None]:
    return lambda *_: calls.append(name)


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward_pre": lambda m, f: m.register_forward_pre_hook(f),
    "forward with kwargs": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward_pre": lambda m, f: m.register_full_backward_pre_hook(f),
}
PLACES = [
    "",
    "layer",
    "layer.0",
    "layer.1",
    "layer.0.bn1",
    "layer.0.conv2",
    "layer.1.shortcut",
    "layer.0.drop",
]
PLACES += ["relu", "bn", "pool", "stem", "fc"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_as_often_and_leave_no_trace(kind: str, place: str) -> None:
    plain, model = pair(net())
    assert_same(plain, model)
    calls: tuple[list[str], list[str]] = [], []
    handles = [
        HOOKS[kind](m.get_submodule(place), _count(c, kind))
        for m, c in zip((plain, model), calls, strict=True)
    ]
    for _ in range(2):
        assert_same(plain, model, None)
    assert calls[0] == calls[1]
    assert len(calls[0]) == 2
    for handle in handles:
        handle.remove()
    assert_same(plain, model)
    assert len(calls[1]) == 2


@pytest.mark.parametrize("place", ["layer.0", "layer.0.bn1", "layer.1", "relu"])
def test_hooks_may_replace_the_output(place: str) -> None:
    plain, model = pair(net())
    model(image()), plain(image())
    for m in (plain, model):
        m.get_submodule(place).register_forward_hook(lambda m, x, y: y * 1.5)
    model.load_state_dict(plain.state_dict())
    assert_same(plain, model, None)


def test_a_hook_on_a_child_leaves_other_units_fused() -> None:
    model = fuse(net())
    model.layer[0].conv1.register_forward_hook(_count([], ""))
    assert counts(model, image()) == (4, 2, 1)


def test_hooks_that_were_there_before() -> None:
    model = net()
    calls: list[str] = []
    handle = model.layer[0].register_forward_hook(_count(calls, "block"))
    other = model.layer[1].bn2.register_forward_hook(_count(calls, "norm"))
    plain, model = copy.deepcopy(model), fuse(model)
    assert counts(model, image()) == (4, 2, 1)
    assert calls == ["block", "norm"]
    handle.remove(), other.remove()
    assert counts(model, image()) == ALL
    del plain


def test_global_hooks_see_every_call() -> None:
    plain, model = pair(net())
    seen: list[list[str]] = []
    for m in (plain, model):
        seen.append([])
        names = {module: name for name, module in m.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, names=names: seen[-1].append(names[module])
        )
        try:
            m(image())
        finally:
            handle.remove()
    assert seen[0] == seen[1]
    assert counts(model, image()) == ALL


# --- changes ---------------------------------------------------------------------------------------------


class Halved(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class HalvedInside(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args) / 2


class LoudNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _set(path: str, value: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path) if path in dict(model.named_modules()) else model
        setattr(model.get_submodule(parent), name, value(old))

    return change


def _like(cls: type[nn.Conv2d]) -> Callable[[nn.Module], nn.Module]:
    def make(old: Any) -> nn.Module:
        new = cls(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
        new.weight = old.weight
        return new

    return make


def _norm(old: Any) -> nn.Module:
    torch.manual_seed(1)
    return awkward(nn.Sequential(nn.BatchNorm2d(old.num_features, eps=0.1, momentum=0.5)))[0]


def _loud(old: Any) -> nn.Module:
    new = LoudNorm(old.num_features)
    new.load_state_dict(old.state_dict())
    return new.double()


def _replaced_forward(model: Any) -> None:
    child = model.layer[0].bn1
    child.forward = lambda x: F.instance_norm(x)


def _replaced_inner(model: Any) -> None:
    child = model.layer[0].conv1
    child._conv_forward = lambda x, w, b: F.conv2d(x, w * 2, b, padding=1)


def _replaced_check(model: Any) -> None:
    model.layer[0].bn1._check_input_dim = lambda x: None


def _owner_forward(model: Any) -> None:
    block = model.layer[0]
    block.forward = lambda x: type(block).forward(block, x) * 2


def _circular(model: Any) -> None:
    model.layer[0].conv1.padding_mode = "circular"
    model.layer[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _class_of_instance(model: Any) -> None:
    model.layer[0].conv1.__class__ = Halved


def _weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.layer[0].conv1)


def _spectral_norm(model: Any) -> None:
    torch.manual_seed(2)
    parametrizations.spectral_norm(model.layer[0].conv1)


def _old_weight_norm(model: Any) -> None:
    torch.nn.utils.weight_norm(model.layer[0].conv1)


def _without_projection(model: Any) -> None:
    model.layer[1].shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 8, 1, bias=False).double())
    torch.manual_seed(3)
    nn.init.normal_(model.layer[1].shortcut[1].weight)


def _appended(model: Any) -> None:
    torch.manual_seed(3)
    model.layer.append(awkward(Block(8, 8)))


def _no_drop(model: Any) -> None:
    model.layer[0].drop = nn.Identity()


def _parameter_gone(model: Any) -> None:
    model.layer[0].conv2.bias = None


def _no_affine(model: Any) -> None:
    model.layer[0].bn1.weight = model.layer[0].bn1.bias = None


def _untracked(model: Any) -> None:
    bn = model.layer[0].bn1
    bn.track_running_stats, bn.running_mean, bn.running_var, bn.num_batches_tracked = False, None, None, None


def _stride(model: Any) -> None:
    model.layer[1].conv1.stride = (1, 1)
    model.layer[1].shortcut.stride = (1, 1)


CHANGES: dict[str, tuple[Callable[[Any], None], tuple[int, int, int]]] = {
    "another norm": (_set("layer.0.bn1", _norm), ALL),
    "another convolution": (_set("layer.0.conv1", _like(nn.Conv2d)), ALL),
    "group norm": (_set("layer.0.bn1", lambda old: nn.GroupNorm(2, 6).double()), (4, 2, 1)),
    "identity for a norm": (_set("layer.0.bn2", lambda old: nn.Identity()), (4, 1, 1)),
    "a norm with a forward of its own": (_set("layer.0.bn1", _loud), (4, 2, 1)),
    "a convolution with a forward of its own": (_set("layer.0.conv1", _like(Halved)), (4, 2, 1)),
    "a convolution with a _conv_forward of its own": (_set("layer.0.conv1", _like(HalvedInside)), (4, 2, 1)),
    "another class": (_class_of_instance, (4, 2, 1)),
    "forward replaced on a norm": (_replaced_forward, (4, 2, 1)),
    "_conv_forward replaced": (_replaced_inner, (4, 2, 1)),
    "_check_input_dim replaced": (_replaced_check, (4, 2, 1)),
    "forward replaced on a block": (_owner_forward, (3, 1, 1)),
    "circular padding": (_circular, (4, 2, 1)),
    "weight_norm": (_weight_norm, ALL),
    "spectral_norm": (_spectral_norm, ALL),
    "the old weight_norm": (_old_weight_norm, (4, 2, 1)),
    "another shortcut": (_without_projection, (3, 2, 1)),
    "a block more": (_appended, (5, 2, 1)),
    "no dropout": (_no_drop, ALL),
    "no bias": (_parameter_gone, ALL),
    "no scale and shift": (_no_affine, ALL),
    "no statistics": (_untracked, ALL),
    "stride": (_stride, ALL),
    "eps": (_set("layer.0.bn1.eps", lambda _: 0.3), ALL),
    "momentum": (_set("layer.0.bn1.momentum", lambda _: None), ALL),
    "an attribute of a block": (_set("layer.0.scale", lambda _: 0.5), (5, 1, 1)),
    "dropout": (_set("layer.0.drop.p", lambda _: 0.5), (4, 1, 1)),
    "another activation": (_set("relu", lambda _: nn.SiLU()), (5, 2, 0)),
    "another pool": (_set("pool", lambda _: nn.AdaptiveMaxPool2d(1)), (5, 2, 0)),
    "output size": (_set("pool.output_size", lambda _: (1, 1)), ALL),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name: str, training: bool) -> None:
    change, expected = CHANGES[name]
    plain, model = pair(net().train(training))
    assert_same(plain, model)
    for m in (plain, model):
        change(m)
        m.train(training)
    if name == "dropout" and not training:
        expected = ALL
    assert_same(plain, model, expected)


def test_a_change_taken_back() -> None:
    plain, model = pair(net())
    assert_same(plain, model)
    kept = model.layer[0].bn1
    model.layer[0].bn1 = nn.Identity()
    assert counts(model, image()) == (4, 2, 1)
    model.layer[0].bn1 = kept
    plain.load_state_dict(model.state_dict())
    assert_same(plain, model)
    model.layer[0].bn1.forward = kept.forward
    assert counts(model, image()) == (4, 2, 1)
    del model.layer[0].bn1.forward
    assert counts(model, image()) == ALL


def test_a_parameter_that_comes_and_goes() -> None:
    class Gained(Block):
        gain: nn.Parameter | None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.gain is None else y * self.gain

    model = awkward(Gained(6, 6))
    model.gain = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    plain, model = pair(model)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    for gain in (model.gain, None, model.gain):
        for m in (plain, model):
            m.gain = None if gain is None else nn.Parameter(gain.detach() + 1)
        assert_same_step(plain, model, x)


def test_patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair(net())
    assert_same(plain, model)
    with monkeypatch.context() as patch:
        forward = nn.BatchNorm2d.forward
        patch.setattr(nn.BatchNorm2d, "forward", lambda self, x: forward(self, x) * 2)
        assert_same(plain, model, (0, 0, 0))
    assert_same(plain, model)
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", lambda self, x: self.conv2(F.relu(self.bn2(self.conv1(x)))))
        assert_same(plain, model, (2, 0, 1))
    assert_same(plain, model)


def test_a_child_that_became_a_tensor_subclass_holder() -> None:
    class Tagged(Tensor):
        pass

    plain, model = pair(net())
    x = image().as_subclass(Tagged)
    actual = model(x)
    assert type(actual) is Tagged
    assert_close("output", actual.as_subclass(Tensor), plain(x).as_subclass(Tensor))
