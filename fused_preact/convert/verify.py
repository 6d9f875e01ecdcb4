"""The comparison that ``fuse(model, example_input)`` makes, on copies: the model itself never runs.

float64 shows whether the fused model computes the same function: outputs, buffers and gradients have to agree to 1e-6
of their scale. The model's own dtype shows whether the kernels that serve it are right: there the float64 result is
the oracle, and a fused error may be a few times the plain model's, plus a few ulp. Gradients are compared in float64
alone: in float32 those of a deep network are chaotic in any implementation (rounding flips ReLUs, and each flip
changes the gradients of all layers before), so a bound that no right result breaks would let wrong ones pass.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["verify"]

_TOLERANCE = 1e-6  # float64, relative to a tensor's largest element
# Of the plain model's own error, and of a tensor's largest element. In a hundred networks of up to 164 layers, in
# float32 and bfloat16, the worst fused error was 1.5 times the plain one's.
_FACTOR = 4
_ULPS = 16
_FLOOR = 1e-3
"""Gradients are held against at least this part of the model's largest: many (of a bias in front of a norm) are zero
but for rounding."""

Fused = Sequence[tuple[nn.Module, Any]]
"""The modules that get another forward, and that forward: called ``type(forward)(owner, inline)`` to make it."""


class _Impossible(ValueError):
    """There is nothing to compare."""


def verify(model: nn.Module, fused: Fused, example_input: Any) -> None:
    """Compare ``model`` as it is written with what it is once each module of ``fused`` has the forward beside it.

    Both run on ``example_input`` (a tensor, a tuple or list of positional arguments, or a dict of keyword arguments),
    as deep copies made one at a time, from one state of the random streams: in training and evaluation and, where
    that is neither, in the mode that the model is in; in float64 and in the model's own dtype. Hooks run, on copies.

    Raises RuntimeError that names the first tensor that differs (outputs, then buffers, then gradients), ValueError
    where ``example_input`` or the model does not allow the comparison, TypeError for an ``example_input`` of another
    kind. ``model``, ``example_input`` and the random streams are as before in any case.
    """
    args, kwargs = _arguments(example_input)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(t.is_meta for t in (*tensors, *model.parameters(), *model.buffers())):
        raise ValueError("example_input: nothing can be compared on the meta device; load the weights first")
    modes = [True, False, None] if len({m.training for m in model.modules()}) > 1 else [True, False]
    own = _dtype(model)
    with _alone(model, tensors):
        for mode in modes:
            _compare(_Case(model, fused, args, kwargs, mode), own)


def _compare(case: _Case, own: torch.dtype) -> None:
    """One mode."""
    plain: Result | None = None
    if own != torch.float64:
        plain = _attempt(case, None, f"the model refuses it in {case.where}")
    exact = _attempt(
        case,
        torch.float64,
        f"the model refuses it in {case.where}"
        if plain is None
        else f"a copy of the model cannot run in float64 in {case.where}, so there is nothing to compare with",
    )
    _check_exact(exact, case.run(torch.float64, True), case.where)
    if plain is not None:
        _check_own(exact, plain, case.run(None, True), f"{case.where}, {str(own).removeprefix('torch.')}")


def _attempt(case: _Case, dtype: torch.dtype | None, refused: str) -> Result:
    """What the plain model gives, its errors laid at the example's door."""
    try:
        return case.run(dtype, False)
    except _Impossible:
        raise
    except Exception as error:
        raise _Impossible(
            f"example_input: {refused} ({type(error).__name__}: {error}); allowed is what the model can be called "
            "with, or None for no comparison"
        ) from error


# --- running --------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What one call made, by name."""

    outputs: dict[str, Any]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


@dataclasses.dataclass
class _Case:
    model: nn.Module
    fused: Fused
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: bool | None
    """``train(mode)``; None leaves the flags as they are."""

    @property
    def where(self) -> str:
        return {True: "training", False: "evaluation", None: "the mode that it is in"}[self.mode]

    def run(self, dtype: torch.dtype | None, fused: bool) -> Result:
        """Call a copy, plain or fused, in ``dtype`` (None: as it is), and differentiate."""
        model, forwards = self._copy(dtype, fused)
        _seed()
        try:
            return self._run(model, dtype)
        except Exception as error:
            if not fused:
                raise
            raise RuntimeError(
                f"fuse: the fused model fails in {self.where}, {dtype or _dtype(model)}, where the plain one does "
                f"not ({type(error).__name__}: {error}); the model is left as it was written"
            ) from error
        finally:
            # Else the copy is in a cycle with its forwards, and stays until the garbage is collected.
            for module, _ in forwards:
                module.__dict__.pop("forward", None)

    def _copy(self, dtype: torch.dtype | None, fused: bool) -> tuple[nn.Module, Fused]:
        try:
            model, forwards = copy.deepcopy((self.model, list(self.fused) if fused else []))
        except Exception as error:
            raise _Impossible(
                f"example_input: the model cannot be copied ({type(error).__name__}: {error}), and only copies are "
                "compared; allowed for such a model is None"
            ) from error
        if dtype is not None:
            try:
                model.to(dtype)
            except Exception as error:
                raise _Impossible(
                    f"example_input: the model cannot be converted to {dtype} ({type(error).__name__}: {error}), in "
                    "which it is compared; allowed for such a model is None"
                ) from error
        if self.mode is not None:
            model.train(self.mode)
        for module, forward in forwards:
            module.forward = forward
        return model, forwards

    def _run(self, model: nn.Module, dtype: torch.dtype | None) -> Result:
        leaves: dict[str, Tensor] = {}

        def given(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach().clone()
            if not leaf.is_floating_point():
                return leaf
            leaf = (leaf if dtype is None else leaf.to(dtype)).requires_grad_()
            leaves[f"the input{pytree.keystr(path)}"] = leaf
            return leaf.clone()  # a model may write to what it is given, and to a leaf nobody may

        args = pytree.tree_map_with_path(given, self.args)
        kwargs = pytree.tree_map_with_path(given, self.kwargs)
        wanted = leaves | {name: p for name, p in model.named_parameters() if p.requires_grad}
        outputs = _flat(model(*args, **kwargs))
        tensors = {name: y for name, y in outputs.items() if isinstance(y, Tensor)}
        if not tensors:
            raise ValueError("it returns no tensor")
        reached = [y for y in tensors.values() if y.requires_grad and y.is_floating_point()]
        gradients: dict[str, Tensor | None] = {}
        if reached and wanted:
            found = torch.autograd.grad(
                reached, list(wanted.values()), [_direction(y) for y in reached], allow_unused=True
            )
            gradients = {name: g if g is None else g.detach() for name, g in zip(wanted, found, strict=True)}
        buffers = {name: b.detach() for name, b in model.named_buffers()}
        return Result(
            {n: y.detach() if isinstance(y, Tensor) else y for n, y in outputs.items()}, buffers, gradients
        )


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, dict) and all(isinstance(name, str) for name in example):
        return (), dict(example)
    raise TypeError(
        f"example_input: got {type(example).__name__}, allowed are a tensor, a tuple or list of positional arguments "
        "and a dict of keyword arguments"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model: of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


@contextlib.contextmanager
def _alone(model: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    """Gradients on, autocast off, random streams put back."""
    places = {t.device for t in (*model.parameters(), *model.buffers(), *tensors)}
    devices = [d for d in places if d.type == "cuda"]
    numpy = sys.modules.get("numpy")
    drawn, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(d.type for d in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(drawn)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


def _seed() -> None:
    """Every run draws the same numbers, whatever was drawn before."""
    torch.manual_seed(0)
    random.seed(0)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(0)


def _direction(y: Tensor) -> Tensor:
    """What ``y`` is multiplied with to make a loss; the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


def _flat(output: Any, name: str = "the output") -> dict[str, Any]:
    """The leaves of what a model returns, by name; a dataclass counts as the dict of its fields."""
    found: dict[str, Any] = {}
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        at = name + pytree.keystr(path)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found |= _flat(getattr(leaf, field.name), f"{at}.{field.name}")
        else:
            found[at] = leaf
    return found


# --- comparing ------------------------------------------------------------------------------------------------


def _check_exact(plain: Result, fused: Result, where: str) -> None:
    where = f"{where}, float64"
    _check_structure(plain, fused, where)
    for kind in ("outputs", "buffers", "gradients"):
        expected, actual = getattr(plain, kind), getattr(fused, kind)
        floor = _FLOOR * max(map(_scale, expected.values()), default=0.0) if kind == "gradients" else 0.0
        for name, value in expected.items():
            if isinstance(value, Tensor):
                # A model may compute in less than it was converted to.
                relative = max(_TOLERANCE, _ULPS * _eps(value)) if _eps(value) else 0.0
                scale = max(_scale_of(name, expected), floor)
                _check(_named(name, kind), where, actual[name], value, relative * scale)


def _check_own(exact: Result, plain: Result, fused: Result, where: str) -> None:
    _check_structure(plain, fused, where)
    for kind in ("outputs", "buffers"):
        for name, value in getattr(plain, kind).items():
            if isinstance(value, Tensor):
                oracle = getattr(exact, kind).get(name)
                if not isinstance(oracle, Tensor) or oracle.shape != value.shape:
                    oracle = value
                scale = _scale_of(name, getattr(exact, kind)) or _scale(oracle)
                allowed = _FACTOR * _error(value, oracle) + _ULPS * _eps(value) * scale
                _check(_named(name, kind), where, getattr(fused, kind)[name], oracle, allowed)


def _named(name: str, kind: str) -> str:
    if kind == "outputs":
        return name
    return f"the buffer {name}" if kind == "buffers" else f"the gradient of {name}"


def _check_structure(plain: Result, fused: Result, where: str) -> None:
    """The same names, kinds, shapes and dtypes; what is no tensor is equal."""
    for kind in ("outputs", "buffers", "gradients"):
        expected, actual = getattr(plain, kind), getattr(fused, kind)
        for name in [*expected, *actual]:
            a, b = expected.get(name), actual.get(name)
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                if (a.shape, a.dtype) != (b.shape, b.dtype):
                    _disagree(_named(name, kind), where, f"{_form(b)} instead of {_form(a)}")
            elif isinstance(a, Tensor) or isinstance(b, Tensor) or (name in expected) != (name in actual):
                _disagree(_named(name, kind), where, f"{_form(b)} instead of {_form(a)}")
            elif isinstance(a, bool | int | float | str) and a != b and a == a:
                _disagree(_named(name, kind), where, f"{b!r} instead of {a!r}")


def _form(value: Any) -> str:
    return (
        f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"
    )


def _check(name: str, where: str, actual: Tensor, expected: Tensor, allowed: float) -> None:
    error = _error(actual, expected)
    if not error <= allowed:
        _disagree(name, where, f"the error is {error:.2g}, allowed is {allowed:.2g}")


def _disagree(name: str, where: str, what: str) -> None:
    raise RuntimeError(
        f"fuse: the fused model differs from the plain one in {name} ({where}): {what}; the model is left as it was "
        "written. This is a fault of fused_preact: please report the model"
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where one of the two is no finite number and the other is another."""
    if actual.numel() == 0:
        return 0.0
    actual, expected = _wide(actual), _wide(expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs())
    return float(torch.where(error.isnan(), torch.inf, error).max())


def _scale(tensor: Tensor | None) -> float:
    """The largest finite magnitude."""
    if not isinstance(tensor, Tensor) or tensor.numel() == 0:
        return 0.0
    magnitude = _wide(tensor).abs()
    return float(torch.where(magnitude.isfinite(), magnitude, 0.0).max())


def _scale_of(name: str, tensors: dict[str, Any]) -> float:
    """The scale of a tensor; a running mean's is that of the values it is the mean of."""
    own = _scale(tensors.get(name))
    owner, dot, buffer = name.rpartition(".")
    if buffer != "running_mean":
        return own
    return max(own, _scale(tensors.get(f"{owner}{dot}running_var")) ** 0.5)


def _eps(tensor: Tensor) -> float:
    """The spacing of numbers near one; none between integers."""
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    return 0.0 if exact else torch.finfo(tensor.dtype).eps
