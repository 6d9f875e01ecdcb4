"""What ``fuse`` leaves as it was, what it notices, and what then runs as it was written."""

from __future__ import annotations

import collections
import copy
import io
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import assert_close, assert_same_step, pair, seeded, step, tensors_of, watching
from helpers import COMPILED, assert_within_policy
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from fused_preact import fuse, ops, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A pre-activation unit of two sites, with a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int = 1, p: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(p)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.drop(F.relu(self.bn2(out))))
        if self.scale != 1.0:
            out = out * self.scale
        return out + shortcut


class Net(nn.Module):
    """A stem, two units and a head."""

    def __init__(self, block: Callable[..., nn.Module] = Block, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.layer = nn.Sequential(block(6, 6, **options), block(6, 8, 2, **options))
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.stem(x))
        return self.fc(self.pool(self.relu(self.bn(x))).flatten(1))


ALL = (5, 2, 1)
"""What of ``Net`` runs fused."""


def awkward(model: nn.Module) -> Any:
    """Norms of either sign, with statistics of their own, in float64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.uniform_(module.bias, 0.1, 0.6)
            nn.init.normal_(module.running_mean, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double()


def net(**options: Any) -> Any:
    return awkward(Net(**options))


def image(dtype: torch.dtype = torch.float64, count: int = 2, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=dtype)


def counts(model: nn.Module, *inputs: Any) -> tuple[int, int, int]:
    """What runs fused in one call."""
    with watching(model) as ran:
        model(*inputs)
    assert ran.composites == 0
    return ran.counts


def assert_same(plain: nn.Module, fused: nn.Module, expected: tuple[int, int, int] | None = ALL) -> None:
    """A step of both agrees, and of the fused one this much runs fused."""
    x = image()
    assert_same_step(plain, fused, x)
    if expected is None:
        return
    seeded()
    output = plain(x)
    with watching(fused) as ran:
        seeded()
        assert_close("output", fused(x), output)
    assert ran.counts == expected
    assert ran.composites == 0


# --- what stays ------------------------------------------------------------------------------------------


def _state_of(model: nn.Module) -> dict[str, Any]:
    return {name: {**m.__dict__} for name, m in model.named_modules()}


def test_model_keeps_its_modules_parameters_and_names() -> None:
    model = net()
    modules = [(n, id(m), type(m)) for n, m in model.named_modules()]
    tensors = [(n, id(t)) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    keys, printed = list(model.state_dict()), repr(model)
    assert fuse(model) is model
    model(image())
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == modules
    assert [(n, id(t)) for n, t in [*model.named_parameters(), *model.named_buffers()]] == tensors
    assert list(model.state_dict()) == keys
    assert repr(model) == printed


def test_unfuse_gives_back_what_was_there() -> None:
    model = net()
    before = _state_of(model)
    held = {name: id(value) for name, m in model.named_modules() for value in (m._modules, m._parameters)}
    assert unfuse(fuse(model)) is model
    after = _state_of(model)
    assert after.keys() == before.keys()
    for name in before:
        assert list(after[name]) == list(before[name]), name
        assert all(after[name][key] is value for key, value in before[name].items()), name
    assert held == {
        name: id(value) for name, m in model.named_modules() for value in (m._modules, m._parameters)
    }
    assert counts(model, image()) == (0, 0, 0)
    assert unfuse(model) is model


def test_fuse_restores_modes_and_random_streams() -> None:
    model = net()
    model.layer[0].eval()
    flags = [m.training for m in model.modules()]
    seeded(1)
    expected = torch.rand(3), random.random()
    seeded(1)
    fuse(model)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert [m.training for m in model.modules()] == flags


def test_fuse_twice() -> None:
    plain, model = pair(net())
    assert_same(plain, fuse(model))


def test_unfuse_leaves_a_forward_that_somebody_put_there() -> None:
    model = fuse(net())
    mine = model.layer[0].forward = lambda x: x
    unfuse(model)
    assert model.layer[0].__dict__["forward"] is mine
    assert "forward" not in model.layer[1].__dict__


# --- copies ----------------------------------------------------------------------------------------------


def _through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _through_file,
}


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_fused_and_independent(way: str, ran: bool) -> None:
    plain, model = pair(net())
    if ran:
        for m in (plain, model):
            m(torch.ones(2, 3, 6, 6, dtype=torch.float64))
    twin = COPIES[way](model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for b in model.buffers():
            b.zero_()
    assert_same(plain, twin)
    assert all(p.grad is None for p in model.parameters())
    assert all((b == 0).all() for b in model.buffers())


def test_a_dropped_model_goes_away() -> None:
    model = fuse(net())
    model(image())
    gone = weakref.ref(model.layer[0].conv1)
    del model
    import gc

    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_load_state_dict(assign: bool) -> None:
    plain, model = pair(net())
    model(image())
    state = {k: v * 0.7 if v.is_floating_point() else v + 4 for k, v in plain.state_dict().items()}
    for m in (plain, model):
        m.load_state_dict(copy.deepcopy(state), assign=assign)
    assert_same(plain, model)


def test_meta_device() -> None:
    plain = net()
    with torch.device("meta"):
        model = Net().double()
    fuse(model)
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    assert_same(plain, model)


def test_to_empty() -> None:
    plain = net()
    with torch.device("meta"):
        model = fuse(Net().double())
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert_same(plain, model)


# --- modes, dtypes, formats --------------------------------------------------------------------------------


def test_modes_take_turns() -> None:
    plain, model = pair(net())
    for training in (True, False, True, False):
        assert_same(plain.train(training), model.train(training))


def test_dropout_breaks_its_site_in_training_only() -> None:
    plain, model = pair(net(p=0.4))
    for _ in range(2):
        assert_same(plain.train(), model.train(), (3, 1, 1))
        assert_same(plain.eval(), model.eval())


def test_frozen_statistics() -> None:
    plain, model = pair(net())
    for m in (plain, model):
        m.layer[0].bn2.eval()
        m.bn.eval()
    assert_same(plain, model)
    before = model.bn.running_mean.clone()
    model(image())
    assert torch.equal(model.bn.running_mean, before)


@pytest.mark.parametrize("frozen", ["layer.0", "bn1", "conv", "weight", "stem", ""])
def test_frozen_subsets(frozen: str) -> None:
    plain, model = pair(net())
    for m in (plain, model):
        for name, p in m.named_parameters():
            p.requires_grad_(frozen not in name)
    if frozen == "":
        x = image()
        assert torch.equal(model(x).isfinite(), plain(x).isfinite())
        assert not model(x).requires_grad
        return
    assert_same(plain, model)


def test_dtypes_change() -> None:
    plain, model = pair(net().float())
    x = image(torch.float32)
    model(x), plain(x)
    plain.load_state_dict(model.state_dict())
    assert_same(plain.double(), model.double())
    model.to(torch.float32)
    assert model(image(torch.float32)).dtype == torch.float32


def test_optimiser_and_decay_by_type() -> None:
    plain, model = pair(net())
    optimisers = []
    for m in (plain, model):
        norms = [p for c in m.modules() if isinstance(c, nn.BatchNorm2d) for p in c.parameters(recurse=False)]
        rest = [p for p in m.parameters() if not any(p is n for n in norms)]
        groups = [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        optimisers.append(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    for seed in range(3):
        for m, optimiser in zip((plain, model), optimisers, strict=True):
            torch.manual_seed(seed)
            optimiser.zero_grad()
            m(image()).square().sum().backward()
            optimiser.step()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(name, q, p)


def test_gradients_accumulate() -> None:
    plain, model = pair(net())
    x = image(), image()
    for m in (plain, model):
        for one in x:
            m(one).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(name, q.grad, p.grad)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_memory_formats(memory_format: torch.memory_format) -> None:
    plain, model = pair(net().layer[0].to(memory_format=memory_format))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert_same_step(plain, model, x)
    assert model(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batches_of_one_and_none(count: int, training: bool) -> None:
    plain, model = pair(net().train(training))
    x = image(count=count)
    assert_same_step(plain, model, x)


def test_one_value_per_channel_is_refused_as_by_pytorch() -> None:
    plain, model = pair(net())
    for m in (plain, model):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            m(image(count=1, size=1))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(context: Any, training: bool) -> None:
    plain, model = pair(net().train(training))
    x = image()
    with context():
        expected = plain(x)
        assert_close("output", model(x), expected)
        assert counts(model, x) == ALL
    plain(x)
    assert_same(plain, model) if not training else None


@COMPILED
@pytest.mark.parametrize("way", ["autocast", "pure"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bfloat16(way: str, training: bool) -> None:
    exact = net().train(training)
    plain, model = pair(copy.deepcopy(exact).float())
    x = image(torch.float32, 4, 8)
    if way == "pure":
        plain, model, x = plain.bfloat16(), model.bfloat16(), x.bfloat16()
        exact.load_state_dict(plain.state_dict())
    assert ops.serving_backend(x) == "cpu"
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        expected, actual = plain(x), model(x)
    assert actual.dtype == expected.dtype
    assert_within_policy("output", actual, expected, exact(x.double()), compiled=True)
    actual.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("mode", ["anomaly", "deterministic"])
def test_modes_of_pytorch(mode: str) -> None:
    plain, model = pair(net())
    if mode == "anomaly":
        with torch.autograd.detect_anomaly(check_nan=True):
            assert_same(plain, model)
        return
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(plain, model)
    finally:
        torch.use_deterministic_algorithms(False)


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


# --- transforms and tracers ------------------------------------------------------------------------------


def test_functional_call_and_grad() -> None:
    plain, model = pair(net().eval())  # PyTorch's own norm would write to the captured counter
    x = image()

    def loss(m: nn.Module) -> Callable[..., Tensor]:
        return lambda params, buffers: torch.func.functional_call(m, (params, buffers), (x,)).square().sum()

    results = []
    for m in (plain, model):
        params = {n: p.detach() * 0.9 for n, p in m.named_parameters()}
        buffers = {n: b.clone() for n, b in m.named_buffers()}
        grads = torch.func.grad(loss(m))(params, buffers)
        results.append({**grads, **buffers, "loss": loss(m)(params, buffers)})
    for name, tensor in results[0].items():
        assert_close(name, results[1][name], tensor)


def test_vmap_in_eval() -> None:
    plain, model = pair(net().eval())
    x = torch.randn(3, 2, 3, 6, 6, dtype=torch.float64)
    assert_close("output", torch.vmap(model)(x), torch.vmap(plain)(x))


def test_forward_mode() -> None:
    plain, model = pair(net().eval())
    x, t = image(), image()
    results = [torch.func.jvp(m, (x,), (t,)) for m in (plain, model)]
    for name, actual, expected in zip(("output", "tangent"), results[1], results[0], strict=True):
        assert_close(name, actual, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_jit_trace() -> None:
    plain, model = pair(net().eval())
    x = image()
    traced = torch.jit.trace(model, x)
    kinds = [{n.kind() for n in torch.jit.trace(m, x).inlined_graph.nodes()} for m in (plain, model)]
    assert kinds[0] == kinds[1]
    assert_close("output", traced(x), plain(x))


def test_fx_symbolic_trace() -> None:
    plain, model = pair(net())
    model(image())
    graphs = [[(n.op, str(n.target)) for n in fx.symbolic_trace(m).graph.nodes] for m in (plain, model)]
    assert graphs[0] == graphs[1]


class Checkpointed(nn.Sequential):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for unit in self:
            x = checkpoint(unit, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_checkpoint(reentrant: bool) -> None:
    model = net()
    model.layer = Checkpointed(*model.layer)
    model.layer.reentrant = reentrant
    plain, model = pair(model)
    expected, actual = step(plain, (image(),)), None
    torch.manual_seed(0)
    plain.load_state_dict(model.state_dict())
    x = image()
    expected, actual = step(plain, (x,)), step(model, (x,))
    counters = {name for name in expected if "running" in name or "num_batches" in name}
    for name in expected.keys() - counters:
        assert_close(name, actual[name], expected[name])
    for name in counters:
        if "num_batches" in name:
            assert 1 <= actual[name] <= expected[name], name  # once, where plain counts some twice
    assert counts(model, x) == ALL


class Recomputing(Block):
    """Its own forward recomputes part of itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(checkpoint(self.first, x, use_reentrant=False)))) + x

    def first(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x)))


def test_a_checkpoint_inside_stays_one() -> None:
    plain, model = pair(awkward(Recomputing(6, 6)))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    calls = 0
    for m in (plain, model):
        before = calls

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        with pytest.MonkeyPatch.context() as patch:
            forward = nn.Conv2d.forward
            patch.setattr(nn.Conv2d, "forward", lambda *a, forward=forward: count() or forward(*a))
            m(x).sum().backward()
        assert calls - before == 3


# --- threads, averages, replicas -------------------------------------------------------------------------


def test_threads() -> None:
    """The first call, which traces, from several at once, beside one that runs another model."""
    plain, model = pair(net().eval())
    other = net().eval()
    inputs = [image() for _ in range(6)]
    results: list[Any] = [None] * len(inputs)
    call = nn.Module.__call__

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    other(inputs[i])
                    results[i] = model(inputs[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.__call__ is call
    for x, result in zip(inputs, results, strict=True):
        assert isinstance(result, Tensor), result
        assert_close("output", result, plain(x))
    assert counts(model, inputs[0]) == ALL


def test_averaged_model() -> None:
    plain, model = pair(net())
    averages = [AveragedModel(m, use_buffers=True) for m in (plain, model)]
    for seed in range(2):
        for m, average in zip((plain, model), averages, strict=True):
            step(m, (torch.ones(2, 3, 6, 6, dtype=torch.float64) * seed,), lr=0.1)
            average.update_parameters(m)
    x = image()
    assert_close("output", averages[1].eval()(x), averages[0].eval()(x))
    assert counts(averages[1].module, x) == ALL


def test_outputs_can_be_saved_and_loaded() -> None:
    model = fuse(net().layer)
    file = io.BytesIO()
    with torch.no_grad():
        torch.save(model(torch.randn(2, 6, 5, 5, dtype=torch.float64)), file)
    file.seek(0)
    assert torch.load(file).shape == (2, 8, 3, 3)


# --- forwards of every kind ------------------------------------------------------------------------------


class Probe(nn.Module):
    """Norms and convolutions, and a forward of the test's own."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.conv2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1)
        self.list: list[Any] = []
        self.last: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def site(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


def probe(forward: Callable[..., Any]) -> Any:
    cls = type("Probe", (Probe,), {"forward": forward})
    globals()["Probe_"] = cls
    return awkward(cls(None))


def four(size: int = 5, count: int = 2) -> Tensor:
    return torch.randn(count, 4, size, size, dtype=torch.float64)


def _write_between(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    a = F.relu(self.bn(x))
    x.mul_(2)
    return self.conv(a) + x


def _write_activation(self: Any, x: Tensor) -> Tensor:
    a = F.relu(self.bn(x))
    a.mul_(2)
    return self.conv(a)


def _write_view(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    a = F.relu(self.bn(x))
    x.view(-1).mul_(2)
    return self.conv(a) + x


def _write_shortcut(self: Any, x: Tensor) -> Tensor:
    shortcut = x * 1
    out = self.site(x)
    shortcut += 1
    return out + shortcut


def _write_through_another_name(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    z = y
    y += x
    return z * 2


def _view_of_the_sum(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    v = y.flatten(1)
    y += x
    return v * 2


def _sum_into_the_shortcut(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    v = x[:, :2]
    x += self.site(x)
    return v * 2


def _sum_into_another(self: Any, x: Tensor) -> Tensor:
    other = self.conv2(x)
    other += self.site(x)
    return other * 2


def _sum_into_another_with_a_view(self: Any, x: Tensor) -> Tensor:
    other = self.conv2(x)
    view = other[:, :2]
    other += self.site(x)
    return view * 2


def _numbers(self: Any, x: Tensor) -> Tensor:
    height = x.shape[2]
    more = height
    more += 1
    return self.site(x) * height + more


def _broadcast(self: Any, x: Tensor) -> Tensor:
    return self.site(x) + x[:, :, :1, :1]


def _broadcast_up(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(x[:1]))) + x


def _two_dtypes(self: Any, x: Tensor) -> Tensor:
    return self.site(x) + x.float()


def _twice(self: Any, x: Tensor) -> Tensor:
    return self.site(self.site(x))


def _norm_twice(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(x))) + self.conv2(F.relu(self.bn(x * 2)))


def _sum_of_one(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    return y + y


def _tuple(self: Any, x: Tensor) -> Any:
    y = self.site(x)
    return y, (x, self.conv2(F.relu(self.bn2(y))))


def _dict(self: Any, x: Tensor) -> Any:
    y = self.site(x)
    return {"y": y, "rest": [x, self.conv2(F.relu(self.bn2(y)))]}


def _ordered(self: Any, x: Tensor) -> Any:
    return collections.OrderedDict(y=self.site(x), x=x)


Pair = collections.namedtuple("Pair", "y x")


def _named(self: Any, x: Tensor) -> Any:
    return Pair(self.site(x), x)


def _draws(self: Any, x: Tensor) -> Tensor:
    return self.site(x) if random.random() < 0.5 else self.conv2(x)


def _draws_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.site(x) * torch.rand(1, dtype=torch.float64)


def _sets(self: Any, x: Tensor) -> Tensor:
    self.last = y = self.site(x)
    return y


def _appends(self: Any, x: Tensor) -> Tensor:
    y = self.site(x)
    self.list.append(y)
    return y


def _asks(self: Any, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return self.site(x)
    return self.conv2(x[0])


def _shapes(self: Any, x: Tensor) -> Tensor:
    if x.shape[2] > 4:
        x = x[:, :, 1:]
    return self.site(x)


def _no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        a = F.relu(self.bn(x))
    return self.conv(a)


def _no_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.site(x)


def _asks_for_grad(self: Any, x: Tensor) -> Tensor:
    return self.site(x) * (2 if torch.is_grad_enabled() else 3)


def _detached(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(x.detach()))) + x


def _norm_of_lines(self: Any, x: Tensor) -> Tensor:
    return self.site(x) + F.batch_norm(x.flatten(2), None, None, training=True).view_as(x)


def _kept_activation(self: Any, x: Tensor) -> Any:
    a = F.relu(self.bn(x))
    return self.conv(a), a


def _kept_norm(self: Any, x: Tensor) -> Any:
    z = self.bn(x)
    return self.conv(F.relu(z)), z


def _three_readers(self: Any, x: Tensor) -> Tensor:
    a = F.relu(self.bn(x))
    return self.conv(a) + self.conv2(a) + a


# Forward, and how many sites and additions run fused (None: that depends).
FORWARDS: dict[str, tuple[Callable[..., Any], tuple[int, int] | None]] = {
    "x written between": (_write_between, (0, 0)),
    "activation written": (_write_activation, (0, 0)),
    "x written through a view": (_write_view, (0, 0)),
    "shortcut written": (_write_shortcut, None),
    "sum with another name": (_write_through_another_name, (1, 1)),
    "view of a sum": (_view_of_the_sum, (1, 0)),
    "sum into the shortcut": (_sum_into_the_shortcut, (1, 0)),
    "sum into another": (_sum_into_another, (1, 1)),
    "sum into another with a view": (_sum_into_another_with_a_view, (1, 0)),
    "numbers": (_numbers, (1, 0)),
    "sum that broadcasts": (_broadcast, None),
    "sum that broadcasts the branch": (_broadcast_up, None),
    "sum of two dtypes": (_two_dtypes, None),
    "module called twice": (_twice, (2, 0)),
    "norm called twice": (_norm_twice, (2, 1)),
    "sum of one value": (_sum_of_one, (1, 0)),
    "returns a tuple": (_tuple, (2, 0)),
    "returns a dict": (_dict, (2, 0)),
    "returns an OrderedDict": (_ordered, (0, 0)),
    "returns a namedtuple": (_named, (1, 0)),
    "draws in Python": (_draws, (0, 0)),
    "draws a tensor": (_draws_a_tensor, (0, 0)),
    "sets an attribute": (_sets, (0, 0)),
    "appends to a list": (_appends, (0, 0)),
    "asks for a tensor": (_asks, (0, 0)),
    "asks for a shape": (_shapes, (0, 0)),
    "no_grad inside": (_no_grad, (0, 0)),
    "autocast inside": (_no_autocast, (1, 0)),
    "asks whether gradients are wanted": (_asks_for_grad, (1, 0)),
    "detached": (_detached, (1, 1)),
    "other norms": (_norm_of_lines, None),
    "activation returned": (_kept_activation, (0, 0)),
    "norm returned": (_kept_norm, (0, 0)),
    "three readers": (_three_readers, (0, 0)),
}


@pytest.mark.filterwarnings("ignore:.*found nothing to fuse")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str, training: bool) -> None:
    forward, expected = FORWARDS[name]
    plain, model = pair(probe(forward).train(training))
    x = four()
    refused = raises(copy.deepcopy(plain), x)  # then the values alone are compared, below
    for _ in range(0 if refused else 2):
        assert_same_step(plain, model, x)
    seeded()
    a = model(x)
    seeded()
    b = plain(x)
    assert type(a) is type(b)
    with torch.no_grad():
        seeded()
        a = model(x)
        seeded()
        for one, other in zip(tensors_of(a), tensors_of(plain(x)), strict=True):
            assert_close("without gradients", one, other)
    assert len(model.list) == len(plain.list)
    assert (model.last is None) == (plain.last is None)
    if expected is not None:
        with watching(model) as ran:
            model(x)
        assert (len(ran.sites), ran.additions) == expected


def raises(model: nn.Module, x: Tensor) -> bool:
    """Whether it writes to what autograd has kept."""
    try:
        step(model, (x,))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return True
    return False


def _optional(
    self: Any, x: Tensor, residual: Tensor | None = None, scale: float = 1, *, negate: bool = False
) -> Tensor:
    y = self.site(x)
    if residual is not None:
        y = y + residual
    return (-y if negate else y) * scale


def _listed(self: Any, xs: list[Tensor]) -> Tensor:
    return self.conv(F.relu(self.bn(torch.cat([x[:, :2] for x in xs], 1))))


def _variable(self: Any, *xs: Tensor) -> Tensor:
    return sum(self.site(x) for x in xs)


def _keywords(self: Any, x: Tensor, **options: Any) -> Tensor:
    y = self.site(x)
    return y + options["other"] if "other" in options else y


def calls_of(
    x: Tensor, y: Tensor
) -> dict[str, list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]]:
    return {
        "optional": [
            (_optional, (x,), {}),
            (_optional, (x, y), {}),
            (_optional, (x,), {"residual": y}),
            (_optional, (x, None, 3), {}),
            (_optional, (x, None, 3.0), {"negate": True}),
            (_optional, (x, None, True), {}),
            (_optional, (x, None, 1), {}),
            (_optional, (), {"x": x, "negate": True}),
            (_optional, (x, None, torch.tensor(2.0, dtype=torch.float64)), {}),
        ],
        "listed": [(_listed, ([x, y],), {}), (_listed, ((y, x),), {})],
        "variable": [(_variable, (x,), {}), (_variable, (x, y), {})],
        "keywords": [(_keywords, (x,), {}), (_keywords, (x,), {"other": y})],
    }


@pytest.mark.filterwarnings("ignore:.*found nothing to fuse")
@pytest.mark.parametrize("kind", ["optional", "listed", "variable", "keywords"])
def test_arguments(kind: str) -> None:
    x, y = four(), four()
    calls = calls_of(x, y)[kind]
    plain, model = pair(probe(calls[0][0]).eval())
    for _ in range(2):
        for _, args, kwargs in calls:
            assert_close(f"{args} {kwargs}", model(*args, **kwargs), plain(*args, **kwargs))


def test_forms_of_arguments_are_bounded() -> None:
    plain, model = pair(probe(_optional).eval())
    x = four()
    for i in range(30):
        assert_close("output", model(x, None, i / 7), plain(x, None, i / 7))
    assert len(model.forward.programs) <= 8
    with watching(model) as ran:
        assert_close("an array", model(x, None, [2.0][0]), plain(x, None, 2.0))
    assert ran.composites == 0


class Options:
    """An argument that is no tensor, and changes."""

    scale = 1.0
    __hash__ = None  # type: ignore[assignment]


def _with_options(self: Any, x: Tensor, options: Any = None) -> Tensor:
    y = self.site(x)
    return y if options is None else y * options.scale


def test_arguments_that_change() -> None:
    plain, model = pair(probe(_with_options).eval())
    x, options = four(), Options()
    for scale in (1.0, 2.0):
        options.scale = scale
        assert_close("output", model(x, options), plain(x, options))


def test_a_module_that_cannot_be_traced_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_preact.convert import program

    model = fuse(net())
    model.layer[0].conv1.register_forward_hook(_count([], ""))
    traces = []
    trace = program.trace
    monkeypatch.setattr(program, "trace", lambda *args: traces.append(1) or trace(*args))
    for _ in range(3):
        model(image())
    first = len(traces)
    for _ in range(3):
        model(image())
    assert len(traces) == first


def test_input_written_afterwards() -> None:
    """As PyTorch says it, or right."""
    for shape in ((2, 4, 5, 5), (2, 4, 1, 7)):
        plain, model = pair(probe(lambda self, x: self.site(x)))
        results = []
        for m in (plain, model):
            torch.manual_seed(0)
            leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            x = leaf * 1
            y = m(x)
            with torch.no_grad():
                x.mul_(2)
            try:
                y.sum().backward()
                results.append(leaf.grad)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                results.append(None)
        assert results[1] is None or results[0] is not None


def test_a_static_input_that_numpy_writes_to() -> None:
    """Several convolutions share the statistics of x, for one call only."""
    plain, model = pair(
        probe(lambda self, x: self.conv(F.relu(self.bn(x))) + self.conv2(F.relu(self.bn2(x))))
    )
    shared = probe(_three_readers)
    twin = fuse(copy.deepcopy(shared))
    x = four()
    for m, p in ((model, plain), (twin, shared)):
        for _ in range(2):
            x.numpy()[...] = torch.randn(2, 4, 5, 5).numpy()
            assert_close("output", m(x), p(x))
    assert not x.__dict__


def test_autocast_with_a_float32_shortcut() -> None:
    plain, model = pair(probe(lambda self, x: self.site(x) + x).float())
    x = four().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.float32


class Body(Probe):
    """Returns its first activation too, which only some callers want."""

    def forward(self, x: Tensor) -> Any:
        a = F.relu(self.bn(x))
        return self.conv2(F.relu(self.bn2(self.conv(a)))), a


@pytest.mark.parametrize("wanted", [False, True])
def test_what_a_child_returns_and_nobody_reads(wanted: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y, a = self.run(x)
        return y * 2 + a if wanted else y * 2

    model = probe(forward)
    model.run = awkward(Body(None))
    plain, model = pair(model)
    assert_same_step(plain, model, four())
    assert counts(model, four())[0] == (1 if wanted else 2)


def test_a_context_inside_counts_in_every_context() -> None:
    """What a forward sets around a part of itself, called where it makes no difference and where it does."""
    plain, model = pair(probe(_no_autocast).float())
    x = four().float()
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert model(x).dtype == plain(x).dtype == torch.float32
    plain, model = pair(probe(_no_grad))
    x = four()
    with torch.no_grad():
        model(x), plain(x)
    assert_same_step(plain, model, x)


# --- what cannot be fused --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.parametrize(
    "wrong", [None, 3, "model", nn.ReLU, F.relu], ids=lambda w: getattr(w, "__name__", str(w))
)
def test_no_module(function: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model: got \w+, allowed is a torch.nn.Module"):
        function(wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted() -> None:
    with pytest.raises(TypeError, match="scripted"):
        fuse(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))))


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.LazyConv2d(4, 1))
    before = _state_of(model)
    with pytest.raises(ValueError, match=r"uninitialised parameter '2\.weight'"):
        fuse(model)
    assert {n: list(d) for n, d in _state_of(model).items()} == {n: list(d) for n, d in before.items()}
    model(torch.randn(2, 3, 4, 4))
    assert counts(fuse(model), torch.randn(2, 3, 4, 4)) == (1, 0, 0)


def test_lazy_norms() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(affine=False), nn.ReLU(), nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="uninitialised"):
        fuse(model)


def test_nothing_to_fuse_warns_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    before = _state_of(model)
    with pytest.warns(UserWarning, match="found nothing to fuse in Sequential") as warned:
        assert fuse(model) is model
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert _state_of(model) == before
