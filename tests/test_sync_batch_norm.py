"""``nn.SyncBatchNorm`` children run fused: two processes are one on the joined batch (tests/sync_ranks.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sync_ranks
import torch
import torch.distributed as dist
from definitions import DEFINITIONS
from helpers import disturb
from torch import Tensor, nn

import fused_preact
from fused_preact import PreActBasicBlock, PreActConv2d, functional, models
from fused_preact.calls import is_batch_norm
from fused_preact.collective import Group
from fused_preact.convert.eager import FusedForward
from fused_preact.functional import BatchNorm

pytestmark = [
    pytest.mark.xdist_group("sync_batch_norm"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed"),
]
SCENARIOS = [
    pytest.param(
        name,
        marks=[pytest.mark.skipif(fused_preact.ops._cpu_missing is not None, reason="no compiled kernels")]
        if name.startswith("compiled-kernels")
        else [],
    )
    for name in sync_ranks.NAMES
]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks(name: str, two_ranks: Callable[[str], None]) -> None:
    two_ranks(name)


# --- one process: there a SyncBatchNorm is a BatchNorm2d ------------------------------------------------------


def both(module: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """What ``module`` and its converted copy compute: output, gradients, buffers."""
    found = []
    for made in (module, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))):
        inside = x.clone().requires_grad_()
        y = made(inside)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in made.named_parameters()}
        found.append({"y": y.detach(), "dx": inside.grad, **grads, **dict(made.named_buffers())})
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The BNs that run by themselves from now on."""
    called: list[Any] = []
    batch_norm = torch.nn.functional.batch_norm

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        called.append(args)
        return batch_norm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "batch_norm", noted)
    return called


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("unit", [*sync_ranks.UNITS, "network"])
def test_without_a_process_group(unit: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build = sync_ranks.net if unit == "network" else sync_ranks.UNITS[unit]
    channels = {"network": 3, "bottleneck": 12}.get(unit, 6)
    called = children(monkeypatch)
    same(*both(disturb(build()).train(training), torch.randn(3, channels, 6, 6)))
    assert called == [], "a child ran by itself"


class WithActivation(nn.SyncBatchNorm):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Checking(nn.SyncBatchNorm):
    """A subclass that checks something else."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.shape[0] != 2:
            raise ValueError("two images")


@pytest.mark.parametrize("what", ["subclass", "check", "instance", "hook", "patched"])
def test_what_is_no_plain_sync_batch_norm_runs_by_itself(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit: Any = nn.SyncBatchNorm.convert_sync_batchnorm(disturb(PreActBasicBlock(4, 4)))
    x = torch.randn(2, 4, 3, 3)
    assert is_batch_norm(unit.bn2)
    if what == "subclass":
        unit.bn2 = WithActivation(4)
    elif what == "check":
        unit.bn2 = Checking(4)
    elif what == "instance":
        unit.bn2.forward = lambda z: z + 1
    elif what == "hook":
        unit.bn2.register_forward_hook(lambda module, args, output: output * 2)
    else:
        forward = nn.SyncBatchNorm.forward
        monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, z: forward(self, z) + 1)
    expected = copy.deepcopy(unit)
    expected.fused = False
    torch.testing.assert_close(unit(x), expected(x), rtol=0, atol=0)


def test_evaluation_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether statistics are shared is decided at each call, as PyTorch decides it."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "group", type("group", (), {"WORLD": type("World", (), {"group_name": "0"})()}))
    bn = nn.SyncBatchNorm(3)
    assert BatchNorm.of(bn).group == Group("0", 2)
    assert BatchNorm.of(bn.eval()).group is None
    assert BatchNorm.of(nn.SyncBatchNorm(3, track_running_stats=False).eval()).group is None
    monkeypatch.setattr(dist, "get_world_size", lambda group: -1)  # no member of it
    assert BatchNorm.of(bn.train()).group is None


def test_a_group_without_training_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"bn\.group: got Group.*training=False"):
        functional.bn_relu_avg_pool2d(torch.randn(2, 3, 4, 4), BatchNorm(group=Group("0", 2)))


def test_folded_inference() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(disturb(models.cifar_preact_resnet20())).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        folded = fused_preact.optimize_for_inference(model)(x)
    assert model.stages[0][0].__dict__.get("_folded") or model.stages.__dict__.get("_folded")
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["kuangliu_18", "spellings", "timm_resnetv2_18d"])
@pytest.mark.parametrize("before", [True, False], ids=["converted-then-fused", "fused-then-converted"])
def test_conversion_of_definitions(name: str, before: bool) -> None:
    """A converted model is what the plain model would be, converted: timm's subclasses have lost their ReLUs, and
    their sites run fused without them.
    """
    definition = DEFINITIONS[name]
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(definition.build())
    if before:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(definition.build())
        fused_preact.fuse(model)
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(fused_preact.fuse(definition.build()))
    for training in (True, False):
        x = torch.randn(definition.shape, dtype=torch.float64)
        expected = plain.double().train(training)(x)
        torch.testing.assert_close(model.double().train(training)(x), expected, rtol=1e-9, atol=1e-9)
    matches = sum(
        m.__dict__["forward"].matches
        for m in model.modules()
        if isinstance(m.__dict__.get("forward"), FusedForward)
    )
    assert matches > 0


class SyncBatchNormAct(nn.SyncBatchNorm):
    """What timm's own conversion puts in the place of its norms."""

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_activation_inside_is_kept_by_those_who_keep_it(training: bool) -> None:
    """Such modules run as they are written; the sites around them are fused."""
    plain: Any = disturb(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), SyncBatchNormAct(4)))
    plain[3].act = nn.ReLU()
    plain.append(nn.Conv2d(4, 4, 1)).train(training)
    model = fused_preact.fuse(copy.deepcopy(plain))
    assert model.forward.matches == 1
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), plain(x))
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_relu_of_ours_is_not_lost() -> None:
    """The ReLU is no child of our modules: conversion leaves it where it is."""
    site: Any = disturb(PreActConv2d(4, 4, 1)).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = site(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(site)(x), expected, rtol=0, atol=0)
