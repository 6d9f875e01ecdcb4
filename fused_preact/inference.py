"""Inference with folded BatchNorms: every BN of a unit but its first one goes into the convolution before it.

The first BN of a unit stands behind an addition whose sum the shortcut reads too, so it stays what only this library
has, the prologue of the first convolution. The head's BN-ReLU-pool is one operation with or without this. Nothing is
written to the model: the folded weights are copies beside it, made by the first call and again by the first call
after anything that they depend on has changed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .calls import has_hooks, observed
from .convert.analysis import modes, put
from .convert.eager import FusedForward
from .folding import (
    UnitArguments,
    arguments_of,
    fingerprint,
    fold_unit,
    foldable,
    foldable_stem,
    run_chain,
    run_stem,
)
from .functional import to_native_format
from .modules import PreActSequential, Stem, Unit, _PreActUnit, takes_statistics
from .reference import memory_format_of

__all__ = ["optimize_for_inference", "undo_optimize_for_inference"]

Model = TypeVar("Model", bound=nn.Module)

_IN_A_ROW = nn.Sequential.forward  # as it was at import: see calls.py


def optimize_for_inference(model: Model) -> Model:
    """Let the units of ``model`` run with folded, prepacked weights where nobody needs a gradient; returns ``model``.

    Units are ours of full pre-activation, and the blocks of other models that :func:`fuse` made one call of; a
    ``ResidualUnit`` beside them runs as before. Takes effect in eval mode under
    ``torch.no_grad()`` or ``torch.inference_mode()``. Parameters, buffers and state dict stay as they are, training
    goes on as before, and :func:`undo_optimize_for_inference` removes it again. The copies take about the memory of
    the weights (in float32 on a CPU).

    Whatever a copy was made of is compared at each call, by identity, address and version: after ``load_state_dict``,
    an optimiser's step, ``.to()`` or another ``eps`` it is made anew. Writes that PyTorch does not count
    (``torch.distributed`` collectives, NumPy, another process in shared memory, ``.data``) are looked for on a CPU:
    any change in a vector (BN parameters, running statistics, biases) is seen, and of a convolution's weight one that
    touches the sampled 512 bytes, as every write of a whole tensor does. What may go unseen is a write to a few
    elements of a weight, and on a GPU, where looking would wait for the device, any uncounted write: call this
    function again after one.

    As before run: training mode, calls that record gradients, ``torch.compile`` (which traces the unfolded model),
    ``torch.func`` transforms and tracers, hooks on a unit's children or on all modules, children that do something
    else than PyTorch's BatchNorm2d and Conv2d, parametrised weights, tensors that are plain attributes, BNs without
    running statistics, and ``PreActConv2d``, which has nothing to fold. Under autocast the input is cast as always,
    and the CPU kernels keep the folded weights in float32. On a CPU a chain of units is one operation, in which each
    thread takes its images through all units, and so is a stem; elsewhere each convolution is one.

    Raises TypeError where ``model`` is no module and ValueError where it holds no units.
    """
    undo_optimize_for_inference(model)
    ours = any(isinstance(m, Unit) for m in model.modules())
    with modes(model) as (_, *others):
        for mode in others:
            if not any(mode.values()):
                put(mode)  # what can be folded is what the units are in evaluation
        installed = _install(model)
    if not (ours or installed):
        raise ValueError(
            f"model: got a {type(model).__name__} without residual units, allowed is a network that holds some: "
            "PreActBasicBlock, PreActBottleneck, or blocks that fused_preact.fuse(model) has made into one"
        )
    return model


def undo_optimize_for_inference(model: Model) -> Model:
    """Drop what :func:`optimize_for_inference` added; returns ``model``. TypeError where it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(module, (_PreActUnit, PreActSequential, Stem)):
            module._folded = None
        elif isinstance(forward, FusedForward):
            forward.folded = None
            if type(module) is nn.Sequential and not forward.inline:
                del module.__dict__["forward"]  # it was there for its units to be one chain
    return model


def _install(module: nn.Module) -> bool:
    """Chains as long as possible: a sequence of foldable units is one, however nested. Whether there are any."""
    chain = list(_leaves(module))
    if isinstance(module, Stem) or (chain and all(_unit(m) is not None for m in chain)):
        slot: Any = module
        if isinstance(module, (_PreActUnit, PreActSequential, Stem)):
            slot._folded = _Folded(module)
            return True
        if "forward" not in module.__dict__:
            slot.forward = FusedForward(module, [])
        slot.forward.folded = _Folded(module)
        return True
    return any([_install(child) for child in module.children()])  # noqa: C419 - of all of them


def _unit(module: nn.Module) -> UnitArguments | None:
    """The arguments of a residual unit that can be folded: ours, or a block that ``fuse`` made one call of."""
    if isinstance(module, _PreActUnit):
        return arguments_of(module)
    forward = module.__dict__.get("forward")
    unit = forward.unit() if isinstance(forward, FusedForward) else None
    if unit is None:
        return None
    arguments = UnitArguments(unit.sites, unit.projection, (1, 1) if unit.activation else None)
    return arguments if foldable(arguments) else None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """What a sequence of units calls one after the other; a module that is no such sequence is itself the leaf."""
    ours = type(module) is PreActSequential and takes_statistics(module)
    if ours or (type(module) is nn.Sequential and _runs_in_a_row(module)):
        for child in module.children():
            yield from _leaves(child)
    else:
        yield module


def _runs_in_a_row(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    ours = isinstance(forward, FusedForward) and not forward.inline and not forward.matches
    return type(module).forward is _IN_A_ROW and (forward is None or ours)


# --- when it may run --------------------------------------------------------------------------------------------


_CONSTANTS = (
    *("fused", "training", "eps", "padding_mode", "ceil_mode", "return_indices"),
    *("kernel_size", "stride", "padding", "dilation", "groups", "shortcut", "forward"),
)
_HELD = operator.itemgetter("_parameters", "_buffers", "_modules")
_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _held(attributes: list[dict[str, Any]]) -> list[Any]:
    """What the modules of these ``__dict__`` hold, read from there: somebody may have put another dictionary."""
    return list(chain.from_iterable(map(dict.values, chain.from_iterable(map(_HELD, attributes)))))


def _known(module: nn.Module) -> bool:
    """Whether what the call of ``module`` depends on is among :data:`_CONSTANTS`: other classes may ask anything."""
    return type(module).__module__.startswith(("torch.nn.", "fused_preact."))


def _methods(classes: list[type[nn.Module]]) -> list[Any]:
    """What calls of modules of ``classes`` run, where somebody may have put something else."""
    helpers = (nn.Conv2d._conv_forward, nn.BatchNorm2d._check_input_dim)
    return [*helpers, *(method for cls in classes for method in (cls.__call__, cls._call_impl, cls.forward))]


class _Watched:
    """What folded weights were made of, and whether it is still the same."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.modules = modules
        self.types = list(map(type, modules))
        self.classes = list(dict.fromkeys(self.types))
        self.methods = _methods(self.classes)
        self.attributes = [m.__dict__ for m in modules]
        self.below = [m.__dict__ for m in modules if m is not root]
        # An attribute that comes to an instance later may stand before its class's.
        self.names = list(map(tuple, self.attributes))
        self.objects = _held(self.attributes)
        names = (_CONSTANTS if _known(m) else tuple(m.__dict__) for m in modules)
        self.getters = [
            operator.itemgetter(*(n for n in wanted if n in d))
            for wanted, d in zip(names, self.attributes, strict=True)
        ]
        self.constants = self._constants()
        # An inference tensor counts no writes. It is in the lists above, and what it belongs to is not folded.
        named = [
            pair for pair in (*root.named_parameters(), *root.named_buffers()) if not pair[1].is_inference()
        ]
        self.tensors = [t for name, t in named if not name.endswith("num_batches_tracked")]
        self.versions = [t._version for t in self.tensors]
        self.addresses = [t.data_ptr() for t in self.tensors]
        # Aliases keep the storages alive: their addresses cannot come back as those of others.
        self.aliases = [t.detach() for t in self.tensors]
        self.on_cpu = all(t.device.type == "cpu" for t in self.tensors)
        self.bytes = self._bytes()

    def heard(self) -> bool:
        """Whether somebody listens to the calls of the modules, but for the root, whose call is what is asked for."""
        return any(chain.from_iterable(map(_HOOKS, self.below)))

    def _constants(self) -> list[Any]:
        return [get(d) for get, d in zip(self.getters, self.attributes, strict=True)]

    def _same_constants(self) -> bool:
        try:
            return self._constants() == self.constants
        except Exception:  # of another object whose equality is no truth value
            return False

    def _bytes(self) -> Any:
        """Changes with what uncounted writes leave in the tensors: equal where there were none."""
        return fingerprint(self.aliases) if self.on_cpu and self.aliases else None

    def unchanged(self) -> bool:
        """Whether every module, tensor and constant is the one it was, and no tensor has been written to.

        In whole lists, since it precedes each call: some thousand comparisons for ResNet-164.
        """
        held = _held(self.attributes)
        return (
            len(held) == len(self.objects)
            and all(map(operator.is_, held, self.objects))
            and list(map(tuple, self.attributes)) == self.names
            and self._same_constants()
            and list(map(type, self.modules)) == self.types
            and _methods(self.classes) == self.methods
            and [t._version for t in self.tensors] == self.versions
            and [t.data_ptr() for t in self.tensors] == self.addresses
            and self._bytes() == self.bytes
        )


class _Fold(NamedTuple):
    """Folded weights."""

    run: Callable[[Tensor], Tensor | None]
    channels: int
    dtype: torch.dtype
    device: torch.device


class _State(NamedTuple):
    """A fold, or None where there cannot be one, and what it was made of; replaced as a whole: threads see either."""

    watched: _Watched
    fold: _Fold | None


class _Folded:
    """Runs a module with folded weights, or declines; hangs on the module as ``_folded``."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._state: _State | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy folds its own: versions and addresses mean nothing elsewhere.
        return {"_root": self._root, "_state": None}

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output, or None where the module has to run as it is."""
        if observed(x) or type(x) is not Tensor or x.dim() != 4 or x.numel() == 0:
            return None
        state = self._current()
        if state is None or state.fold is None or state.watched.heard():
            return None
        fold = state.fold
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state.watched.tensors)):
            return None
        dtype = _autocast_dtype(x)
        if (x.device, x.shape[1]) != (fold.device, fold.channels) or (
            dtype is None and x.dtype != fold.dtype
        ):
            return None
        outer = memory_format_of(x)
        x = to_native_format(x if dtype is None else x.to(dtype))
        with torch.no_grad():
            y = fold.run(x)
        return None if y is None else y.contiguous(memory_format=outer)

    def _current(self) -> _State | None:
        """The fold of the module as it is now, None in training: there this is asked at every step."""
        if self._root.training:
            return None
        state = self._state
        if state is None or not state.watched.unchanged():
            self._state = state = None
            modules = list(self._root.modules())
            # Hooks come and go, and a lazy module, which has one, is not yet what it will be.
            if not any(m.training or has_hooks(m) for m in modules if m is not self._root):
                with torch.no_grad():
                    watched = _Watched(self._root)
                    self._state = state = _State(watched, _fold(self._root, watched))
        return state


def _fold(root: nn.Module, watched: _Watched) -> _Fold | None:
    made: dict[Any, Any] = {}
    if isinstance(root, Stem):
        if not foldable_stem(root):
            return None
        weight: Any = root[0].weight
        run: Callable[[Tensor], Tensor | None] = functools.partial(run_stem, root, made)
    else:
        found = [_unit(module) for module in _leaves(root)]
        units = [unit for unit in found if unit is not None]
        if not units or len(units) < len(found):
            return None
        seen = set(map(id, watched.tensors))
        if any(id(t) not in seen for unit in units for t in unit.origins()):
            return None  # a plain attribute, which is not looked at for writes
        weights = [conv.weight for unit in units for _, conv in unit.sites]
        weight = weights[0]
        if any((w.device, w.dtype) != (weight.device, weight.dtype) for w in weights):
            return None
        run = functools.partial(run_chain, [fold_unit(unit) for unit in units], made)
    return _Fold(run, weight.shape[1], weight.dtype, weight.device)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast ``x`` to, None where it leaves it alone; as in :mod:`functional`."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
