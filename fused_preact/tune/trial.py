"""One problem made flesh: inputs, the operation on any backend, eager's version of it, and what counts as wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..kernels import triton as kernels
from ..kernels.triton.choose import Problem

__all__ = ["CHECKED_IMAGES", "Inputs", "Oracle", "eager_runner", "make_inputs", "run", "shrunk"]

CHECKED_IMAGES = 16
"""Images of the comparison with float64: a multiple of 16 as real batches are, so the same kernel is checked."""


class Inputs(NamedTuple):
    """The tensors of one problem; vectors are float32, or float64 where the images are."""

    x: Tensor
    weight: Tensor
    residual: Tensor
    dy: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    y: Tensor
    """The input of the BN behind the convolution, whose backward may be pending on ``dy``."""
    behind: Tensor
    """That BN's mean, scale, rstd, sum g and sum g (y - mean): [5,K]."""

    @property
    def pending(self) -> list[Tensor]:
        """As ``conv_backward`` takes it."""
        return [self.y, *self.behind]

    def double(self) -> Inputs:
        """The same values in float64, for the oracle."""
        return Inputs(*(t.double() for t in self))


def shrunk(problem: Problem) -> Problem:
    """The problem on the images that are compared with float64."""
    g = problem.geometry
    return problem._replace(geometry=g._replace(n=min(g.n, CHECKED_IMAGES)))


def make_inputs(problem: Problem, device: torch.device | str) -> Inputs:
    """Random tensors whose pre-activations keep away from 0: no ReLU mask is a matter of rounding.

    ``residual`` serves as what fprop adds and, at x's size, as dgrad's second user.
    """
    g = problem.geometry
    last = torch.channels_last

    def image(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(problem.dtype).contiguous(memory_format=last)

    signs = torch.randn(g.n, g.c, g.h, g.w, device=device)
    x = (signs.sign() + 0.1 * signs).to(problem.dtype).contiguous(memory_format=last)
    weight = torch.randn(g.k, g.c, g.r, g.s, device=device) / (g.c * g.r * g.s) ** 0.5
    added = image(g.n, g.c, g.h, g.w) if problem.op == "dgrad" else image(g.n, g.k, g.oh, g.ow)
    scale = 0.75 + 0.5 * torch.rand(g.c, device=device)
    # beta > 0: a padded tap that is not 0 shows.
    shift = 0.1 + 0.2 * torch.rand(g.c, device=device)
    mean = 0.1 * torch.randn(g.c, device=device)
    dy = image(g.n, g.k, g.oh, g.ow)
    y = image(g.n, g.k, g.oh, g.ow)
    # rstd and scale near 1, sums whose share of a pixel is near it too.
    behind = 0.5 + torch.rand(5, g.k, device=device)
    behind[3:] *= g.rows
    weight = weight.to(problem.dtype).contiguous(memory_format=last)
    return Inputs(x, weight, added, dy, mean, scale, shift, y, behind)


def run(problem: Problem, i: Inputs, table: Any = kernels) -> tuple[Tensor, ...]:
    """The operation by the Triton launchers, or by another table of operations such as ``reference``."""
    g, extras = problem.geometry, problem.extras
    constants = (g.stride, g.padding, g.dilation, g.groups)
    if problem.op == "fprop":
        residual = i.residual if "residual" in extras else None
        return table.conv_fprop(
            i.x, i.scale, i.shift, i.weight, None, residual, *constants, "stats" in extras
        )
    if problem.op == "apply":
        bn = [i.scale, i.shift, i.mean, i.scale]
        weight_grad = "weight_grad" in extras
        results = table.conv_backward(
            i.dy, i.pending, i.weight, i.x, bn, None, None, *constants, True, False, weight_grad
        )
        return results[:4]  # dgamma is a multiple of the last sum
    pending = "pending" in extras
    if pending and table is not kernels:
        i = i._replace(dy=table.bn_backward_apply(i.dy, *i.pending, True, None))
    with_pending = {"pending": i.pending} if pending and table is kernels else {}
    if problem.op == "dgrad":
        da = i.residual if "da" in extras else None
        vectors = (i.scale, i.shift, i.mean, da) if "masked" in extras else (None,) * 4
        return table.conv_dgrad(i.dy, i.weight, i.x, *vectors, *constants, **with_pending)
    return (table.conv_wgrad(i.dy, i.x, i.scale, i.shift, i.weight, *constants, **with_pending),)


class Oracle:
    """A problem's inputs with the float64 result and that of eager PyTorch in the same dtype."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = shrunk(problem)
        self.inputs = make_inputs(self.problem, device)
        exact = run(self.problem, self.inputs.double(), reference)
        eager = run(self.problem, self.inputs, reference)
        self.exact, self.eager = exact[0], eager[0]
        self.last = exact[-1], eager[-1]

    def problem_with(self, actual: tuple[Tensor, ...]) -> str | None:
        """What is wrong with a result, or None: an error of at most twice eager's and a few ulp is right."""
        first = {"wgrad": "dweight", "fprop": "y"}.get(self.problem.op, "g")
        wrong = _unlike(first, actual[0], self.exact, self.eager)
        if self.problem.op == "apply":
            wrong = wrong or _unlike("dweight", actual[-1], *self.last)
            actual = actual[:-1]
        if wrong or len(actual) == 1 or actual[1].numel() == 0:
            return wrong
        # Statistics and sums are those of the stored values.
        stored = actual[0].double()
        if self.problem.op == "fprop":
            mean, var = reference.bn_stats(stored)
            spread = (var + mean.square()).sqrt()
            expected = {"mean": (mean, spread), "var": (var, var + _ulp(actual[1]) * spread.square())}
        else:
            centred = self.inputs.x.double() - self.inputs.mean.double().view(1, -1, 1, 1)
            sums = (t.sum((0, 2, 3)) for t in (stored, stored * centred))
            sizes = (t.abs().sum((0, 2, 3)) for t in (stored, stored * centred))
            expected = dict(zip(("sum_g", "sum_gx"), zip(sums, sizes, strict=True), strict=True))
        for (name, (right, terms)), found in zip(expected.items(), actual[1:], strict=True):
            wrong = wrong or _excess(name, found, right, 16 * _ulp(found) * terms)
        return wrong


def _unlike(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> str | None:
    """What is wrong with a tensor beside the float64 one and eager's, or None."""
    if actual.shape != exact.shape:
        return f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return None
    size = exact.abs() + exact.square().mean().sqrt()
    allowed = 2 * (eager.double() - exact).abs().max() + 4 * _ulp(actual) * size
    return _excess(name, actual, exact, allowed)


def _ulp(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps


def _excess(name: str, actual: Tensor, exact: Tensor, allowed: Tensor) -> str | None:
    error = (actual.double() - exact).abs()
    over = torch.where(error.isnan(), torch.inf, error - allowed)
    worst = int(over.argmax())
    if over.flatten()[worst] <= 0:
        return None
    limit = allowed.expand_as(error).flatten()[worst]
    return f"{name}: error {error.flatten()[worst]:.2e} where {limit:.2e} is allowed"


def eager_runner(problem: Problem, inputs: list[Inputs]) -> Callable[[int], Any]:
    """The part of eager PyTorch's BN -> ReLU -> convolution [+ addition] that the operation stands for.

    fprop: all of the forward. dgrad: the gradients of the input and of BN's parameters, applied (ours without the
    apply pass, which is measured beside it); of a second user the convolution's alone. wgrad: the weight's. Eager has
    no pending BN backward: what it is given is dy.
    """
    g = problem.geometry
    constants = (g.stride, g.padding, g.dilation, g.groups)

    def forward(i: Inputs, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
        plain = problem.op == "dgrad" and "masked" not in problem.extras
        a = x if plain else F.relu(F.batch_norm(x, None, None, gamma, beta, True, 0.0, 1e-5))
        y = F.conv2d(a, weight, None, *constants)
        return y + i.residual if "residual" in problem.extras else y

    if problem.op == "fprop":

        def run_forward(index: int) -> Tensor:
            i = inputs[index % len(inputs)]
            with torch.no_grad():
                return forward(i, i.x, i.scale, i.shift, i.weight)

        return run_forward

    graphs = []
    for i in inputs:
        leaves = [t.detach().requires_grad_() for t in (i.x, i.scale, i.shift, i.weight)]
        wanted = leaves[3:] if problem.op == "wgrad" else leaves[: 3 if "masked" in problem.extras else 1]
        graphs.append((forward(i, *leaves), wanted, i.dy))

    def run_backward(index: int) -> Any:
        y, wanted, dy = graphs[index % len(graphs)]
        return torch.autograd.grad(y, wanted, dy, retain_graph=True)

    return run_backward
