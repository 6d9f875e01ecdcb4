"""Inference with folded BatchNorms: every BN of a unit but its first one goes into the convolution before it.

In eval mode a BN is the affine map z = s x + t, s = gamma (v + eps)^-1/2, t = beta - mu s (Ioffe & Szegedy 2015,
arXiv:1502.03167). Behind a convolution, z = conv(a, s W) + (s b + t): a scaled weight and a bias. The first BN of a
unit stands behind an addition whose sum the shortcut reads too, so it stays what only this library has, the prologue
of the first convolution. Nothing is written to the model: the folded weights are copies beside it, made by the first
call and again by the first call after anything that they depend on has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import ops
from .functional import BatchNorm, Convolution, to_native_format
from .modules import IdentityProjection, PreActSequential, _PreActUnit
from .reference import bn_scale_shift, memory_format_of, statistics_dtype

__all__ = ["optimize_for_inference", "undo_optimize_for_inference"]

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model) -> Model:
    """Let the units of ``model`` run with folded, prepacked weights where nobody needs a gradient; returns ``model``.

    Takes effect in eval mode under ``torch.no_grad()`` or ``torch.inference_mode()``. Parameters, buffers and state
    dict stay as they are, training goes on as before, and :func:`undo_optimize_for_inference` removes it again. The
    copies take about the memory of the weights (in float32 on a CPU).

    Whatever a copy was made of is compared at each call, by identity, address and version: after ``load_state_dict``,
    an optimiser's step, ``.to()`` or another ``eps`` it is made anew. Only a write through ``.data`` leaves no trace;
    call this function again after one.

    As before run: training mode, calls that record gradients, ``torch.compile`` (which traces the unfolded model),
    hooks on a unit's children, parametrised weights, SyncBatchNorm and BNs without running statistics, and
    ``PreActConv2d``, which has nothing to fold. Under autocast the input is cast as always, and the CPU kernels keep
    the folded weights in float32. On a CPU a chain of units is one operation, in which each thread takes its images
    through all units; elsewhere each convolution is one.

    Raises TypeError where ``model`` is no module and ValueError where it holds none of our units.
    """
    units = _units(model)
    if not units:
        raise ValueError(
            f"model: got a {type(model).__name__} without residual units of fused_preact, allowed is a network "
            "that holds some (PreActBasicBlock, PreActBottleneck)"
        )
    undo_optimize_for_inference(model)
    _install(model)
    return model


def undo_optimize_for_inference(model: Model) -> Model:
    """Drop what :func:`optimize_for_inference` added; returns ``model``. TypeError where it is no module."""
    _units(model)
    for module in model.modules():
        if isinstance(module, (_PreActUnit, PreActSequential)):
            module._folded = None
    return model


def _units(model: Any) -> list[_PreActUnit]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    return [m for m in model.modules() if isinstance(m, _PreActUnit)]


def _install(module: nn.Module) -> None:
    """Chains as long as possible: a sequence of foldable units is one, however it is nested."""
    chain = list(_leaves(module))
    if chain and all(isinstance(m, _PreActUnit) and _foldable(m) for m in chain):
        assert isinstance(module, (_PreActUnit, PreActSequential))
        module._folded = _Chain(module)
        return
    for child in module.children():
        _install(child)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """What a sequence of units calls one after the other; a module that is no such sequence is itself the leaf."""
    if type(module) is PreActSequential:
        for child in module:
            yield from _leaves(child)
    else:
        yield module


# --- folding ----------------------------------------------------------------------------------------------


class FoldedConv(NamedTuple):
    """A convolution in the dtype of the statistics; ``bias`` holds the shift of the BN that was folded into it."""

    weight: Tensor
    bias: Tensor | None
    constants: tuple[Any, ...]


class FoldedUnit(NamedTuple):
    """relu(scale x + shift), then the convolutions with a ReLU between two; plus the shortcut."""

    scale: Tensor
    shift: Tensor
    convs: list[FoldedConv]
    projection: FoldedConv | None
    padding: tuple[int, int] | None
    """The stride of a shortcut that pads with zero channels; it has a projection too, for other backends."""


def _foldable(unit: _PreActUnit) -> bool:
    """Whether the unit is what its class says: plain children, running statistics, one dtype."""
    sites = list(unit.sites())
    shortcut = unit.shortcut
    if (
        not unit.fused
        or type(unit).forward_with_statistics is not _PreActUnit.forward_with_statistics
        or type(unit).forward is not _PreActUnit.forward
        or type(shortcut) not in (type(None), nn.Conv2d, IdentityProjection)
        or any(type(bn) is not nn.BatchNorm2d or type(conv) is not nn.Conv2d for bn, conv in sites)
        or any(bn.running_mean is None or bn.running_var is None for bn, _ in sites)
        or any(m.padding_mode != "zeros" for m in unit.children() if isinstance(m, nn.Conv2d))
    ):
        return False
    dtype = sites[0][1].weight.dtype
    convolutions = [conv for _, conv in sites] + ([] if shortcut is None else [shortcut])
    kinds = [(m, {dtype}) for m in convolutions]
    kinds += [(bn, {dtype, statistics_dtype(dtype)}) for bn, _ in sites]
    return all(
        type(t) in (Tensor, nn.Parameter) and not t.is_inference() and t.dtype in allowed
        for module, allowed in kinds
        for t in (*module.parameters(), *module.buffers())
        if t.dtype != torch.int64
    )


def _constants(conv: Convolution) -> tuple[Any, ...]:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    return pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups


def _fold(unit: _PreActUnit) -> FoldedUnit:
    affine, convs = [], []
    for bn_module, conv_module in unit.sites():
        bn, conv = BatchNorm.of(bn_module), Convolution.of(conv_module)
        wide = statistics_dtype(conv.weight.dtype)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale, shift, _ = bn_scale_shift(
            bn.running_mean.to(wide), bn.running_var.to(wide), bn.weight, bn.bias, bn.eps
        )
        affine.append((scale, shift))
        bias = None if conv.bias is None else conv.bias.detach().to(wide)
        convs.append(FoldedConv(conv.weight.detach().to(wide), bias, _constants(conv)))
    for index, (scale, shift) in enumerate(affine[1:]):
        weight, bias, constants = convs[index]
        convs[index] = FoldedConv(
            weight * scale[:, None, None, None], shift if bias is None else shift + scale * bias, constants
        )
    projection, padding = None, None
    if isinstance(unit.shortcut, nn.Conv2d):
        conv = Convolution.of(unit.shortcut)
        bias = None if conv.bias is None else conv.bias.detach().to(wide)
        projection = FoldedConv(conv.weight.detach().to(wide), bias, _constants(conv))
    elif isinstance(unit.shortcut, IdentityProjection):
        padding = unit.shortcut.stride
        projection = FoldedConv(unit.shortcut.weight.to(wide), None, (padding, (0, 0), (1, 1), 1))
    return FoldedUnit(*affine[0], convs, projection, padding)


# --- the two ways to run ------------------------------------------------------------------------------------


def _run_sites(k: Any, units: list[FoldedUnit], x: Tensor) -> Tensor:
    """Unit by unit with the operations of a backend; the weights are already in the dtype of ``x``."""
    for unit in units:
        added = x
        if unit.projection is not None:
            weight, bias, constants = unit.projection
            added, _, _ = k.conv_fprop(
                x, unit.scale, unit.shift, weight, bias, None, *constants, False, False
            )
        last = len(unit.convs) - 1
        affine: tuple[Tensor | None, Tensor | None] = (unit.scale, unit.shift)
        for index, (weight, bias, constants) in enumerate(unit.convs):
            residual = added if index == last else None
            x, _, _ = k.conv_fprop(x, *affine, weight, bias, residual, *constants, False, index < last)
            affine = (None, None)
    return x


def _cast(units: list[FoldedUnit], dtype: torch.dtype) -> list[FoldedUnit]:
    """The weights as a backend's convolution reads them: the dtype of its input, channels_last."""

    def cast(conv: FoldedConv) -> FoldedConv:
        return conv._replace(weight=conv.weight.to(dtype, memory_format=torch.channels_last))

    return [
        unit._replace(
            convs=[cast(c) for c in unit.convs],
            projection=None if unit.projection is None else cast(unit.projection),
        )
        for unit in units
    ]


class _Packed(NamedTuple):
    """The arguments of the CPU operation ``unit_chain`` beside its input."""

    weights: Tensor
    spec: list[int]


# kernels/cpu/chain.h, enum Shortcut.
_SHORTCUTS = {"identity": 1, "padding": 2, "projection": 3}


def _pack(units: list[FoldedUnit]) -> _Packed | None:
    """The chain as ``kernels/cpu/chain.h`` describes it, None where it has no words for it."""
    spec = [units[0].convs[0].weight.shape[1]]
    tensors: list[Tensor] = []
    for unit in units:
        projected = unit.projection is not None and unit.padding is None
        kind = "identity" if unit.projection is None else "projection" if projected else "padding"
        tails = [c.bias for c in (unit.convs[-1], unit.projection) if c is not None and c.bias is not None]
        spec += [len(unit.convs), _SHORTCUTS[kind], int(bool(tails))]
        tensors += [unit.scale, unit.shift]
        for index, (weight, bias, (stride, padding, dilation, groups)) in enumerate(unit.convs):
            if groups != 1:
                return None
            spec += [weight.shape[0], *weight.shape[2:], *stride, *padding, *dilation]
            tensors.append(weight)
            if index < len(unit.convs) - 1:
                assert bias is not None
                tensors.append(bias)
        if unit.projection is not None:
            weight, _, (stride, padding, _, groups) = unit.projection
            if groups != 1 or tuple(weight.shape[2:]) != (1, 1) or padding != (0, 0):
                return None
            spec += [weight.shape[0], *stride]
            tensors += [weight] if projected else []
        if tails:
            tensors.append(torch.stack(tails).sum(0))
    return _Packed(torch.ops.fused_preact.unit_chain_pack(tensors, spec), spec)


# --- when it may run --------------------------------------------------------------------------------------------


class _Watched:
    """What folded weights were made of, and whether it is still the same."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self.hooks = [getattr(m, name) for m in modules if m is not root for name in hooks]
        self.children = [(m._modules, len(m._modules)) for m in modules]
        self.objects: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[Tensor, int, int, Tensor]] = []
        for module in modules:
            state = module.__dict__
            constants = (
                "eps",
                "stride",
                "padding",
                "dilation",
                "groups",
                "padding_mode",
                "fused",
                "training",
            )
            self.objects += [(state, name, state[name]) for name in constants if name in state]
            for place in ("_parameters", "_buffers", "_modules"):
                self.objects += [(state[place], name, value) for name, value in state[place].items()]
            for name, tensor in [*state["_parameters"].items(), *state["_buffers"].items()]:
                if tensor is not None and name != "num_batches_tracked":
                    # The alias keeps the storage alive: its address cannot come back as another one's.
                    self.tensors.append((tensor, tensor._version, tensor.data_ptr(), tensor.detach()))

    def unchanged(self) -> bool:
        """Whether every module, tensor and constant is the one it was, and no tensor has been written to."""
        return (
            all(place.get(name, self) is value for place, name, value in self.objects)
            and all(len(place) == count for place, count in self.children)
            and all(
                t._version == version and t.data_ptr() == address for t, version, address, _ in self.tensors
            )
        )


class _State(NamedTuple):
    """A fold and what it was made of; replaced as a whole, so that threads see one or the other."""

    watched: _Watched
    units: list[FoldedUnit]
    dtype: torch.dtype
    made: dict[Any, Any]
    """Packed or cast weights, by what they are for."""


class _Chain:
    """Runs the units of a module with folded weights, or declines; hangs on the module as ``_folded``."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._state: _State | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy folds its own: versions and addresses mean nothing elsewhere.
        return {"_root": self._root, "_state": None}

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output, or None where the units have to run one by one."""
        if type(x) is not Tensor or x.dim() != 4 or x.numel() == 0:
            return None
        if torch.jit.is_tracing() or forward_ad._current_level >= 0:
            return None
        state = self._current()
        if state is None or any(state.watched.hooks):
            return None
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, *(entry[0] for entry in state.watched.tensors))
        ):
            return None
        scale = state.units[0].scale
        dtype = _autocast_dtype(x)
        if x.device != scale.device or x.shape[1] != len(scale) or (x.dtype != state.dtype and dtype is None):
            return None
        outer = memory_format_of(x)
        x = to_native_format(x if dtype is None else x.to(dtype))
        with torch.no_grad():
            return _run(state, x).contiguous(memory_format=outer)

    def _current(self) -> _State | None:
        """The fold of the units as they are now, None where they cannot be folded."""
        state = self._state
        if state is not None and state.watched.unchanged():
            return state
        self._state = None
        units = [unit for unit in _leaves(self._root) if isinstance(unit, _PreActUnit)]
        # Before anything else: in training this is asked at every step.
        if self._root.training or any(m.training for m in self._root.modules()):
            return None
        if len(units) < len(list(_leaves(self._root))) or not all(map(_foldable, units)):
            return None
        kinds = {(t.device, t.dtype) for unit in units for _, conv in unit.sites() for t in (conv.weight,)}
        if len(kinds) > 1:
            return None
        watched = _Watched(self._root)
        with torch.no_grad():
            self._state = state = _State(watched, list(map(_fold, units)), kinds.pop()[1], {})
        return state


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast ``x`` to, None where it leaves it alone; as in :mod:`functional`."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _run(state: _State, x: Tensor) -> Tensor:
    """The chain on an input of the right kind and format."""
    if ops.serving_backend(x) == "cpu" and torch.ops.fused_preact.unit_chain_serves(x.dtype):
        if "packed" not in state.made:
            state.made["packed"] = _pack(state.units)
        packed = state.made["packed"]
        if packed is not None:
            return torch.ops.fused_preact.unit_chain(x, packed.weights, packed.spec)
    if x.dtype not in state.made:
        state.made[x.dtype] = _cast(state.units, x.dtype)
    return _run_sites(ops.table(ops.requested_backend()), state.made[x.dtype], x)
