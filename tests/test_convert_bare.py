"""Found beside BN -> ReLU -> convolution: sites without a ReLU, 1x1 pools that subsample; what is left of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import assert_same_step, awkward, pair, watching
from torch import Tensor, nn

from fused_preact import fuse
from fused_preact.convert.backend import backend
from fused_preact.convert.report import explain

pytestmark = pytest.mark.filterwarnings("ignore:.*found nothing to fuse")

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Probe(nn.Module):
    """Norms and convolutions that ``run`` puts together."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], channels: int = 6) -> None:
        super().__init__()
        self.run = run
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.wide = nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.pool = nn.AvgPool2d(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def zero_channels(x: Tensor) -> Tensor:
    """Option A: as many channels of zeros behind the others."""
    return torch.cat([x, x * 0], 1)


def option_a(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.bn1(x))
    return m.wide(a) + zero_channels(m.pool(a))


def in_place(m: Any, x: Tensor) -> Tensor:
    z = m.bn1(x * 1)
    y = m.conv1(z)
    return y.add_(z)


# What runs, and how many sites and additions of it are fused.
FOUND: dict[str, tuple[Callable[[Any, Tensor], Tensor], int, int]] = {
    "site": (lambda m, x: m.conv1(m.bn1(x)), 1, 0),
    "padded": (lambda m, x: m.conv1(F.pad(m.bn1(x), (1, 1, 2, 2))), 1, 0),
    "bare, then with a ReLU": (lambda m, x: m.conv2(m.bn2(m.conv1(m.bn1(x))).relu()) + x, 2, 1),
    "with a ReLU, then bare": (lambda m, x: x + m.conv2(m.bn2(m.conv1(m.bn1(x).relu()))), 2, 1),
    "the normalised tensor as shortcut": (in_place, 1, 1),
    "a projection of it": (lambda m, x: (lambda z: m.conv1(z) + m.skip(z))(m.bn1(x)), 2, 1),
    "two readers": (lambda m, x: (lambda z: m.conv1(z) * m.conv2(z))(m.bn1(x)), 2, 0),
    "option A": (option_a, 1, 1),
    "option A, bare": (lambda m, x: (lambda z: m.wide(z) + zero_channels(m.pool(z)))(m.bn1(x)), 1, 1),
    "option A in functions": (
        lambda m, x: (lambda a: zero_channels(F.avg_pool2d(a, 1, (2, 2))) + m.wide(a))(m.bn1(x).relu()), 1, 1,
    ),
    "subsampled beside a sum": (
        lambda m, x: (lambda a: m.pool(m.conv1(a) + x) + m.pool(a))(m.bn1(x).relu()), 1, 1,
    ),
}  # fmt: skip
# And why nothing of it is.
LEFT: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "read by a ReLU too": (
        lambda m, x: (lambda z: m.conv1(z) * z.relu())(m.bn1(x)), "the normalised tensor is needed by relu too",
    ),
    "the output": (
        lambda m, x: (lambda z: m.conv1(z) * z.sum())(m.bn1(x)), "the normalised tensor is needed by sum too",
    ),
    "a larger window": (
        lambda m, x: (lambda a: m.wide(a) + zero_channels(F.avg_pool2d(a, 2)))(m.bn1(x).relu()),
        "the activation is needed by avg_pool2d too",
    ),
}  # fmt: skip


@MODES
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, training: bool) -> None:
    run, sites, additions = FOUND[name]
    plain, fused = pair(awkward(Probe(run)).train(training))
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    assert_same_step(plain, fused, x, steps=2, lr=0.01)
    with watching(fused) as ran:
        fused(x)
    assert (len(ran.sites), ran.additions, ran.composites) == (sites, additions, 0)
    told = explain(fused)
    assert told.summary.startswith(f"{sites} of {sites} sites fused"), told
    assert sum(row.kind == "pool" for row in told.rows) == name.startswith(("option", "subsampled"))


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    run, reason = LEFT[name]
    plain, fused = pair(awkward(Probe(run)))
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    assert_same_step(plain, fused, x)
    with watching(fused) as ran:
        fused(x)
    assert ran.sites == []
    assert [row.reason for row in explain(fused).rows if row.kind == "site"] == [reason]


def test_a_pool_alone_stays_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(1, 2))
    assert fuse(model) is model
    assert not any("forward" in m.__dict__ for m in model.modules())


@MODES
def test_subsampling_under_autocast_is_no_convolution(training: bool) -> None:
    """A pool keeps float32, and so must what stands for it."""
    torch.manual_seed(3)
    plain, fused = pair(awkward(Probe(lambda m, x: (m.wide(a := m.bn1(x).relu()).sum(), m.pool(a)))).float())
    plain.train(training)
    fused.train(training)
    x = torch.randn(2, 6, 8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)[1]
        with watching(fused) as ran:
            actual = fused(x)[1]
    assert len(ran.sites) == 1
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("functional", [False, True], ids=["module", "function"])
def test_an_image_is_left_to_pytorch(channels: int, functional: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(m.bn1(x), m.wide.weight, None, 2, 1) if functional else m.wide(m.bn1(x))

    model = awkward(Probe(run, channels))
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    fuse(model)
    with watching(model) as ran:
        torch.testing.assert_close(model(x), expected)
    assert len(ran.sites) == (channels == 4)
    rows = [row.reason for row in explain(model).rows]
    assert rows == ["" if channels == 4 else f"reads {channels} channels, which is faster one by one"]


@pytest.mark.parametrize("name", ["bare, then with a ReLU", "option A"])
def test_both_doors(name: str) -> None:
    run, sites, additions = FOUND[name]
    torch._dynamo.reset()
    model = awkward(Probe(run))
    plain = copy.deepcopy(model)
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend, options={"then": "eager"}, fullgraph=True)
    with watching(model) as ran:
        torch.testing.assert_close(compiled(x), plain(x))
    assert (len(ran.sites), ran.additions) == (sites, additions)


def test_dynamo_leaves_an_image_too() -> None:
    torch._dynamo.reset()
    model = awkward(Probe(lambda m, x: m.wide(m.bn1(x)), 3))
    compiled = torch.compile(model, backend=backend, options={"then": "eager"}, fullgraph=True)
    with watching(model) as ran:
        compiled(torch.randn(2, 3, 8, 6, dtype=torch.float64))
    assert ran.sites == []
