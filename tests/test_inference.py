"""Folded inference beside the float64 plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, COMPILED, FORMATS, assert_within_policy, set_fused
from inference_helpers import ALL_UNITS, UNITS, awkward, compare, make
from torch import nn

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    optimize_for_inference,
)
from fused_preact.modules import Stem

pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32", "without_gradients")


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
    compare(awkward(build()), torch.randn(shape))


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
        model = awkward(build(num_classes=7))
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.weight.abs_().mul_(0.5)  # deep networks: keep the sums within range
        compare(model, torch.randn(images, 3, size, size), what=build.__name__)


@COMPILED
def test_one_operation_serves_the_whole_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    chain = torch.ops.fused_preact.unit_chain
    monkeypatch.setattr(torch.ops.fused_preact, "unit_chain", lambda *a: called.append(a) or chain(*a))
    model = awkward(fused_preact.models.cifar_preact_resnet20())
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
    compare(awkward(unit), torch.randn(2, 16, 5, 5))


def test_autocast() -> None:
    """The input is cast as always; the result is in autocast's dtype and right by its policy."""
    model, x = make("bottleneck-stride")
    oracle = set_fused(copy.deepcopy(model), False).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = copy.deepcopy(model)(x)
        y = optimize_for_inference(model)(x)
    assert y.dtype == eager.dtype == torch.bfloat16
    assert_within_policy("y", y, eager, oracle)
