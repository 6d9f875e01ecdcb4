"""Right before fast: no speed is printed for a wrong result.

A site or unit passes where its error against the float64 plain module is at most twice that of the same-dtype eager
module, plus a few ulp. The inputs keep every pre-activation away from 0: an element whose ReLU mask flips by rounding
would look like a wrong kernel. Networks are compared by their eval-mode logits, since their gradients are chaotic in
float32; :func:`units_problem` stands for the gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import networks
from .networks import CHANNELS_LAST, UnitCase

OURS, PEER = 2.0, 8.0
"""Allowed error over eager's: ours is held to the policy, a peer only to computing the same function."""


def error_problem(
    name: str, actual: Tensor | None, eager: Tensor, oracle: Tensor, *, factor: float, terms: int = 1
) -> str | None:
    """What is wrong with one tensor, or None. ``terms``: how many values each element sums up, beside the GEMM."""
    if actual is None or actual.shape != oracle.shape:
        return (
            f"{name}: shape {None if actual is None else tuple(actual.shape)}, expected {tuple(oracle.shape)}"
        )
    exact = oracle.double()
    error = (actual.detach().double() - exact).abs()
    if not error.isfinite().all():
        return f"{name}: {int((~error.isfinite()).sum())} of {error.numel()} elements are not finite"
    rms = exact.square().mean().sqrt()
    worst_eager = (eager.double() - exact).abs().max()
    ulp = torch.finfo(eager.dtype).eps
    allowed = factor * worst_eager + 2 * factor * ulp * (exact.abs() + rms)
    # A sum of many terms of either sign carries their rounding, not its own.
    allowed = allowed + 2 * factor * torch.finfo(torch.float32).eps * terms**0.5 * rms
    excess = (error - allowed).flatten()
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    return (
        f"{name}: error {error.flatten()[worst]:.2e} where {allowed.flatten()[worst]:.2e} is allowed "
        f"(eager's worst is {worst_eager:.2e})"
    )


def separated(module: nn.Module) -> None:
    """Set BN parameters so that no pre-activation lies near 0, and convolutions so that values stay near 1.

    For the first BN the input does it (:func:`separated_input`); behind a convolution values are Gaussian, so there
    whole channels are on or off, by 7.5 standard deviations and more.
    """
    for index, norm in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        channels = torch.arange(norm.num_features, device=norm.weight.device)
        sign = 1.0 - 2.0 * (channels % 3 == 1).float()
        with torch.no_grad():
            size = 0.75 + 0.5 * torch.rand_like(sign) if index == 0 else 0.5 + 0.3 * torch.rand_like(sign)
            norm.weight.copy_(sign * size)
            # beta > 0 in most channels: a padded tap that is not 0 shows.
            near = 0.1 + 0.2 * torch.rand_like(sign)
            norm.bias.copy_(near if index == 0 else torch.where(channels % 4 == 3, -6.0, 6.0))


def separated_input(shape: Sequence[int], device: torch.device) -> Tensor:
    """Values near -1 and +1, at random."""
    sign = torch.randint(0, 2, tuple(shape), device=device).float() * 2 - 1
    return (sign + 0.1 * torch.randn(tuple(shape), device=device)).contiguous(memory_format=CHANNELS_LAST)


Runner = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""How a candidate applies a (plain) module's parameters to an input and, at a site, to what is added."""


def _gradients(
    run: Runner, module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor | None
) -> tuple[dict[str, Tensor | None], Tensor]:
    """The output, the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    if residual is not None:
        residual = residual.detach().requires_grad_()
    y = run(module, x, residual)
    if dy is None:
        dy = torch.randn_like(y, dtype=torch.float32).to(y.dtype)
    named = dict(module.named_parameters())
    inputs = [x, *named.values(), *([residual] if residual is not None else [])]
    grads = torch.autograd.grad(y, inputs, dy.to(y.dtype), allow_unused=True)
    names = ["dx", *(f"d{n}" for n in named), *(["dresidual"] if residual is not None else [])]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}, dy


def plain(module: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """The definition."""
    return module(x) if residual is None else module(x, residual)


class Reference:
    """A plain module in one dtype with its float64 oracle, forward and backward, on a small batch."""

    def __init__(
        self, module: nn.Module, shape: Sequence[int], adds: tuple[int, ...] | None, dtype: torch.dtype
    ) -> None:
        device = next(module.parameters()).device
        separated(module)
        self.x = separated_input(shape, device).to(dtype)
        self.residual = None if adds is None else torch.randn(adds, device=device).to(dtype)
        self.module = copy.deepcopy(module).to(dtype)
        double = copy.deepcopy(self.module).double()
        wide = None if self.residual is None else self.residual.double()
        self.eager, self.dy = _gradients(plain, copy.deepcopy(self.module), self.x, self.residual, None)
        self.oracle, _ = _gradients(plain, double, self.x.double(), wide, self.dy)
        self.terms = self.x.shape[0] * self.x.shape[2] * self.x.shape[3]

    def problem(self, run: Runner, factor: float) -> str | None:
        """What is wrong with a candidate, or None. An error that it raises is its caller's."""
        actual, _ = _gradients(run, copy.deepcopy(self.module), self.x, self.residual, self.dy)
        for name, oracle in self.oracle.items():
            eager = self.eager[name]
            if oracle is None or eager is None:
                continue
            terms = 1 if name in ("y", "dx", "dresidual") else self.terms
            wrong = error_problem(name, actual[name], eager, oracle, factor=factor, terms=terms)
            if wrong:
                return wrong
        return None


def units_problem(
    model: str, dtype: torch.dtype, device: torch.device, run: Runner, batch: int = 2
) -> str | None:
    """The first wrong gradient among the network's distinct units, or None."""
    for case, _ in networks.distinct_units(networks.unit_cases(model)):
        wrong = unit_reference(case, batch, dtype, device).problem(run, OURS)
        if wrong:
            return f"{case.name}: {wrong}"
    return None


def unit_reference(case: UnitCase, batch: int, dtype: torch.dtype, device: torch.device) -> Reference:
    """The oracle of one unit."""
    module = copy.deepcopy(case.unit).to(device=device, memory_format=CHANNELS_LAST)
    module.fused = False
    return Reference(module, (batch, case.c, case.h, case.h), None, dtype)


def settle(net: nn.Module, x: Tensor) -> None:
    """Give the BNs running statistics by one step on ``x``: with the initial ones deep logits overflow."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(x)
    net.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
