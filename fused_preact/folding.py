"""Folded copies of a unit's weights, and how a chain of such units and a stem run; see :mod:`fused_preact.inference`.

In eval mode a BN is the affine map z = s x + t, s = gamma (v + eps)^-1/2, t = beta - mu s (Ioffe & Szegedy 2015,
arXiv:1502.03167). Behind a convolution, z = conv(a, s W) + (s b + t): a scaled weight and a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .calls import is_batch_norm, is_convolution, runs
from .functional import BatchNorm, Convolution
from .modules import Stem, _PreActUnit, is_identity_projection, takes_statistics
from .reference import bn_scale_shift, statistics_dtype

_MAX_POOL = nn.MaxPool2d.forward  # as it was at import: see calls.py


class FoldedConv(NamedTuple):
    """A convolution in the dtype of the statistics; ``bias`` holds the shift of the BN that was folded into it."""

    weight: Tensor
    bias: Tensor | None
    constants: tuple[Any, ...]


class FoldedUnit(NamedTuple):
    """scale x + shift, then the convolutions with a ReLU in front of those that ``relus`` says; plus the shortcut."""

    scale: Tensor
    shift: Tensor
    convs: list[FoldedConv]
    projection: FoldedConv | None
    padding: tuple[int, int] | None
    """The stride of a shortcut that pads with zero channels; it has a projection too, for other backends."""
    relus: tuple[bool, ...]


class UnitArguments(NamedTuple):
    """A residual unit as its call has it: what its sites and its shortcut compute with."""

    sites: list[tuple[BatchNorm, Convolution]]
    projection: Convolution | None
    padding: tuple[int, int] | None
    """The stride of a shortcut that pads with zero channels, or passes the activation on; it is a projection too."""

    def origins(self) -> list[Tensor]:
        """The tensors that folded weights are made of."""
        convs = [conv for _, conv in self.sites]
        if self.projection is not None and self.padding is None:
            convs.append(self.projection)
        tensors = [t for bn, _ in self.sites for t in bn[:4]] + [t for conv in convs for t in conv[:2]]
        return [t for t in tensors if t is not None]


def arguments_of(unit: _PreActUnit) -> UnitArguments | None:
    """The unit's arguments if it is what its class says, with plain children, and can be folded; else None."""
    sites = list(unit.sites())
    shortcut: Any = unit.shortcut
    padded = shortcut is not None and is_identity_projection(shortcut)
    if (
        not unit.fused
        or not takes_statistics(unit)
        or type(unit).forward_with_statistics is not _PreActUnit.forward_with_statistics
        or not all(_is_plain(bn) and _is_plain(conv) for bn, conv in sites)
        or not (shortcut is None or padded or _is_plain(shortcut))
    ):
        return None
    projection = None
    if padded:
        projection = Convolution(shortcut.weight, stride=shortcut.stride)
    elif shortcut is not None:
        projection = Convolution.of(shortcut)
    arguments = UnitArguments(
        [(BatchNorm.of(bn), Convolution.of(conv)) for bn, conv in sites],
        projection,
        shortcut.stride if padded else None,
    )
    return arguments if foldable(arguments) else None


def foldable(unit: UnitArguments) -> bool:
    """Whether its BNs normalise with running statistics, and everything is of one dtype and one device."""
    convs = [conv for _, conv in unit.sites] + ([] if unit.projection is None else [unit.projection])
    like = unit.sites[0][1].weight
    wide = statistics_dtype(like.dtype)
    tensors = [(t, {like.dtype}) for conv in convs for t in (conv.weight, conv.bias)]
    for bn, _ in unit.sites:
        if bn.batch_stats:
            return False
        tensors += [(t, {like.dtype, wide}) for t in bn[:4]]
    return all(
        type(t) in (Tensor, nn.Parameter)
        and not t.is_inference()
        and t.dtype in allowed
        and t.device == like.device
        for t, allowed in tensors
        if t is not None
    )


def _is_plain(module: Any) -> bool:
    """Whether ``module`` is a BatchNorm2d, a SyncBatchNorm (the same in eval mode) or a Conv2d.

    No subclass (a parametrised one is), and nothing replaced. Nor may a tensor be a plain attribute: it is not among
    the parameters and buffers that are looked at for writes.
    """
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        plain = is_batch_norm(module)
    else:
        plain = type(module) is nn.Conv2d and is_convolution(module)
    names = ("weight", "bias", "running_mean", "running_var")
    return plain and not any(name in module.__dict__ for name in names)


def foldable_stem(stem: Stem) -> bool:
    """Whether the stem is what the CPU's operation serves: a convolution of few channels, then max-pooling.

    Without the pooling there is nothing to fuse, and the library's convolution is faster (a CIFAR stem at batch 64:
    0.8 ms against 2.1).
    """
    if [type(m) for m in stem] != [nn.Conv2d, nn.MaxPool2d] or not _is_plain(stem[0]):
        return False
    if not runs(stem[1], _MAX_POOL):
        return False
    conv: Any = stem[0]
    pool: Any = stem[1]
    squares = (conv.kernel_size, conv.stride, conv.padding)
    return (
        all(isinstance(v, tuple) and v[0] == v[1] for v in squares)
        and all(isinstance(v, int) for v in (pool.kernel_size, pool.stride, pool.padding))
        and (conv.dilation, conv.groups) == ((1, 1), 1)
        and (pool.dilation, pool.ceil_mode, pool.return_indices) == (1, False, False)
        and conv.in_channels <= 8
        and all(
            type(t) in (Tensor, nn.Parameter) and not t.is_inference() and t.dtype == conv.weight.dtype
            for t in conv.parameters()
        )
    )


def _constants(conv: Convolution) -> tuple[Any, ...]:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    return pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups


def fold_unit(unit: UnitArguments) -> FoldedUnit:
    """Copies of the unit's weights with every BN but the first in them."""
    affine, convs = [], []
    for bn, conv in unit.sites:
        wide = statistics_dtype(conv.weight.dtype)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale, shift, _ = bn_scale_shift(
            bn.running_mean.to(wide), bn.running_var.to(wide), bn.weight, bn.bias, bn.eps
        )
        affine.append((scale, shift))
        convs.append(_wide(conv, wide))
    for index, (scale, shift) in enumerate(affine[1:]):
        weight, bias, constants = convs[index]
        convs[index] = FoldedConv(
            weight * scale[:, None, None, None], shift if bias is None else shift + scale * bias, constants
        )
    projection = None if unit.projection is None else _wide(unit.projection, wide)
    relus = tuple(bn.relu for bn, _ in unit.sites)
    return FoldedUnit(*affine[0], convs, projection, unit.padding, relus)


def _wide(conv: Convolution, dtype: torch.dtype) -> FoldedConv:
    bias = None if conv.bias is None else conv.bias.detach().to(dtype)
    return FoldedConv(conv.weight.detach().to(dtype), bias, _constants(conv))


# --- the two ways to run ------------------------------------------------------------------------------------


def _run_sites(k: Any, units: list[FoldedUnit], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Unit by unit with the operations of a backend: y of x. The weights are already in the dtype of x."""
    (x,) = tensors
    assert x is not None
    for unit in units:
        added = x
        first, *following = unit.relus
        if unit.projection is not None:
            weight, bias, constants = unit.projection
            added, _, _ = k.conv_fprop(
                x, unit.scale, unit.shift, weight, bias, None, *constants, False, False, first
            )
        last = len(unit.convs) - 1
        affine: tuple[Tensor | None, Tensor | None] = (unit.scale, unit.shift)
        # The last convolution has no BN behind it in the unit.
        for index, ((weight, bias, constants), relu) in enumerate(
            zip(unit.convs, [*following, False], strict=True)
        ):
            residual = added if index == last else None
            x, _, _ = k.conv_fprop(x, *affine, weight, bias, residual, *constants, False, relu, first)
            affine = (None, None)
    return [x]


class _Cast(NamedTuple):
    """The units with their weights as a backend's convolution reads them: the dtype of its input, channels_last."""

    units: list[FoldedUnit]
    tensors: list[Tensor]
    """All that they hold."""
    memo: dict[Any, Any]
    """For :func:`ops.run`."""


def _cast(units: list[FoldedUnit], dtype: torch.dtype) -> _Cast:
    """The units for inputs of ``dtype``."""

    def cast(conv: FoldedConv) -> FoldedConv:
        return conv._replace(weight=conv.weight.to(dtype, memory_format=torch.channels_last))

    units = [
        unit._replace(
            convs=[cast(c) for c in unit.convs],
            projection=None if unit.projection is None else cast(unit.projection),
        )
        for unit in units
    ]
    tensors = [t for unit in units for t in (unit.scale, unit.shift)]
    convs = [c for unit in units for c in (*unit.convs, unit.projection) if c is not None]
    tensors += [t for c in convs for t in (c.weight, c.bias) if t is not None]
    return _Cast(units, tensors, {})


class _Packed(NamedTuple):
    """The arguments of the CPU operation ``unit_chain`` beside its input."""

    weights: Tensor
    spec: list[int]


# kernels/cpu/chain.h, enum Shortcut.
_SHORTCUTS = {"identity": 1, "padding": 2, "projection": 3}


def _pack(units: list[FoldedUnit], dtype: torch.dtype) -> _Packed | None:
    """The chain as ``kernels/cpu/chain.h`` describes it, for images of ``dtype``; None where it cannot."""
    spec = [units[0].convs[0].weight.shape[1]]
    tensors: list[Tensor] = []
    for unit in units:
        if not all(unit.relus):
            return None
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
    return _Packed(torch.ops.fused_preact.unit_chain_pack(tensors, spec, dtype), spec)


def fingerprint(tensors: list[Tensor]) -> Any:
    """Something that differs where the bytes of the CPU tensors do: vectors whole, larger ones in some places."""
    if ops.compiled_for_cpu():
        return torch.ops.fused_preact.fingerprint(tensors)
    return [_some(t) for t in tensors]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _some(t: Tensor) -> list[int]:
    """Elements of ``t`` as integers, so that NaN is equal to itself: all of a vector, some 128 of what is larger."""
    if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
        memory = t.as_strided((t.numel(),), (1,))  # flatten would copy the second kind
    else:
        memory = t.flatten()
    step = 1 if t.dim() < 2 else max(t.numel() // 128, 1)
    return memory[::step].view(_INTEGERS[t.element_size()]).tolist()


# --- running ----------------------------------------------------------------------------------------------


def _compiled_chain(x: Tensor) -> bool:
    """Whether the compiled operations for whole chains serve ``x``."""
    return ops.serving_backend(x) == "cpu"


def run_chain(units: list[FoldedUnit], made: dict[Any, Any], x: Tensor) -> Tensor:
    """Run the units; ``made`` keeps what is prepared once."""
    if _compiled_chain(x):
        # Weights are packed in the type that is multiplied: that of the images, or float32.
        native, _ = torch.ops.fused_preact.cpu_products(x.dtype)
        key = "packed", x.dtype if native else torch.float32
        if key not in made:
            made[key] = _pack(units, x.dtype)
        packed = made[key]
        if packed is not None:
            return torch.ops.fused_preact.unit_chain(x, packed.weights, packed.spec)
    if x.dtype not in made:
        made[x.dtype] = _cast(units, x.dtype)
    cast: _Cast = made[x.dtype]
    k = ops.table(ops.requested_backend(), x)
    y = ops.run(k, cast.memo, x.shape, _run_sites, cast.units, (x,), cast.tensors)[0]
    assert y is not None
    return y


def run_stem(stem: Stem, made: dict[Any, Any], x: Tensor) -> Tensor | None:
    """Run the stem, None where no compiled operation serves it."""
    if not _compiled_chain(x):
        return None
    conv: Any = stem[0]
    pool: Any = stem[1]
    if "packed" not in made:
        made["packed"] = torch.ops.fused_preact.stem_pack(conv.weight.detach())
    window = [v[0] for v in (conv.kernel_size, conv.stride, conv.padding)]
    pooling = [pool.kernel_size, pool.stride, pool.padding]
    return torch.ops.fused_preact.stem_conv_pool(
        x, made["packed"], conv.bias, conv.out_channels, window, pooling
    )
