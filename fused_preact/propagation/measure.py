"""Signals and gradients of a residual network, unit by unit, held against the paper's equations.

With units x' = f(h(x) + F(x)), h(x) = s x (s a constant, a mask or 1 - g, element by element) and f the identity,
within a stage (He et al. 2016, Eqs. 4 to 8):

    x_L = (prod s_i) x_l + sum_i (prod_{j>i} s_j) F_i            the additive form
    dE/dx_l = (prod s_i) dE/dx_L + sum_i (prod_{j<i} s_j) J_i^T dE/dx_{i+1}    the two-term gradient

J_i is the Jacobian of unit i less s x, the gate's dependence on x with it. Both are exact there; with f = ReLU or
BN-ReLU they are approximations, and the residuals say how good. The gradient's first term is the *shortcut term*.
Everything is computed one unit at a time, in the mode of the model: memory is that of one unit and of the x_l.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ResNet
from ..modules import Unit, _PreActUnit
from ..units import ResidualUnit

__all__ = ["Snapshot", "Terms", "UnitRecord", "measure", "terms"]


@dataclass(frozen=True)
class Terms:
    """One unit taken apart at ``x``: h(x), F(x) with its factor, and s where h(x) = s x (on the output's grid)."""

    h: Tensor
    f: Tensor
    s: Tensor | float | None
    gate: Tensor | None


@dataclass(frozen=True)
class UnitRecord:
    """What is measured of unit ``unit`` (1 is the first); None where it is not defined."""

    unit: int
    stage: int
    signal: float
    """Root mean square of its input x_l."""
    gradient: float
    """|dE/dx_l|, the total gradient."""
    shortcut_term: float
    """|prod s dE/dx_L| / |dE/dx_L| from here to the network's end, stage by stage: what the shortcuts alone carry.

    Of h only: what f does after the addition, and how projections and padding change norms, is left out.
    """
    factor: float
    """Mean of s: of a gate 1 - g. Of a 1x1 convolution the ratio of gradient norms that it alone makes."""
    negative: float
    """Share of negative elements in y_l = h(x_l) + F(x_l)."""
    additive: float | None
    """max |x_L - additive form| / max |x_L|, L the stage's end."""
    two_term: float | None
    """|dE/dx_l - both terms| / |dE/dx_l|."""
    smallest_step: float
    """min (x_{l+1} - x_l) / max |x_l|, 0 or more where no element ever falls."""


@dataclass(frozen=True)
class Snapshot:
    """A network at one moment of its training."""

    step: int
    loss: float
    units: tuple[UnitRecord, ...]
    last_gradient: float
    """|dE/dx_L| at the output of the last unit."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def terms(unit: Unit, x: Tensor, seed: int = 0) -> Terms:
    """``unit`` at ``x``, from its children one by one; ``seed`` draws the mask of a dropout shortcut."""
    if isinstance(unit, _PreActUnit):
        (bn, conv), *others = unit.sites()
        a = F.relu(bn(x))
        f = conv(a)
        for bn, conv in others:
            f = conv(F.relu(bn(f)))
        keeps = f.shape == x.shape
        s = None if keeps and isinstance(unit.shortcut, nn.Conv2d) else 1.0
        return Terms(x if unit.shortcut is None else unit.shortcut(a), f, s, None)
    assert isinstance(unit, ResidualUnit)
    a = unit.run(unit.before, x)
    torch.manual_seed(seed)
    h, gate = unit.shortcut_of(a)
    f = a
    for part in unit.parts:
        for name in (
            (part,) if isinstance(part, str) else [n for bn, conv in part for n in (bn, "relu", conv)]
        ):
            f = unit.run((name,), f)
    if unit.kind.kind == "exclusive_gating" and gate is not None:
        f = gate * f
    f = unit.on_branch * f
    return Terms(h, f, _factor(unit, h, gate, seed), gate)


def _factor(unit: ResidualUnit, h: Tensor, gate: Tensor | None, seed: int) -> Tensor | float | None:
    if gate is not None:
        return 1 - gate
    if unit.dropout is not None:
        torch.manual_seed(seed)
        return unit.dropout(torch.ones_like(h))
    if unit.kind.kind == "scaling":
        return unit.kind.values[0]
    return None if unit.kind.kind == "conv" else 1.0


def measure(
    model: ResNet, images: Tensor, labels: Tensor, step: int = 0, dtype: torch.dtype = torch.float64
) -> Snapshot:
    """Every unit of ``model`` (which is left as it is) for the cross-entropy of ``images`` [N,C,H,W] and ``labels``.

    Computed by the plain definition in ``dtype``. The model's mode is kept: in training BN uses the batch.
    """
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = False  # type: ignore[assignment]
    stages = [list(stage) for stage in model.stages]  # type: ignore[call-overload]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        inputs = [model.stem(images.to(dtype))]
        for number, unit in enumerate(unit for stage in stages for unit in stage):
            torch.manual_seed(number)
            inputs.append(unit(inputs[-1]))
        with torch.enable_grad():
            last = inputs[-1].requires_grad_()
            loss = F.cross_entropy(model.classify(last), labels)
            (gradient,) = torch.autograd.grad(loss, last)
        end, records, carried = float(gradient.norm()), [], 1.0
        number = len(inputs) - 1
        for index in reversed(range(len(stages))):
            walk = _Walk(inputs[number].detach(), gradient, carried)
            for unit in reversed(stages[index]):
                number -= 1
                records.append(walk.back(unit, inputs[number].detach(), number, index))
            gradient, carried = walk.gradient, records[-1].shortcut_term
    return Snapshot(step, float(loss.detach()), tuple(reversed(records)), end)


class _Walk:
    """Backwards through one stage, from its output ``x`` and the gradient there."""

    def __init__(self, x: Tensor, gradient: Tensor, carried: float) -> None:
        self.end, self.output, self.gradient = x, x, gradient
        self.branches: Any = torch.zeros_like(x)  # sum of the F behind the present unit, each times its s
        self.product: Any = 1.0  # of the s
        self.shortcut = gradient  # the gradient's first term, and its second
        self.rest = torch.zeros_like(gradient)
        self.norm, self.carried = float(gradient.norm()), carried

    def back(self, unit: Unit, x: Tensor, number: int, stage: int) -> UnitRecord:
        with torch.enable_grad():
            x = x.requires_grad_()
            torch.manual_seed(number)
            y = unit(x)
            (total,) = torch.autograd.grad(y, x, self.gradient)
            found = terms(unit, x, number)
            s = found.s.detach() if isinstance(found.s, Tensor) else found.s
            inside = x.shape == self.output.shape and getattr(unit, "shortcut", None) is None
            shares = isinstance(unit, ResidualUnit) and bool(unit.before)
            inside = (inside and not shares) or s is None
            before = float(self.shortcut.norm())
            if s is not None:
                self.shortcut = s * self.shortcut
                if inside:
                    alone = found.h + found.f - s * x
                    (more,) = torch.autograd.grad(alone, x, self.gradient)
                    self.rest = s * self.rest + more
            else:
                pulled = [
                    torch.autograd.grad(found.h, x, v, retain_graph=True)[0]
                    for v in (self.shortcut, self.rest)
                ]
                (more,) = torch.autograd.grad(found.f, x, self.gradient)
                self.shortcut, self.rest = pulled[0], pulled[1] + more
        norm = float(self.shortcut.norm())
        additive = two_term = None
        if s is not None and inside:
            self.branches = self.branches + self.product * found.f.detach()
            self.product = self.product * s
            error = (self.end - self.product * x - self.branches).abs().max()
            additive = float(error / self.end.abs().max())
        if inside:
            two_term = float((total - self.shortcut - self.rest).norm() / total.norm())
        y = (found.h + found.f).detach()
        smallest = float((self.output - x).min() / x.abs().max()) if x.shape == self.output.shape else 0.0
        if s is None:
            factor = norm / before if before else 0.0
        else:
            factor = float(s.mean()) if isinstance(s, Tensor) else float(s)
        self.gradient, self.output = total, x.detach()
        return UnitRecord(
            number + 1,
            stage + 1,
            float(x.detach().square().mean().sqrt()),
            float(total.norm()),
            self.carried * norm / self.norm if self.norm else 0.0,
            factor,
            float((y < 0).double().mean()),
            additive,
            two_term,
            smallest,
        )
