"""What a fused model really runs, and how it is compared with the plain one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
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
        expected = step(plain, inputs, lr, number)
        actual = step(fused, inputs, lr, number)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            assert_close(f"step {number}: {name}", actual[name], tensor)
