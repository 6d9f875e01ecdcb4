"""What a node of an FX graph does, however it is spelled: as a module, a function or a method, in place or not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from ..calls import has_hooks, is_batch_norm, is_convolution, runs

__all__ = [
    "IN_PLACE",
    "Add",
    "Convolve",
    "Normalise",
    "Pad",
    "Pool",
    "Relu",
    "Role",
    "Same",
    "role_of",
    "written_operand",
]

Modules = Callable[[str], nn.Module]
"""The module at a path of the graph."""


@dataclass(frozen=True, eq=False)
class Role:
    """``node`` does something to ``x``."""

    node: Node
    x: Node


@dataclass(frozen=True, eq=False)
class Normalise(Role):
    """Batch normalisation: by ``module``, or by the function with ``tensors`` (running mean and variance, weight,
    bias) and ``constants`` (training, momentum, eps).
    """

    module: nn.Module | None
    tensors: tuple[Node | None, ...] = ()
    constants: tuple[bool, float, float] = (False, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Convolve(Role):
    """A two-dimensional convolution: by ``module``, or by the function with ``tensors`` (weight, bias) and
    ``constants`` (stride, padding, dilation, groups). ``pad`` rows and columns of zeros are added first. ``channels``
    are its input's, where they are known. Without a module and tensors the weight is the 1x1 identity.
    """

    module: nn.Module | None
    tensors: tuple[Node | None, ...] = ()
    constants: tuple[Any, ...] = ()
    pad: tuple[int, int] = (0, 0)
    channels: int | None = None

    @property
    def subsamples(self) -> bool:
        """Whether it does nothing but to leave out pixels."""
        return self.module is None and not self.tensors


@dataclass(frozen=True, eq=False)
class Relu(Role):
    """max(x, 0)."""


@dataclass(frozen=True, eq=False)
class Same(Role):
    """Passes ``x`` on."""


@dataclass(frozen=True, eq=False)
class Pad(Role):
    """Zeros around ``x``: as many rows above as below, as many columns left as right."""

    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Add(Role):
    """The sum of ``x`` and ``other``."""

    other: Node


@dataclass(frozen=True, eq=False)
class Pool(Role):
    """The mean over height and width, kept as dimensions of size 1 or not. ``window``: if it is the map's size."""

    keepdim: bool
    window: tuple[int, int] | None = None
    stride: Any = None


# The modules' forwards as they were at import: see calls.py.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    cls: cls.forward
    for cls in (
        nn.ReLU,
        nn.Identity,
        nn.Dropout,
        nn.Dropout2d,
        nn.AdaptiveAvgPool2d,
        nn.AvgPool2d,
        nn.ZeroPad2d,
    )
}
_BATCH_NORM = {F.batch_norm, torch.batch_norm}
_CONVOLUTION = {F.conv2d, torch.conv2d}
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    operation = getattr(operator, name)

    def in_place(x: Any, other: Any) -> Any:
        return operation(x, other)

    in_place.__name__ = name
    return in_place


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    name: _in_place(name)
    for name in (
        *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul"),
        *("ior", "ipow", "irshift", "isub", "itruediv", "ixor"),
    )
}
"""``+=`` and its like as calls. For ``operator.iadd`` FX writes a statement, which binds a number's name anew."""

_ADD = {operator.add, operator.iadd, IN_PLACE["iadd"], torch.add, "add", "add_"} | {
    *("__add__", "__radd__", "__iadd__")
}
_MEAN = {torch.mean, "mean"}
_DROPOUT = {F.dropout, F.dropout2d}
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NATIVE_NORM_ARGUMENTS = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
)
_POOL_ARGUMENTS = (
    *("input", "kernel_size", "stride", "padding"),
    *("ceil_mode", "count_include_pad", "divisor_override"),
)
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def role_of(node: Node, modules: Modules) -> Role | None:
    """The role of ``node``, None for anything else."""
    if node.op == "call_module":
        return _of_module(node, modules(str(node.target)))
    if node.op not in ("call_function", "call_method") or not _first(node):
        return None
    target, x = node.target, node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(x, Node):
        return _addition(node) if target in _ADD else None
    if target in _BATCH_NORM:
        return _norm(node)
    if target in _CONVOLUTION:
        return _conv(node, modules)
    if target in _RELU:
        return Relu(node, x)
    if target in _ADD:
        return _addition(node)
    if target in _MEAN:
        return _mean(node, x)
    if target in _DROPOUT:
        found = _bound(node, ("input", "p", "training", "inplace"), {"p": 0.5, "training": True})
        return (
            Same(node, x)
            if (found is not None and found["training"] is False) or _get(found, "p") == 0
            else None
        )
    if target is F.pad:
        return _padding(node, x)
    if target is F.adaptive_avg_pool2d:
        found = _bound(node, ("input", "output_size"), {})
        return Pool(node, x, True) if found is not None and _is_one(found["output_size"]) else None
    if target is F.avg_pool2d:
        found = _bound(node, _POOL_ARGUMENTS, {"stride": None, "padding": 0})
        if found is None or found.get("ceil_mode", False) or found.get("divisor_override") is not None:
            return None
        return _window(node, x, found["kernel_size"], found["stride"], found["padding"])
    if target == "contiguous":
        return Same(node, x)
    return None


def _first(node: Node) -> bool:
    return bool(node.args) or "input" in node.kwargs


def _get(found: dict[str, Any] | None, name: str) -> Any:
    return None if found is None else found.get(name)


def _bound(node: Node, names: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name, None where there are others."""
    if len(node.args) > len(names) or any(name not in names for name in node.kwargs):
        return None
    found = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return found if "input" in found else None


def _of_module(node: Node, module: nn.Module) -> Role | None:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node) or has_hooks(module):
        return None
    x = node.args[0]
    if is_batch_norm(module):
        return Normalise(node, x, module)
    if is_convolution(module):
        return Convolve(node, x, module, channels=module.in_channels)  # type: ignore[arg-type]
    for cls, forward in _FORWARDS.items():
        if isinstance(module, cls) and runs(module, forward):
            return _of_simple_module(node, x, module)
    return None


def _of_simple_module(node: Node, x: Node, module: Any) -> Role | None:
    if isinstance(module, nn.ReLU):
        return Relu(node, x)
    if isinstance(module, nn.Identity):
        return Same(node, x)
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return Same(node, x) if not module.training or module.p == 0 else None
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return Pool(node, x, True) if _is_one(module.output_size) else None
    if isinstance(module, nn.ZeroPad2d):
        left, right, top, bottom = module.padding
        return Pad(node, x, (top, left)) if left == right and top == bottom else None
    if (module.ceil_mode, module.divisor_override) != (False, None):
        return None
    return _window(node, x, module.kernel_size, module.stride, module.padding)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, tuple | list) and all(isinstance(v, int) for v in value):
        return (value[0], value[-1]) if len(value) in (1, 2) else None
    return None


def _is_one(size: Any) -> bool:
    return _pair(size) == (1, 1)


def _window(node: Node, x: Node, kernel: Any, stride: Any, padding: Any) -> Role | None:
    window = _pair(kernel)
    fits = window is not None and _pair(padding) == (0, 0) and (not stride or _pair(stride) is not None)
    return Pool(node, x, True, window, stride or None) if fits else None


def _norm(node: Node) -> Role | None:
    native = node.target is torch.batch_norm
    names = (*_NATIVE_NORM_ARGUMENTS, "cudnn_enabled") if native else _NORM_ARGUMENTS
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    found = _bound(node, names, defaults)
    if found is None:
        return None
    tensors = tuple(found[name] for name in ("running_mean", "running_var", "weight", "bias"))
    training, momentum, eps = found["training"], found["momentum"], found["eps"]
    if not all(t is None or isinstance(t, Node) for t in tensors) or not isinstance(training, bool):
        return None
    if not isinstance(momentum, int | float) or not isinstance(eps, int | float):
        return None
    return Normalise(node, found["input"], None, tensors, (training, float(momentum), float(eps)))


def _conv(node: Node, modules: Modules) -> Role | None:
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    found = _bound(node, _CONV_ARGUMENTS, defaults)
    if found is None or not isinstance(found["weight"], Node) or not isinstance(found["groups"], int):
        return None
    padding = 0 if found["padding"] == "valid" else found["padding"]
    sizes = [_pair(v) for v in (found["stride"], padding, found["dilation"])]
    if any(size is None for size in sizes) or not isinstance(found["bias"], Node | None):
        return None
    weight, groups = found["weight"], found["groups"]
    constants = (*sizes, groups)
    return Convolve(
        node,
        found["input"],
        None,
        (weight, found["bias"]),
        constants,
        channels=_channels(weight, groups, modules),
    )


def _channels(weight: Node, groups: int, modules: Modules) -> int | None:
    """The input channels of a convolution with this weight: an attribute of the model, or what Dynamo knows of it."""
    value = weight.meta.get("example_value")
    if weight.op == "get_attr":
        owner, _, name = str(weight.target).rpartition(".")
        value = getattr(modules(owner), name, None)
    return value.shape[1] * groups if isinstance(value, torch.Tensor) and value.dim() == 4 else None


def _addition(node: Node) -> Role | None:
    found = _bound(node, ("input", "other", "alpha"), {"alpha": 1})
    if found is None or found["alpha"] != 1:
        return None
    x, other = found["input"], found.get("other")
    return Add(node, x, other) if isinstance(x, Node) and isinstance(other, Node) else None


def _mean(node: Node, x: Node) -> Role | None:
    found = _bound(node, ("input", "dim", "keepdim"), {"dim": None, "keepdim": False})
    if found is None or not isinstance(found["dim"], tuple | list) or not isinstance(found["keepdim"], bool):
        return None
    dims = set(found["dim"])
    return Pool(node, x, found["keepdim"]) if dims in ({2, 3}, {-1, -2}, {2, -1}, {3, -2}) else None


def _padding(node: Node, x: Node) -> Role | None:
    found = _bound(node, ("input", "pad", "mode", "value"), {"mode": "constant", "value": None})
    if found is None or found["mode"] != "constant" or found["value"] not in (None, 0):
        return None
    pad = found["pad"]
    if (
        not isinstance(pad, tuple | list)
        or len(pad) != 4
        or not all(isinstance(p, int) and p >= 0 for p in pad)
    ):
        return None
    left, right, top, bottom = pad
    return Pad(node, x, (top, left)) if left == right and top == bottom else None


def written_operand(node: Node, modules: Modules) -> Node | None:
    """What ``node`` writes to in place, None where it writes nothing."""
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, Node):
        return None
    target = node.target
    if node.op == "call_module":
        inplace = bool(getattr(modules(str(target)), "inplace", False))
    elif node.op == "call_method":
        name = str(target)
        inplace = (name.endswith("_") and not name.endswith("__")) or (
            name.startswith("__i") and name != "__invert__"
        )
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        module = getattr(target, "__module__", "")
        operators = module == "_operator" and (name in _IN_PLACE_OPERATORS or name == "setitem")
        inplace = (
            node.kwargs.get("inplace") is True
            or target in _IN_PLACE_CALLS
            or operators
            or (name.endswith("_") and not name.startswith("__"))
        )
        inplace = inplace or _positional_inplace(node)
    else:
        return None
    return first if inplace else None


_IN_PLACE_OPERATORS = {name[2:-2] for name in dir(operator) if name.startswith("__i")} - {
    *("index", "invert", "inv", "indexOf", "is_", "is_not", "itemgetter")
}
_IN_PLACE_CALLS = set(IN_PLACE.values())
# The functions of torch.nn.functional that take ``inplace`` by position: where it stands.
_INPLACE_AT: dict[Any, int] = {
    F.relu: 1,
    F.dropout: 3,
    F.leaky_relu: 2,
    F.elu: 2,
    F.relu6: 1,
    F.silu: 1,
    F.threshold: 3,
}


def _positional_inplace(node: Node) -> bool:
    at = _INPLACE_AT.get(node.target)
    return at is not None and len(node.args) > at and node.args[at] is True
