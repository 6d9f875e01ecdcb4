"""Folded inference when the model changes, what must run unfolded, and wrong arguments."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import COMPILED, assert_within_policy
from inference_helpers import awkward, compare, make
from torch import Tensor, nn

import fused_preact
from fused_preact import (
    PreActBottleneck,
    PreActConv2d,
    PreActSequential,
    inference,
    optimize_for_inference,
    undo_optimize_for_inference,
)

pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32", "without_gradients")


# --- state -----------------------------------------------------------------------------------------------


def test_state_dict_and_undo() -> None:
    model = awkward(fused_preact.models.cifar_preact_resnet20())
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert optimize_for_inference(model) is model
    model(x)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert undo_optimize_for_inference(model) is model
    assert all(getattr(m, "_folded", None) is None for m in model.modules())
    assert torch.equal(model(x), expected)


def _load(model: nn.Module) -> None:
    model.load_state_dict(
        {k: v * 0.75 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )


def _assign(model: nn.Module) -> None:
    state = {k: v * 0.75 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _step(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(torch.randn(2, 16, 7, 9)).square().mean().backward()
    optimiser.step()


def _train(model: nn.Module) -> None:
    model.train()
    model(torch.randn(4, 16, 7, 9))
    model.eval()


def _round_trip(model: nn.Module) -> None:
    model.to(torch.float16).to(torch.float32)


def _infer_mode(model: Any) -> None:
    with torch.inference_mode():
        model[0].bn2.running_mean.add_(1)


def _assign_in_inference_mode(model: nn.Module) -> None:
    """Leaves tensors that count no writes."""
    with torch.inference_mode():
        _assign(model)


def _other_parameters(model: Any) -> None:
    conv = model[1].conv2
    conv._parameters = {"weight": nn.Parameter(conv.weight * 2), "bias": None}


def _other_attribute(model: Any) -> None:
    """In the place of one that nobody needs: the instance holds as many as before."""
    conv = model[1].conv2
    plain = conv._conv_forward
    del conv.output_padding
    conv._conv_forward = lambda x, weight, bias: plain(x, 2 * weight, bias)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": _load,
    "load_state_dict-assign": _assign,
    "optimiser": _step,
    "training-forward": _train,
    "dtype-and-back": _round_trip,
    "inference-mode-write": _infer_mode,
    "data-swapped": lambda m: setattr(m[1].conv2.weight, "data", m[1].conv2.weight * 2),
    "eps": lambda m: setattr(m[1].bn3, "eps", 0.5),
    "padding": lambda m: (setattr(m[1].conv2, "padding", (2, 2)), setattr(m[1].conv2, "dilation", (2, 2))),
    "padding-alone": lambda m: (
        setattr(m[0].conv1, "padding", (1, 1)),
        setattr(m[0].conv2, "padding", (0, 0)),
    ),
    "stride": lambda m: (setattr(m[0].conv2, "stride", (1, 1)), setattr(m[0].shortcut, "stride", (1, 1))),
    "parameter": lambda m: setattr(m[1].bn2, "weight", nn.Parameter(torch.full((8,), 0.3))),
    "buffer": lambda m: setattr(m[1].bn2, "running_var", torch.full((8,), 0.3)),
    "child": lambda m: setattr(m[1], "conv1", nn.Conv2d(32, 8, 1)),
    "batch-norm": lambda m: setattr(m[1], "bn2", nn.BatchNorm2d(8, track_running_stats=False).eval()),
    "unit-added": lambda m: m.append(PreActBottleneck(32, 32).eval()),
    "foreign-added": lambda m: m.append(nn.Hardtanh(-0.1, 0.1)),
    "inference-mode-assign": _assign_in_inference_mode,
    "parameters-swapped": _other_parameters,
    "class-changed": lambda m: setattr(m[1].conv2, "__class__", Doubled),
    "attribute-swapped": _other_attribute,
    "plain": lambda m: setattr(m[0], "fused", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    model: Any = awkward(PreActSequential(PreActBottleneck(16, 32, 2), PreActBottleneck(32, 32)))
    x = torch.randn(2, 16, 7, 9)
    old = optimize_for_inference(model)(x)
    CHANGES[change](model)
    y = model(x)
    fresh = undo_optimize_for_inference(copy.deepcopy(model))
    assert_within_policy("y", y, fresh(x), copy.deepcopy(fresh).double()(x.double()))
    if change not in ("dtype-and-back", "plain"):
        assert y.shape != old.shape or not torch.allclose(y, old, atol=1e-4), "the change shows"


@pytest.mark.parametrize(
    "place", ["1.bn2.running_var", "1.bn1.weight", "0.conv1.weight", "1.conv3.weight", "0.shortcut.weight"]
)
def test_plain_attributes_are_not_folded(place: str) -> None:
    """As hypernetworks leave them: a tensor that is no parameter, another one or other numbers at each call."""
    model: Any = awkward(PreActSequential(PreActBottleneck(16, 32, 2), PreActBottleneck(32, 32)))
    *path, name = place.split(".")
    owner = model.get_submodule(".".join(path))
    tensor = getattr(owner, name).detach()
    delattr(owner, name)
    setattr(owner, name, tensor.clone())
    x = torch.randn(2, 16, 7, 9)
    optimize_for_inference(model)
    for step in range(3):
        y = model(x)
        expected = undo_optimize_for_inference(copy.deepcopy(model))(x)
        torch.testing.assert_close(y, expected, msg=f"step {step}")
        if step == 0:
            getattr(owner, name).mul_(2)
        else:
            setattr(owner, name, tensor * 3)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_fold_their_own(how: str) -> None:
    model, x = make("sequence")
    expected = optimize_for_inference(model)(x)
    if how == "copy":
        other = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    model.load_state_dict({k: v * 0 for k, v in model.state_dict().items()})
    assert torch.equal(other(x), expected)
    assert other._folded._root is other


STEM_CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "window": lambda conv, pool: setattr(pool, "kernel_size", 2),
    "stride-of-pool": lambda conv, pool: setattr(pool, "stride", 1),
    "padding-of-pool": lambda conv, pool: setattr(pool, "padding", 0),
    "dilation-of-pool": lambda conv, pool: setattr(pool, "dilation", 2),
    "ceil-mode": lambda conv, pool: setattr(pool, "ceil_mode", True),
    "stride": lambda conv, pool: setattr(conv, "stride", (1, 1)),
    "padding": lambda conv, pool: setattr(conv, "padding", (1, 1)),
    "dilation": lambda conv, pool: setattr(conv, "dilation", (2, 2)),
    "padding-mode": lambda conv, pool: setattr(conv, "padding_mode", "circular"),
    "weight": lambda conv, pool: setattr(conv, "weight", nn.Parameter(conv.weight * 2)),
    "bias": lambda conv, pool: setattr(conv, "bias", nn.Parameter(torch.ones(64))),
}


@pytest.mark.parametrize("change", STEM_CHANGES)
def test_changes_of_a_stem_are_seen(change: str) -> None:
    model: Any = fused_preact.models.preact_resnet18(4).eval()
    stem, x = model.stem, torch.randn(2, 3, 31, 34)
    old = optimize_for_inference(model)(x)
    folded = stem(x)
    model(x)
    STEM_CHANGES[change](*stem)
    y = stem(x)
    torch.testing.assert_close(y, stem[1](stem[0](x)), rtol=1e-4, atol=1e-4)
    assert y.shape != folded.shape or not torch.allclose(y, folded)
    assert not torch.allclose(model(x), old)


class Foreign(nn.Module):
    """Somebody's block, with attributes that its forward asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.skip, self.gain = True, 1.0
        self.unread = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        y = y + x if self.skip else y
        return y if self.gain == 1 else y * self.gain


FOREIGN_CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda m: setattr(m[0], "skip", False),
    "other-attribute": lambda m: setattr(m[1], "gain", 3.0),
    "unread": lambda m: (setattr(m[0], "unread", torch.ones(3)), m[0].bn2.bias.add_(1)),
    "forward": lambda m: setattr(m[0], "forward", lambda x: 2 * x),
    "weight": lambda m: m[0].conv2.weight.data.mul_(3),
    "eps": lambda m: setattr(m[1].bn1, "eps", 0.5),
    "hook": lambda m: m[1].conv1.register_forward_hook(lambda module, args, y: 2 * y),
}


@pytest.mark.parametrize("change", FOREIGN_CHANGES)
def test_changes_of_converted_blocks_are_seen(change: str) -> None:
    model: Any = awkward(nn.Sequential(Foreign(), Foreign()))
    plain = copy.deepcopy(model)
    x = torch.randn(2, 8, 5, 6)
    old = optimize_for_inference(fused_preact.fuse(model))(x)
    assert model.forward.folded._state.fold is not None
    torch.testing.assert_close(old, plain(x))
    done = [FOREIGN_CHANGES[change](changed) for changed in (model, plain)]
    y = model(x)
    torch.testing.assert_close(y, plain(x))
    assert not torch.allclose(y, old)
    if change == "hook":
        fused = fused_preact.undo_optimize_for_inference(model)
        torch.testing.assert_close(fused(x), plain(x))
        for handle in done:
            handle.remove()
        torch.testing.assert_close(fused(x), old)
        assert fused[1].forward.matches == 1, "fused again"


def test_plain_attributes_of_converted_blocks_are_not_folded() -> None:
    model: Any = awkward(nn.Sequential(Foreign(), Foreign()))
    weight = model[0].conv2.weight.detach()
    del model[0].conv2.weight
    model[0].conv2.weight = weight
    plain = copy.deepcopy(model)
    x = torch.randn(2, 8, 5, 6)
    optimize_for_inference(fused_preact.fuse(model))
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
        for changed in (model, plain):
            changed[0].conv2.weight.mul_(2)


# --- what runs as before ------------------------------------------------------------------------------------


def as_before(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The output of ``model``, which must not come from a fold."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a folded chain ran")

    monkeypatch.setattr(inference, "run_chain", refuse)
    monkeypatch.setattr(inference, "run_stem", refuse)
    for module in model.modules():
        folded: Any = getattr(module, "_folded", None)
        if folded is not None and folded._state is not None and folded._state.fold is not None:
            # What has been folded already knows its function.
            monkeypatch.setattr(
                folded, "_state", folded._state._replace(fold=folded._state.fold._replace(run=refuse))
            )
    return model(x)


def test_training_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("sequence")
    fresh = copy.deepcopy(model).train()
    optimize_for_inference(model).train()
    assert torch.equal(as_before(model, x, monkeypatch), fresh(x))
    for (name, a), b in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_unfused_units_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("sequence")[0]
    x = torch.randn(2, 8, 8, 7)
    optimize_for_inference(model)(x)
    model[0].fused = False
    as_before(model, x, monkeypatch)


def test_gradients_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("sequence")
    optimize_for_inference(model)
    model(x)
    with torch.enable_grad():
        as_before(model, x, monkeypatch).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        frozen = model.requires_grad_(False)
        x.requires_grad_()
        as_before(frozen, x, monkeypatch).sum().backward()
        assert x.grad is not None


def test_hooks_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("sequence")[0]
    x = torch.randn(2, 8, 8, 7)
    optimize_for_inference(model)(x)
    seen = []
    handle = model[1][0].conv2.register_forward_hook(lambda *args: seen.append(args[2].shape))
    with monkeypatch.context() as patch:
        as_before(model, x, patch)
    assert len(seen) == 1
    handle.remove()
    compare(model, x)


def test_hooks_on_the_folded_module_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own call is made, so that they need no other."""
    model, x = make("sequence")
    ran: list[int] = []
    run_chain = inference.run_chain
    monkeypatch.setattr(inference, "run_chain", lambda *args: (ran.append(1), run_chain(*args))[1])
    expected = optimize_for_inference(model)(x)
    model.register_forward_hook(lambda module, args, y: 2 * y)
    assert torch.equal(model(x), 2 * expected)
    optimize_for_inference(model)
    assert torch.equal(model(x), 2 * expected)
    assert len(ran) == 3


def test_parametrised_and_foreign_modules() -> None:
    """The units beside them are folded still, and a sequence around foreign code is no chain."""
    parametrised: Any = PreActBottleneck(16, 16)
    torch.nn.utils.parametrizations.weight_norm(parametrised.conv2)
    model: Any = awkward(
        PreActSequential(PreActBottleneck(16, 16), nn.Hardtanh(-2, 2), parametrised, PreActConv2d(16, 8, 3))
    )
    x = torch.randn(2, 16, 6, 5)
    expected = model(x)
    optimize_for_inference(model)
    assert model._folded is None
    assert model[0]._folded is not None
    assert model[2]._folded is None
    torch.testing.assert_close(model(x), expected)


def test_compiled_models_trace_the_unfolded_ones() -> None:
    torch._dynamo.reset()
    model, x = make("sequence")
    expected = undo_optimize_for_inference(copy.deepcopy(model))(x)
    optimize_for_inference(model)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_forward_mode_is_not_swallowed() -> None:
    model, x = make("sequence")
    optimize_for_inference(model)(x)
    with torch.autograd.forward_ad.dual_level():
        assert model._folded(torch.autograd.forward_ad.make_dual(x, x)) is None


def test_python_threads_share_a_model() -> None:
    model, _ = make("sequence")
    optimize_for_inference(model)
    images = [torch.randn(n, 8, 8, 7) for n in (1, 2, 3, 6)]
    expected = [undo_optimize_for_inference(copy.deepcopy(model))(x) for x in images]
    wrong: list[float] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                wrong.append(float((model(images[index]) - expected[index]).abs().max()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 40
    assert max(wrong) < 1e-4


# --- wrong arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [optimize_for_inference, undo_optimize_for_inference])
def test_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model: got str, allowed is a torch\.nn\.Module"):
        function("resnet")


def test_no_units() -> None:
    with pytest.raises(ValueError, match="model: got a Linear without residual units"):
        optimize_for_inference(nn.Linear(2, 2))


def test_wrong_input_says_what_it_says_unfolded() -> None:
    model, x = make("bottleneck")
    optimize_for_inference(model)
    for wrong in (x[0], x[:, :3], x.double(), x.to(torch.int32)):
        with pytest.raises((ValueError, TypeError), match=r"input|weight|running"):
            model(wrong)
    assert model(x[:0]).shape == x[:0].shape


@COMPILED
def test_wrong_chains() -> None:
    k = torch.ops.fused_preact
    spec = [16, 1, 1, 0, 16, 1, 1, 1, 1, 0, 0, 1, 1]
    tensors = [torch.ones(16), torch.ones(16), torch.randn(16, 16, 1, 1)]
    packed = k.unit_chain_pack(tensors, spec, torch.float32)
    x = torch.randn(1, 16, 3, 3)
    for call, message in (
        (lambda: k.unit_chain_pack(tensors[:2], spec, torch.float32), "tensors: got 2"),
        (lambda: k.unit_chain_pack([*tensors, tensors[0]], spec, torch.float32), "tensors: got 4"),
        (
            lambda: k.unit_chain_pack([tensors[0], tensors[2], tensors[2]], spec, torch.float32),
            "tensors: got a vector of 256",
        ),
        (lambda: k.unit_chain_pack(tensors, spec[:-1], torch.float32), "spec: got 12 integers"),
        (lambda: k.unit_chain(x[:, :3], packed, spec), "x: got 3 channels, allowed are 16"),
        (lambda: k.unit_chain(x.double(), packed, spec), "x: got"),
        (lambda: k.unit_chain(x, packed[:-16], spec), "packed: got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
