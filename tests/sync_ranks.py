"""What two processes compute together with synchronised BNs, beside one process on the joined batch.

A process of the fixture ``two_ranks`` (tests/conftest.py) runs every scenario that is asked for, of this file and of
tests/workflows_ranks.py, and writes what was wrong with each: comparisons note
and do not raise, so that both ranks go on to the next. Each rank also computes the joined batch by itself, with plain
``nn.BatchNorm2d`` modules run one by one.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import definitions
import torch
import torch.distributed as dist
from helpers import assert_within_policy, disturb, set_fused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_preact
from fused_preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActConv2d,
    PreActSequential,
    functional,
    models,
)
from fused_preact.functional import BatchNorm, Convolution, Statistics

Build = Callable[[], nn.Module]
SCENARIOS: dict[str, Callable[[], None]] = {}
wrong: list[str] = []


def scenario(name: str, /, **arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function under ``name``, to be called with ``arguments``."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        assert name not in SCENARIOS
        SCENARIOS[name] = lambda: function(**arguments)
        return function

    return register


def note(condition: bool, what: str) -> None:
    if not condition:
        wrong.append(what)


def close(name: str, actual: Tensor | None, expected: Tensor | None) -> None:
    """Of one magnitude with the largest element, in float64."""
    if actual is None or expected is None:
        return note(actual is expected, f"{name}: one of them is None")
    if actual.shape != expected.shape:
        return note(False, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if expected.numel():
        error = float((actual.double() - expected.double()).abs().max())
        note(error <= 1e-10 * max(1.0, float(expected.abs().max())), f"{name}: error {error:.1e}")


def joined(tensor: Tensor) -> list[Tensor]:
    """The tensor of each rank; all of one shape."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def same_bits(module: nn.Module) -> None:
    """Buffers are the same on all ranks, to the last bit."""
    for name, buffer in module.named_buffers():
        first, second = joined(buffer)
        note(torch.equal(first, second), f"{name}: the ranks differ")


def mine(tensor: Tensor, split: tuple[int, int]) -> Tensor:
    return tensor.split(list(split))[dist.get_rank()]


def synchronised(module: nn.Module, group: Any = None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module), group)


def net(width: int = 4) -> nn.Module:
    units = [
        PreActSequential(PreActBasicBlock(width, width)),
        PreActSequential(PreActBottleneck(width, 8, 2)),
    ]
    return models.PreActResNet(nn.Sequential(nn.Conv2d(3, width, 3, padding=1)), units, 8, 3, True)


def step(module: nn.Module, x: Tensor, dy: Tensor, needs_x: bool = True) -> tuple[Tensor, Tensor | None]:
    x = x.detach().clone().requires_grad_(needs_x)
    y = module(x)
    if y.requires_grad:
        y.backward(dy)
    return y.detach(), x.grad


def grads(module: nn.Module, summed: bool) -> dict[str, Tensor | None]:
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is not None and summed:
            dist.all_reduce(grad := grad.clone())
        found[name] = grad
    return found


def compare(
    build: Build,
    shape: tuple[int, ...] = (4, 6, 5, 7),
    split: tuple[int, int] = (2, 2),
    prepare: Callable[[nn.Module], Any] = lambda module: None,
    steps: int = 1,
    needs_x: bool = True,
    wrap: Callable[[nn.Module], Callable[..., Tensor]] = lambda module: module,
) -> None:
    """Float64: two ranks are one process on the joined batch, after ``prepare(module)``."""
    plain = set_fused(disturb(build()).double(), False)
    sync = set_fused(synchronised(plain), True)
    prepare(plain)
    prepare(sync)
    call: Any = wrap(sync)
    for _ in range(steps):
        x = torch.randn(sum(split), *shape[1:], dtype=torch.float64)
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(plain)(x))
        expected_y, expected_dx = step(plain, x, dy, needs_x)
        y, dx = step(call, mine(x, split), mine(dy, split), needs_x)
        close("y", y, mine(expected_y, split))
        if needs_x:
            close("dx", dx, None if expected_dx is None else mine(expected_dx, split))
    expected = grads(plain, False)
    for name, grad in grads(sync, True).items():
        close(name, grad, expected[name])
    for (name, actual), wanted in zip(sync.named_buffers(), plain.buffers(), strict=True):
        close(name, actual, wanted)
    same_bits(sync)


UNITS: dict[str, Build] = {
    "site": lambda: PreActConv2d(6, 5, 3, 2, 1),
    "site-without-affine": lambda: PreActConv2d(6, 5, 1, affine=False),
    "site-untracked": lambda: PreActConv2d(6, 5, 1, track_running_stats=False),
    "site-grouped": lambda: PreActConv2d(6, 9, 3, padding=1, groups=3),
    "basic": lambda: PreActBasicBlock(6, 6),
    "basic-projection": lambda: PreActBasicBlock(6, 9, 2),
    "basic-zero-padding": lambda: PreActBasicBlock(6, 9, 2, shortcut="A"),
    "bottleneck": lambda: PreActBottleneck(12, 12),
    "bottleneck-projection": lambda: PreActBottleneck(6, 12, 2),
    "row": lambda: PreActSequential(
        PreActBasicBlock(6, 6), PreActBasicBlock(6, 8, 2), PreActBottleneck(8, 8)
    ),
}
for unit, build in UNITS.items():
    scenario(f"unit-{unit}", build=build, shape=(4, 12 if unit == "bottleneck" else 6, 5, 7))(compare)
scenario("network", build=net, shape=(4, 3, 8, 8))(compare)

# Batches.
for kind, split in {"unequal": (3, 1), "empty-second": (3, 0), "empty-first": (0, 3)}.items():
    scenario(f"batch-{kind}-row", build=UNITS["row"], split=split)(compare)
    scenario(f"batch-{kind}-network", build=net, shape=(4, 3, 8, 8), split=split)(compare)
scenario("batch-one-value-each", build=UNITS["basic"], shape=(2, 6, 1, 1), split=(1, 1))(compare)


@scenario("batch-empty-everywhere")
def empty_everywhere() -> None:
    sync: Any = synchronised(disturb(PreActConv2d(6, 5, 1)))
    before = sync.bn.running_mean.clone(), sync.bn.running_var.clone()
    y, dx = step(sync, torch.randn(0, 6, 3, 3), torch.randn(0, 5, 3, 3))
    note(y.shape == (0, 5, 3, 3), "shape of y")
    note(dx is not None and dx.shape == (0, 6, 3, 3), "shape of dx")
    note(torch.equal(sync.bn.running_mean, before[0]), "running_mean changed")
    note(torch.equal(sync.bn.running_var, before[1]), "running_var changed")
    note(int(sync.bn.num_batches_tracked) == 1, "num_batches_tracked")


# Settings.
def cumulative(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.momentum = None


def frozen(*names: str) -> Callable[[nn.Module], None]:
    """Prepares a module whose parameters of these prefixes, or with "only" all but those, are frozen."""

    def prepare(module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(names) != (names[0] != "only"))

    return prepare


scenario("momentum-none", build=UNITS["basic-projection"], prepare=cumulative, steps=3, split=(3, 1))(compare)
scenario("two-steps", build=UNITS["bottleneck-projection"], steps=2)(compare)
for what, names in {
    "first-norm": ("bn1",),
    "norms": ("bn",),
    "convolutions": ("conv", "shortcut"),
    "all-but-the-last-convolution": ("only", "conv2"),
    "all": ("",),
}.items():
    for needs_x in (True, False):
        scenario(
            f"frozen-{what}-{'with' if needs_x else 'without'}-dx",
            build=UNITS["basic-projection"],
            prepare=frozen(*names),
            needs_x=needs_x,
        )(compare)
scenario("eval", build=net, shape=(4, 3, 8, 8), prepare=lambda m: m.eval())(compare)
scenario(
    "one-norm-in-eval", build=lambda: PreActBottleneck(6, 12, 2), prepare=lambda m: m.bn2.eval(), steps=2
)(compare)
scenario(
    "checkpoint",
    build=UNITS["row"],
    wrap=lambda m: lambda x: checkpoint(m, x, use_reentrant=False),
)(compare)
scenario(
    "compiled",
    build=net,
    shape=(4, 3, 8, 8),
    wrap=lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
)(compare)


@scenario("group-of-one")
def group_of_one() -> None:
    """As plain BatchNorm2d, each rank by itself."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    plain = disturb(PreActBasicBlock(6, 9, 2)).double()
    sync = synchronised(plain, groups[dist.get_rank()])
    torch.manual_seed(dist.get_rank())
    x, dy = torch.randn(2, 6, 5, 5).double(), torch.randn(2, 9, 3, 3).double()
    for name, a, b in zip(("y", "dx"), step(sync, x, dy), step(plain, x, dy), strict=True):
        note(a is not None and b is not None and torch.equal(a, b), name)
    for (name, a), b in zip(sync.named_buffers(), plain.buffers(), strict=True):
        note(torch.equal(a, b), name)


scenario(
    "group-other-than-the-world",
    build=UNITS["basic"],
    prepare=lambda m: [
        setattr(child, "process_group", OTHER[0])
        for child in m.modules()
        if isinstance(child, nn.SyncBatchNorm)
    ],
)(compare)
OTHER: list[Any] = []


@scenario("given-statistics")
def given_statistics() -> None:
    """A producer's statistics are this rank's: of a row with foreign code in between, and given by hand."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5).double()
    local = mine(x, (3, 1)).requires_grad_()
    var, mean = torch.var_mean(local.detach(), (0, 2, 3), correction=0)
    sync: Any = synchronised(PreActConv2d(6, 5, 1).double())
    bn, conv = BatchNorm.of(sync.bn), Convolution.of(sync.conv)
    given = functional.preact_site(local, bn, conv, statistics=Statistics(mean, var))
    note(torch.equal(given, functional.preact_site(local, bn, conv)), "y of a site")
    pooled = functional.bn_relu_avg_pool2d(local, bn, Statistics(mean, var))
    note(torch.equal(pooled, functional.bn_relu_avg_pool2d(local, bn)), "y of the head")


class AsPyTorch(torch.autograd.Function):
    """What PyTorch's own, which refuses CPU tensors, computes and sends (torch/nn/modules/_functions.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        channels, count = x.shape[1], x.numel() // x.shape[1]
        message = x.new_zeros(2 * channels + 1)
        if count:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            message = torch.cat([mean, (var + eps).rsqrt(), mean.new_full((1,), count)])
        rows = torch.stack(joined(message))
        means, rstds, counts = rows[rows[:, -1] >= 1].split([channels, channels, 1], 1)
        mean = (means * counts).sum(0) / counts.sum()
        squares = (means - mean).square() + rstds.pow(-2) - eps
        rstd = ((squares * counts).sum(0) / counts.sum() + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd, counts.sum())
        column = (1, -1, 1, 1)
        return (x - mean.view(column)) * (rstd * weight).view(column) + bias.view(column)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, weight, mean, rstd, total = ctx.saved_tensors
        column = (1, -1, 1, 1)
        centred = x - mean.view(column)
        local = torch.cat([dz.sum((0, 2, 3)), (dz * centred).sum((0, 2, 3))])
        both = local.clone()
        dist.all_reduce(both)
        sum_g, sum_gx = both.chunk(2)
        dx = dz - (sum_g / total).view(column) - centred * (rstd.square() * sum_gx / total).view(column)
        return dx * (rstd * weight).view(column), rstd * local.chunk(2)[1], local.chunk(2)[0], None


@scenario("one-rank-child-by-child", split=(3, 1))
@scenario("one-rank-child-by-child-and-empty", split=(3, 0))
def child_by_child(split: tuple[int, int]) -> None:
    """A hook on one rank: there PyTorch's own modules run, and both say and hear the right thing."""
    plain: Any = set_fused(disturb(PreActBasicBlock(6, 9, 2)).double(), False)
    sync: Any = set_fused(synchronised(plain), True)
    if dist.get_rank() == 1:
        sync.fused = False
        for bn in (sync.bn1, sync.bn2):
            bn.forward = lambda x, bn=bn: AsPyTorch.apply(x, bn.weight, bn.bias, bn.eps)
    x = torch.randn(sum(split), 6, 5, 5, dtype=torch.float64)
    dy = torch.randn(sum(split), 9, 3, 3, dtype=torch.float64)
    expected = step(plain, x, dy)
    found = step(sync, mine(x, split), mine(dy, split))
    for name, actual, wanted in zip(("y", "dx"), found, expected, strict=True):
        assert wanted is not None
        close(name, actual, mine(wanted, split))
    expected_grads = grads(plain, False)
    for name, grad in grads(sync, True).items():
        close(name, grad, expected_grads[name])


# Kernels.
def within_policy(build: Build, backend: str, dtype: torch.dtype, split: tuple[int, int] = (3, 2)) -> None:
    """As :func:`compare`, with kernels and against eager PyTorch on the joined batch in the same dtype."""
    plain = set_fused(disturb(build()), False).to(dtype)
    oracle = copy.deepcopy(plain).double()
    sync = set_fused(synchronised(plain), True)
    x = (torch.randn(sum(split), 6, 7, 5) * 1.5 + 3).to(dtype)
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(plain)(x))
    with fused_preact.backend(backend):
        y, dx = step(sync, mine(x, split), mine(dy, split))
    eager, exact = step(plain, x, dy), step(oracle, x.double(), dy.double())

    def check(name: str, actual: Tensor, eager: Tensor, exact: Tensor, ulps: float) -> None:
        try:
            assert_within_policy(name, actual, eager, exact, ulps=ulps)
        except AssertionError as error:
            note(False, str(error))

    for name, actual, a, b, ulps in zip(("y", "dx"), (y, dx), eager, exact, (4, 8), strict=True):
        assert actual is not None
        assert a is not None
        assert b is not None
        check(name, actual, mine(a, split), mine(b, split), ulps)
    eager_grads, exact_grads = grads(plain, False), grads(oracle, False)
    for name, grad in grads(sync, True).items():
        a, b = eager_grads[name], exact_grads[name]
        assert grad is not None
        assert a is not None
        assert b is not None
        check(name, grad, a, b, 16)
    eager_buffers, exact_buffers = dict(plain.named_buffers()), dict(oracle.named_buffers())
    for name, buffer in sync.named_buffers():
        if buffer.is_floating_point():
            check(name, buffer, eager_buffers[name], exact_buffers[name], 4)
        else:
            note(torch.equal(buffer, exact_buffers[name]), name)
    same_bits(sync)


for name in ("site", "basic", "basic-projection", "bottleneck-projection", "row"):
    scenario(f"compiled-kernels-{name}", build=UNITS[name], backend="cpu", dtype=torch.float32)(within_policy)
scenario("compiled-kernels-bf16", build=UNITS["basic-projection"], backend="cpu", dtype=torch.bfloat16)(
    within_policy
)
scenario("compiled-kernels-empty", build=UNITS["row"], backend="cpu", dtype=torch.float32, split=(3, 0))(
    within_policy
)
scenario("interpreter", build=UNITS["bottleneck-projection"], backend="triton", dtype=torch.float32)(
    within_policy
)
scenario("reference", build=UNITS["bottleneck-projection"], backend="reference", dtype=torch.float32)(
    within_policy
)


@scenario("compiled-kernels-large-mean")
def large_mean() -> None:
    """A channel far from zero, constant ones, and one with NaN on one rank."""
    sync: Any = synchronised(PreActConv2d(8, 2, 1))
    x = torch.randn(7, 8, 8, 8) * 0.5 + 1e4
    # Of two of these the mean of means, weighted 6 to 1, is off by an ulp.
    x[:, 1:7] = torch.linspace(1.1e6, 8.3e6, 6).view(1, 6, 1, 1)
    x[0, 7] = torch.nan
    sync(mine(x, (6, 1)))
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    expected = 0.9 + 0.1 * var[0].item(), 0.1 * mean[0].item()
    note(abs(float(sync.bn.running_var[0]) - expected[0]) < 1e-5, f"var {sync.bn.running_var[0]}, {expected}")
    note(abs(float(sync.bn.running_mean[0]) - expected[1]) < 1e-3, "mean")
    constant = sync.bn.running_var[1:7]
    note(bool(((constant - 0.9).abs() < 1e-6).all()), f"variances of constant channels {constant}")
    note(sync.bn.running_var.isnan().tolist() == [False] * 7 + [True], "NaN in other channels")


# DistributedDataParallel.
@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def parallel(split: tuple[int, int] = (2, 2), accumulate: bool = False, **options: bool) -> None:
    """Gradients, averaged by DDP, times the number of ranks are the joined batch's."""
    plain = set_fused(disturb(net()).double(), False)
    # DDP itself refuses a CPU module with SyncBatchNorms in it: they come afterwards, with the same parameters.
    sync: Any = set_fused(copy.deepcopy(plain), True)
    model = DistributedDataParallel(sync, **options)  # type: ignore[arg-type]
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for number in range(4):
        last = not accumulate or number % 2
        x = torch.randn(sum(split), 3, 8, 8, dtype=torch.float64)
        dy = torch.randn(sum(split), 3, dtype=torch.float64)
        expected_y, expected_dx = step(plain, x, dy)
        with nothing() if last else model.no_sync():
            y, dx = step(model, mine(x, split), mine(dy, split))
        close("y", y, mine(expected_y, split))
        assert expected_dx is not None
        close("dx", dx, mine(expected_dx, split))
        if last:
            for (name, p), q in zip(sync.named_parameters(), plain.parameters(), strict=True):
                assert p.grad is not None
                close(name, p.grad * 2, q.grad)
                p.grad = q.grad = None
    for (name, actual), wanted in zip(sync.named_buffers(), plain.buffers(), strict=True):
        close(name, actual, wanted)


scenario("ddp")(parallel)
scenario("ddp-unequal", split=(3, 1))(parallel)
scenario("ddp-static-graph", static_graph=True)(parallel)
scenario("ddp-find-unused-parameters", find_unused_parameters=True)(parallel)
scenario("ddp-gradient-as-bucket-view", gradient_as_bucket_view=True)(parallel)
scenario("ddp-no-sync", accumulate=True)(parallel)
scenario("ddp-without-broadcast", broadcast_buffers=False)(parallel)


# Definitions of others.
def converted(name: str, before: bool) -> None:
    """``fuse`` of a model that was converted ``before``, or conversion of one that was fused."""
    definition = definitions.DEFINITIONS[name]
    plain = definition.build().double()
    if before:
        sync = fused_preact.fuse(synchronised(plain))
    else:
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(fused_preact.fuse(copy.deepcopy(plain)))
    split = (3, 1)
    for _ in range(2):
        x = torch.randn(4, *definition.shape[1:], dtype=torch.float64)
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(plain)(x))
        expected_y, expected_dx = step(plain, x, dy)
        y, dx = step(sync, mine(x, split), mine(dy, split))
        close("y", y, mine(expected_y, split))
        assert expected_dx is not None
        close("dx", dx, mine(expected_dx, split))
    expected = grads(plain, False)
    for key, grad in grads(sync, True).items():
        close(key, grad, expected[key])
    for (key, actual), wanted in zip(sync.named_buffers(), plain.buffers(), strict=True):
        close(key, actual, wanted)
    same_bits(sync)


DEFINITIONS = ("kuangliu_18", "locuslab_50", "wide_resnet", "tied_unit", "norm_options", "densenet_cifar")
for name in DEFINITIONS:
    for before in (True, False):
        order = "converted-then-fused" if before else "fused-then-converted"
        scenario(f"definition-{name}-{order}", name=name, before=before)(converted)


# Second derivatives.
@scenario("gradient-penalty-unit", build=UNITS["basic-projection"], shape=(4, 6, 3, 4))
@scenario("gradient-penalty-network", build=net, shape=(4, 3, 5, 5))
def penalty(build: Build, shape: tuple[int, ...], split: tuple[int, int] = (3, 1)) -> None:
    plain = set_fused(disturb(build()).double(), False)
    sync = set_fused(synchronised(plain), True)
    x = torch.randn(shape, dtype=torch.float64)

    def penalised(module: nn.Module, x: Tensor) -> Tensor | None:
        x = x.detach().clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        (dx.square().sum() + module(x).sum()).backward()
        return x.grad

    wanted = penalised(plain, x)
    assert wanted is not None
    found, wanted = penalised(sync, mine(x, split)), mine(wanted, split)
    scale = max(1.0, float(wanted.abs().max()))
    note(found is not None and float((found - wanted).abs().max()) < 1e-9 * scale, "dx")
    expected = grads(plain, False)
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, grad in grads(sync, True).items():
        other = expected[name]
        assert grad is not None
        assert other is not None
        note(float((grad - other).abs().max()) < 1e-9 * largest, name)
    for (name, actual), buffer in zip(sync.named_buffers(), plain.buffers(), strict=True):
        close(name, actual, buffer)


@scenario("transform")
def transform() -> None:
    sync: Any = synchronised(PreActConv2d(6, 5, 1))
    bn, conv = BatchNorm.of(sync.bn), Convolution.of(sync.conv)
    for call in (
        lambda x: functional.preact_site(x, bn, conv).sum(),
        lambda x: functional.bn_relu_avg_pool2d(x, bn).sum(),
    ):
        try:
            torch.func.grad(call)(torch.randn(2, 6, 3, 3))
        except RuntimeError as error:
            note("SyncBatchNorm" in str(error) and "torch.func" in str(error), str(error))
        else:
            note(False, "no error")


@scenario("a-sum-that-broadcasts")
def broadcasting() -> None:
    """What the fused call refuses runs by PyTorch's operations, and is synchronised there too."""
    plain = disturb(Broadcasting()).double()
    sync = fused_preact.fuse(synchronised(plain))
    x = torch.randn(4, 6, 1, 1, dtype=torch.float64)
    dy = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    expected = step(plain, x, dy)
    found = step(sync, mine(x, (3, 1)), mine(dy, (3, 1)))
    for name, actual, wanted in zip(("y", "dx"), found, expected, strict=True):
        assert wanted is not None
        close(name, actual, mine(wanted, (3, 1)))
    for (name, actual), buffer in zip(sync.named_buffers(), plain.buffers(), strict=True):
        close(name, actual, buffer)


class Broadcasting(nn.Module):
    """x + conv(relu(bn(x))) where the convolution makes more of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.bn(x)))


NAMES = list(SCENARIOS)
"""Those of this file."""


def main(rank: int, folder: str, names: list[str]) -> None:
    """Run the scenarios ``names`` as rank ``rank`` of two; what was wrong goes to folder/rank.json."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    OTHER.append(dist.new_group([0, 1]))
    found: dict[str, list[str]] = {}
    for name in names:
        torch.manual_seed(0)
        wrong.clear()
        failed = False
        try:
            SCENARIOS[name]()
        except Exception:
            failed = True
            wrong.append(traceback.format_exc())
        found[name] = list(wrong)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        if failed:
            raise SystemExit(f"{name} failed: the ranks are out of step")
    dist.destroy_process_group()
