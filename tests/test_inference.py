"""Folded inference beside the float64 plain model, and everything that must not serve an old fold."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_within_policy
from torch import Tensor, nn

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActConv2d,
    PreActSequential,
    inference,
    ops,
    optimize_for_inference,
    undo_optimize_for_inference,
)
from fused_preact.modules import Stem

COMPILED = pytest.mark.skipif(ops._cpu_missing is not None, reason=str(ops._cpu_missing))
BACKENDS = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("reference", "cpu", id="reference"),
        pytest.param("cpu", "cpu", id="compiled", marks=COMPILED),
        pytest.param("triton", "cpu", id="interpreter"),
        pytest.param("triton", "cuda", id="cuda", marks=pytest.mark.gpu),
    ],
)
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
pytestmark = pytest.mark.usefixtures("poisoned", "eval_without_gradients")


@pytest.fixture
def eval_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield


def biased(unit: Any) -> nn.Module:
    """The same unit whose convolutions have biases, shortcut included."""
    for name, conv in list(unit.named_children()):
        if isinstance(conv, nn.Conv2d):
            sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
            setattr(unit, name, nn.Conv2d(*sizes, conv.dilation))
    return unit


def plain_bn(unit: Any) -> nn.Module:
    """The same unit with affine=False."""
    for name, bn in list(unit.named_children()):
        if isinstance(bn, nn.BatchNorm2d):
            setattr(unit, name, nn.BatchNorm2d(bn.num_features, eps=1e-3, affine=False))
    return unit


UNITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic": (lambda: PreActBasicBlock(16, 16), (3, 16, 9, 7)),
    "basic-odd-channels": (lambda: PreActBasicBlock(5, 5), (2, 5, 4, 3)),
    "basic-stride": (lambda: PreActBasicBlock(16, 20, 2), (2, 16, 9, 8)),
    "basic-zero-padding": (lambda: PreActBasicBlock(6, 17, 2, shortcut="A"), (2, 6, 7, 7)),
    "basic-dilation": (lambda: PreActBasicBlock(4, 4, dilation=2), (1, 4, 6, 5)),
    "bottleneck": (lambda: PreActBottleneck(32, 32), (3, 32, 5, 6)),
    "bottleneck-one-pixel": (lambda: PreActBottleneck(8, 8), (2, 8, 1, 1)),
    "bottleneck-stride": (lambda: PreActBottleneck(17, 36, 2), (3, 17, 8, 5)),
    "bottleneck-stride-on-1x1": (lambda: PreActBottleneck(16, 36, 2, stride_on_1x1=True), (2, 16, 7, 9)),
    "bottleneck-activated-identity": (lambda: PreActBottleneck(16, 16, shortcut="A"), (2, 16, 4, 4)),
    "bottleneck-zero-padding": (lambda: PreActBottleneck(16, 68, 2, shortcut="A"), (2, 16, 5, 5)),
    "bottleneck-biases": (lambda: biased(PreActBottleneck(16, 32, 2)), (2, 16, 5, 4)),
    "bottleneck-affine-false": (lambda: plain_bn(PreActBottleneck(16, 16)), (2, 16, 5, 4)),
    "sequence": (
        lambda: PreActSequential(
            PreActBottleneck(8, 16, 2), PreActSequential(PreActBasicBlock(16, 16), PreActBottleneck(16, 32))
        ),
        (5, 8, 8, 7),
    ),
}
ALL_UNITS = pytest.mark.parametrize("name", UNITS)


def disturb(module: nn.Module) -> nn.Module:
    """Betas above zero, gammas of both signs and zero, running statistics that are not 0 and 1; eval mode."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            if child.affine:
                nn.init.uniform_(child.bias, 0.1, 0.6)
                nn.init.uniform_(child.weight, -1, 1.5)
                child.weight[child.num_features // 2] = 0
            if child.track_running_stats:
                nn.init.normal_(child.running_mean, 0.2)
                nn.init.uniform_(child.running_var, 0.5, 2)
    return module.eval()


def set_fused(module: nn.Module, fused: bool) -> nn.Module:
    for child in module.modules():
        if hasattr(child, "fused"):
            child.fused = fused
    return module


def compare(model: nn.Module, x: Tensor, backend: str = "auto", what: str = "y") -> Tensor:
    """The optimised ``model`` against the plain one in float64, by the policy; returns its output."""
    plain = set_fused(copy.deepcopy(undo_optimize_for_inference(copy.deepcopy(model))), False)
    oracle = copy.deepcopy(plain).double()(x.double())
    with fused_preact.backend(backend):
        y = optimize_for_inference(model)(x)
    assert_within_policy(what, y, plain(x), oracle)
    return y


def make(name: str, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    build, shape = UNITS[name]
    return disturb(build()).to(device), torch.randn(shape, device=device) + 0.2


# --- the numbers ------------------------------------------------------------------------------------------


@BACKENDS
@ALL_UNITS
def test_units(backend: str, device: str, name: str) -> None:
    model, x = make(name, device)
    compare(model, x, backend)


@BACKENDS
@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(backend: str, device: str, dtype: torch.dtype, memory_format: Any) -> None:
    for name in ("basic-stride", "bottleneck", "sequence"):
        model, x = make(name, device)
        y = compare(model.to(dtype), x.to(dtype, memory_format=memory_format), backend, name)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)


@COMPILED
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 3, 5, 12, 17])
def test_images_and_threads(images: int, threads: int) -> None:
    """Whole rounds of the threads, images left over, and blocks of several images."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, _ = make("sequence")
        compare(model, torch.randn(images, 8, 9, 8))
        compare(model, torch.randn(images, 8, 33, 3))
    finally:
        torch.set_num_threads(before)


@COMPILED
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: PreActBottleneck(256, 256), (2, 256, 56, 56)),
        (lambda: PreActBottleneck(256, 512, 2), (2, 256, 56, 55)),
        (lambda: PreActBasicBlock(64, 64), (3, 64, 56, 57)),
        (lambda: PreActBasicBlock(64, 128, 2), (2, 64, 57, 56)),
        (lambda: PreActBottleneck(1100, 520), (2, 1100, 3, 5)),
    ],
    ids=["bottleneck", "bottleneck-stride", "basic", "basic-stride", "deep"],
)
def test_maps_beyond_the_cache(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Operands of which only some rows are kept at a time, and reductions in several steps."""
    compare(disturb(build()), torch.randn(shape))


@COMPILED
def test_what_the_scratch_holds_does_not_matter() -> None:
    """Borders, padding of channels and accumulators are written before they are read, whatever ran before."""
    for name, (_, shape) in UNITS.items():
        model, x = make(name)
        optimize_for_inference(model)(torch.full(shape, float("nan")))
        compare(model, x, what=name)


@COMPILED
def test_nan_stays_in_its_image() -> None:
    model, x = make("sequence")
    x[3, 0, 0, 0] = float("nan")
    y = optimize_for_inference(model)(x)
    assert y[3].isnan().any()
    assert not y[[0, 1, 2, 4]].isnan().any()


@COMPILED
@pytest.mark.parametrize("images", [1, 5])
def test_networks(images: int) -> None:
    """One chain from the stem to the head, for both families."""
    models = fused_preact.models
    for build, size in (
        (models.cifar_preact_resnet20, 32),
        (models.preact_resnet18, 65),
        (models.preact_resnet50, 48),
    ):
        model = disturb(build(num_classes=7))
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.weight.abs_().mul_(0.5)  # deep networks: keep the sums within range
        compare(model, torch.randn(images, 3, size, size), what=build.__name__)


@COMPILED
def test_one_operation_serves_the_whole_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    chain = torch.ops.fused_preact.unit_chain
    monkeypatch.setattr(torch.ops.fused_preact, "unit_chain", lambda *a: called.append(a) or chain(*a))
    model = disturb(fused_preact.models.cifar_preact_resnet20())
    compare(model, torch.randn(2, 3, 16, 16))
    assert len(called) == 1


STEMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "imagenet": (
        lambda: Stem(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)),
        (2, 3, 37, 30),
    ),
    "bias-and-tails": (lambda: Stem(nn.Conv2d(2, 70, 3, 1, 1), nn.MaxPool2d(2)), (3, 2, 9, 12)),
    "one-pixel": (lambda: Stem(nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(3, 2, 1)), (1, 3, 1, 1)),
    "strides-beyond-windows": (lambda: Stem(nn.Conv2d(2, 5, 2, 3), nn.MaxPool2d(1, 2)), (2, 2, 20, 17)),
}


@COMPILED
@FORMATS
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str, dtype: torch.dtype, memory_format: Any) -> None:
    build, shape = STEMS[name]
    # The unit makes it a model of ours.
    model = nn.Sequential(build(), PreActBasicBlock(1, 1)).eval().to(dtype)
    stem: Any = model[0]
    x = torch.randn(shape).to(dtype, memory_format=memory_format)
    oracle, eager = copy.deepcopy(stem).double()(x.double()), stem(x)
    optimize_for_inference(model)
    stem(torch.full_like(x, float("nan")))
    y = stem(x)
    assert stem._folded._state is not None
    assert_within_policy("y", y, eager, oracle)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    stem[0].weight.mul_(2)
    assert not torch.equal(stem(x), y), "a changed weight is seen"


@COMPILED
def test_stem_of_the_whole_range() -> None:
    """A NaN wins in the pool as in PyTorch's, and nothing else sees it; infinities are values."""
    stem: Any = Stem(nn.Conv2d(1, 3, 1), nn.MaxPool2d(3, 2, 1)).eval()
    x = torch.randn(2, 1, 9, 9)
    x[0, 0, 4, 4], x[1, 0, 0, 0] = float("nan"), -float("inf")
    expected = stem(x)
    y = optimize_for_inference(nn.Sequential(stem, PreActBasicBlock(1, 1)).eval())[0](x)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_float64_and_groups_take_the_reference() -> None:
    model, x = make("sequence")
    compare(model.double(), x.double())
    unit: Any = PreActBottleneck(16, 16)
    unit.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
    compare(disturb(unit), torch.randn(2, 16, 5, 5))


def test_autocast() -> None:
    """The input is cast as always; the result is in autocast's dtype and right by its policy."""
    model, x = make("bottleneck-stride")
    oracle = set_fused(copy.deepcopy(model), False).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = copy.deepcopy(model)(x)
        y = optimize_for_inference(model)(x)
    assert y.dtype == eager.dtype == torch.bfloat16
    assert_within_policy("y", y, eager, oracle)


# --- state -----------------------------------------------------------------------------------------------


def test_state_dict_and_undo() -> None:
    model = disturb(fused_preact.models.cifar_preact_resnet20())
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
    "parameter": lambda m: setattr(m[1].bn2, "weight", nn.Parameter(torch.full((8,), 0.3))),
    "child": lambda m: setattr(m[1], "conv1", nn.Conv2d(32, 8, 1)),
    "batch-norm": lambda m: setattr(m[1], "bn2", nn.BatchNorm2d(8, track_running_stats=False).eval()),
    "unit-added": lambda m: m.append(PreActBottleneck(32, 32).eval()),
    "foreign-added": lambda m: m.append(nn.Hardtanh(-0.1, 0.1)),
    "plain": lambda m: setattr(m[0], "fused", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    model: Any = disturb(PreActSequential(PreActBottleneck(16, 32, 2), PreActBottleneck(32, 32)))
    x = torch.randn(2, 16, 7, 9)
    old = optimize_for_inference(model)(x)
    CHANGES[change](model)
    y = model(x)
    fresh = undo_optimize_for_inference(copy.deepcopy(model))
    assert_within_policy("y", y, fresh(x), copy.deepcopy(fresh).double()(x.double()))
    if change not in ("dtype-and-back", "plain"):
        assert not torch.allclose(y, old, atol=1e-4), "the change shows"


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


# --- what runs as before ------------------------------------------------------------------------------------


def as_before(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The output of ``model``, which must not come from a fold."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a folded chain ran")

    monkeypatch.setattr(inference, "run_chain", refuse)
    monkeypatch.setattr(inference, "run_stem", refuse)
    return model(x)


def test_training_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("sequence")
    fresh = copy.deepcopy(model).train()
    optimize_for_inference(model).train()
    assert torch.equal(as_before(model, x, monkeypatch), fresh(x))
    for (name, a), b in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


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


def test_parametrised_and_foreign_modules() -> None:
    """The units beside them are folded still, and a sequence around foreign code is no chain."""
    parametrised: Any = PreActBottleneck(16, 16)
    torch.nn.utils.parametrizations.weight_norm(parametrised.conv2)
    model: Any = disturb(
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
    packed = k.unit_chain_pack(tensors, spec)
    x = torch.randn(1, 16, 3, 3)
    for call, message in (
        (lambda: k.unit_chain_pack(tensors[:2], spec), "tensors: got 2"),
        (lambda: k.unit_chain_pack([*tensors, tensors[0]], spec), "tensors: got 4"),
        (
            lambda: k.unit_chain_pack([tensors[0], tensors[2], tensors[2]], spec),
            "tensors: got a vector of 256",
        ),
        (lambda: k.unit_chain_pack(tensors, spec[:-1]), "spec: got 12 integers"),
        (lambda: k.unit_chain(x[:, :3], packed, spec), "x: got 3 channels, allowed are 16"),
        (lambda: k.unit_chain(x.double(), packed, spec), "x: got"),
        (lambda: k.unit_chain(x, packed[:-16], spec), "packed: got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
