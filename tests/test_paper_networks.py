"""Networks of every variant: exact parameter counts, first and last units, state dicts, names, inference."""

from __future__ import annotations

import copy

import paper_units
import pytest
import torch
import torch.nn.functional as F
from helpers import disturb, set_fused
from torch import nn

from fused_preact import ResidualUnit, models, optimize_for_inference, undo_optimize_for_inference
from fused_preact.modules import _PreActUnit
from fused_preact.units import BODIES, ORDERS

# (name, options): parameters with 10 and with 100 classes. Those of the named constructors are in test_models.py.
CIFAR = [
    ("cifar_preact_resnet110", {"body": "single"}, 1_727_962, 1_733_812),
    ("cifar_resnet110", {"shortcut": "B"}, 1_730_714, 1_736_564),
    ("cifar_resnet110", {"shortcut": "exclusive_gating:-6"}, 1_824_186, 1_830_036),
    ("cifar_resnet110", {"shortcut": "shortcut_gating:0"}, 1_824_186, 1_830_036),
    ("cifar_resnet110", {"shortcut": "conv"}, 1_826_202, 1_832_052),
    ("cifar_resnet110", {"shortcut": "scaling:0.5:0.5"}, 1_727_962, 1_733_812),
    ("cifar_resnet110", {"shortcut": "dropout"}, 1_727_962, 1_733_812),
    ("cifar_resnet164", {}, 1_704_154, 1_727_284),
    ("cifar_resnet1001", {}, 10_328_602, 10_351_732),
    ("cifar_resnet1202", {}, 19_421_274, 19_427_124),
]
IMAGENET = [
    (18, 11_689_512),
    (34, 21_797_672),
    (50, 25_557_032),
    (101, 44_549_160),
    (152, 60_192_808),
    (200, 64_673_832),
]


def parameters(name: str, num_classes: int, **options: object) -> int:
    with torch.device("meta"):
        model = models.create(name, num_classes=num_classes, **options)  # type: ignore[arg-type]
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "options", "ten", "hundred"), CIFAR)
def test_parameters_on_cifar(name: str, options: dict[str, str], ten: int, hundred: int) -> None:
    assert (parameters(name, 10, **options), parameters(name, 100, **options)) == (ten, hundred)


@pytest.mark.parametrize("body", ["basic", "single"])
@pytest.mark.parametrize("order", ORDERS)
def test_same_components_in_every_order(order: str, body: str) -> None:
    """Only the orders are different (Fig. 4): five ResNet-110 of the same parameters, with 1-layer skips too."""
    found = parameters("cifar_resnet110", 10, order=order, body=body)
    assert (found, parameters("cifar_resnet110", 100, order=order, body=body)) == (1_727_962, 1_733_812)


@pytest.mark.parametrize(("depth", "count"), IMAGENET)
def test_parameters_on_imagenet(depth: int, count: int) -> None:
    assert parameters(f"resnet{depth}", 1000) == count


DEPTHS = {"single": 5, "basic": 8, "bottleneck": 11}


def small(order: str, body: str, shortcut: str | None, fused: bool = True) -> nn.Module:
    """Three units, or six single ones; every rule of the paper's larger networks."""
    torch.manual_seed(2)
    name, options = f"cifar_resnet{DEPTHS[body]}", {"order": order, "body": body, "shortcut": shortcut}
    return disturb(models.create(name, num_classes=5, fused=fused, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("shortcut", ["A", "B", "shortcut_gating:-2"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("order", ORDERS)
def test_networks_are_those_of_the_paper(order: str, body: str, shortcut: str) -> None:
    """Stem, first and last unit, head: logits, gradients and statistics in float64, fused and plain."""
    plain = small(order, body, shortcut, fused=False).double()
    fused = small(order, body, shortcut).double()
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x, target = torch.randn(3, 3, 9, 8, dtype=torch.float64), torch.tensor([0, 4, 2])
    for training in (True, False):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in plain.named_parameters()}
        p = paper_units.Tensors({n: b.clone() for n, b in plain.named_buffers()} | leaves, training)
        units = len(plain.stages[0])
        logits = paper_units.cifar(p, x, order, shortcut, body, units)
        F.cross_entropy(logits, target).backward()
        for model in (plain.train(training), fused.train(training)):
            model.zero_grad()
            found = model(x)
            torch.testing.assert_close(found, logits, rtol=1e-10, atol=1e-10)
            F.cross_entropy(found, target).backward()
            for name, parameter in model.named_parameters():
                expected = leaves[name].grad
                error = (parameter.grad - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
                assert error < 1e-8, f"{name}: relative error of the gradient {error:.1e}"
            buffers = dict(model.named_buffers())
            for name, value in p.tracked.items():
                torch.testing.assert_close(buffers[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_bodies_and_widths() -> None:
    """Units a stage, channels, and the stride on the first 1x1 on CIFAR and on the 3x3 on ImageNet."""
    with torch.device("meta"):
        deep, skip = models.cifar_resnet(29), models.cifar_resnet(110, body="single")
        wide = models.imagenet_resnet(50)
    assert [len(stage) for stage in deep.stages] == [3, 3, 3]
    assert [len(stage) for stage in skip.stages] == [36, 36, 36]
    assert [unit.body for unit in deep.stages[0]] == ["bottleneck"] * 3
    assert deep.fc.in_features == 256
    assert deep.stages[1][0].conv1.stride == wide.stages[1][0].conv2.stride == (2, 2)
    assert [type(m).__name__ for m in wide.stem] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]


def test_full_preactivation_stays_what_it_was() -> None:
    """Units of the classes and with the names that checkpoints have; every other combination is a ResidualUnit."""
    with torch.device("meta"):
        own = models.create("cifar_resnet20", num_classes=10, order="preact")
        other = models.create("cifar_preact_resnet20", num_classes=10, shortcut="dropout")
        named = models.cifar_preact_resnet20()
    assert own.state_dict().keys() == named.state_dict().keys() == other.state_dict().keys()
    assert isinstance(own, models.PreActResNet)
    assert all(isinstance(unit, _PreActUnit) for stage in own.stages for unit in stage)
    assert all(isinstance(unit, ResidualUnit) for stage in other.stages for unit in stage)


def test_names() -> None:
    """What is listed (most of them are built for their parameters above); CIFAR names of other depths build too."""
    listed = models.list_models()
    assert len(listed) == len(set(listed)) == 28
    assert {"cifar_resnet110", "cifar_preact_resnet1001", "resnet18", "preact_resnet200"} <= set(listed)
    assert models.list_models("preact_*") == [f"preact_resnet{d}" for d in (18, 34, 50, 101, 152, 200)]
    with torch.device("meta"):
        for name in ("cifar_resnet32", "cifar_preact_resnet44"):
            assert models.create(name, num_classes=10).fc.out_features == 10
        assert len(models.create("cifar_preact_resnet29", num_classes=10).stages[2]) == 3


BAD = [
    (("resnet51", {}), ["name", "'resnet51'", "resnet50"]),
    (("cifar_resnet30", {}), ["depth", "30", "110", "6n+2 and 9n+2"]),
    (("cifar_resnet29", {"body": "basic"}), ["depth", "29", "6n+2", "basic"]),
    (
        ("cifar_preact_resnet20", {"order": "original"}),
        ["order", "'original'", "'cifar_resnet20'", "'preact'"],
    ),
    (("cifar_resnet20", {"order": "post"}), ["order", "'post'", *ORDERS]),
    (("cifar_resnet20", {"body": "deep"}), ["body", "'deep'", *BODIES]),
    (("cifar_resnet20", {"shortcut": "D"}), ["shortcut", "'D'", "'A'", "'dropout[:p]'"]),
    (("resnet50", {"body": "basic"}), ["body", "'basic'", "'bottleneck'"]),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_what_is_not_there(call: tuple[str, dict[str, str]], words: list[str]) -> None:
    name, options = call
    with pytest.raises(ValueError, match=words[0]) as raised:
        models.create(name, num_classes=10, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(raised.value), raised.value


@pytest.mark.parametrize("shortcut", [None, "scaling:0.5", "exclusive_gating:-1", "dropout"])
@pytest.mark.parametrize("order", ORDERS)
def test_inference_folds_what_it_knows(order: str, shortcut: str | None) -> None:
    """The same logits; full pre-activation units are folded, others run as they are, also beside folded ones."""
    model = small(order, "basic", shortcut).eval()
    if shortcut and order == "preact":
        model.stages[2] = small(order, "basic", None).stages[2].eval()
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        expected = set_fused(copy.deepcopy(model), False)(x)
        found = optimize_for_inference(model)(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        folded = [m for m in model.stages.modules() if getattr(m, "_folded", None) is not None]
        assert bool(folded) == (order == "preact")
        undo_optimize_for_inference(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_other_units_is_left_alone() -> None:
    model = nn.Sequential(ResidualUnit(4, 4)).eval()
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(optimize_for_inference(model)(x), model[0](x))


def test_single_units_are_folded() -> None:
    model = small("preact", "single", None).eval()
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        expected = set_fused(copy.deepcopy(model), False)(x)
        torch.testing.assert_close(optimize_for_inference(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.stages._folded is not None
