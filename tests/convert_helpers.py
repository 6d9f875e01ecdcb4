"""What a fused model really runs, and how it is compared with the plain one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions_oracle import _owned
from torch import Tensor, nn

from fused_preact import composite, fuse
from fused_preact.convert import runtime


@dataclass
class Ran:
    """The fused calls of some forward passes: sites as (norm, convolution), the paths of the tensors' owners."""

    sites: list[tuple[str, str]] = field(default_factory=list)
    additions: int = 0
    heads: list[str] = field(default_factory=list)
    composites: int = 0
    """Calls that PyTorch's own operations served."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many sites, additions and heads."""
        return len(self.sites), self.additions, len(self.heads)


@contextmanager
def watching(model: nn.Module) -> Iterator[Ran]:
    """Note what runs fused within."""
    ran, paths = Ran(), _owners(model)

    def name(source: Any, given: tuple[Any, ...], count: int) -> str:
        if source.constants is None:
            held = given[source.at]
            tensors = [*held.parameters(recurse=False), *held.buffers(recurse=False)]
        else:
            tensors = given[source.at : source.at + count]
        return next((paths[id(t)] for t in tensors if id(t) in paths), "?")

    def chain(call: Any, x: Tensor, residual: Tensor | None, *given: Any) -> Tensor:
        for norm, conv in call.sites:
            if conv.at is not None:  # a subsampling pool is no site
                ran.sites.append((name(norm, given, 4), name(conv, given, 2)))
        if call.projection is not None:
            ran.sites.append((ran.sites[-len(call.sites)][0], name(call.projection, given, 2)))
        ran.additions += call.shortcut is not None
        return run_chain(call, x, residual, *given)

    def head(call: Any, x: Tensor, *given: Any) -> Tensor:
        ran.heads.append(name(call.norm, given, 4))
        return run_head(call, x, *given)

    def unit(*args: Any) -> Tensor:
        ran.composites += 1
        return run_unit(*args)

    run_chain, run_head, run_unit = runtime.ChainCall.__call__, runtime.HeadCall.__call__, composite.unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.ChainCall, "__call__", chain)
        patch.setattr(runtime.HeadCall, "__call__", head)
        patch.setattr(composite, "unit", unit)
        yield ran


def _owners(model: nn.Module) -> dict[int, str]:
    """The names that the oracle gives to the owners of parameters and buffers."""
    return {id(tensor): name for name, tensor in _owned(model)}


def seeded(seed: int = 3) -> None:
    """Random streams at one point, Python's too."""
    torch.manual_seed(seed)
    random.seed(seed)


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """A plain copy of ``model``, and ``model`` fused."""
    plain = copy.deepcopy(model)
    return plain, fuse(model, **options)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, share: float = 1e-9) -> None:
    """Equal but for ``share`` of the largest value; a gradient that is missing is missing in both."""
    assert (actual is None) == (expected is None), f"{name}: got {actual}, expected {expected}"
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-3)
    assert error <= share * scale, f"{name}: off by {error:.3e} of {scale:.3e}"


def step(model: nn.Module, inputs: Any, lr: float = 0.0, seed: int = 3) -> dict[str, Tensor | None]:
    """One forward and backward pass: outputs, gradients and buffers by name. ``lr``: and a step of SGD."""
    given = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs)
    seeded(seed)
    outputs = tensors_of(model(*given))
    found: dict[str, Tensor | None] = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    model.zero_grad()
    weights = torch.Generator().manual_seed(5)
    sum(
        (o * torch.randn(o.shape, dtype=torch.float64, generator=weights).to(o.dtype)).sum() for o in outputs
    ).backward()
    found |= {f"gradient of input {i}": t.grad for i, t in enumerate(given)}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    found |= {n: b.clone() for n, b in model.named_buffers()}
    if lr:
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
    return found


def assert_same_step(
    plain: nn.Module, fused: nn.Module, *inputs: Tensor, steps: int = 1, lr: float = 0.0
) -> None:
    """Both models compute the same, forward and backward, and update the same buffers."""
    for number in range(steps):
        expected = step(plain, inputs, lr, number + 1)
        actual = step(fused, inputs, lr, number + 1)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            assert_close(f"step {number}: {name}", actual[name], tensor)


# --- a model to try things on -------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-activation unit of two sites, with a projection where the shape changes."""

    scale = 1.0

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


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: {**m.__dict__} for name, m in model.named_modules()}
