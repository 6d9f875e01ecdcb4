"""What a model really computes: its BN -> ReLU -> convolution sites, found while it runs.

Nothing is traced and no module class is looked at. A ``TorchFunctionMode`` sees every function that a forward pass
calls, and follows tensors by identity, so control flow, hooks, functional code and odd containers need no special
case. A graph matcher is checked against it: the two have nothing in common but the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RELU = {"relu", "relu_"}
ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Site:
    """BN -> ReLU (or nothing, ``relu`` False) -> conv2d; ``padded``: by way of a call that pads with zeros.

    ``bn`` and ``conv`` are the paths of the modules that own the parameters, or ``?`` for a computed weight.
    """

    bn: str
    conv: str
    relu: bool = True
    padded: bool = False


@dataclass(frozen=True)
class Addition:
    """A sum of two tensors of one shape. ``hosts``: the convolutions that could add the other operand themselves.

    A host is the convolution of a site, and the sum is the only reader of what it makes.
    """

    hosts: tuple[str, ...]


@dataclass
class Record:
    """What one forward pass did; a module that is called twice is counted twice."""

    sites: list[Site] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    other_additions: int = 0
    batch_norms: int = 0
    convolutions: int = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many sites, additions and heads."""
        return len(self.sites), len(self.additions), len(self.heads)


@dataclass(eq=False)
class _Node:
    """One value: the function that made it, and who reads it. An in-place call makes a new value of one tensor."""

    op: str
    inputs: tuple[_Node, ...] = ()
    shape: tuple[int, ...] = ()
    name: str = "?"
    readers: list[_Node] = field(default_factory=list)
    fits: bool = True
    """False for a call that looks right but is not: reflected padding, a pool of a part of the map, a scaled sum."""


def record(model: nn.Module, *inputs: Tensor) -> Record:
    """Run ``model`` once, as it stands (train or eval), and report its sites, additions and heads.

    The pass has a pass's side effects, such as new running statistics; give a copy where they matter.
    """
    watcher = _Watcher(model)
    with watcher:
        model(*inputs)
    return _report(watcher.nodes)


class _Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self._values: dict[int, _Node] = {}
        self._alive: list[Tensor] = []  # an identity is unique as long as its owner lives
        self._names = {id(tensor): name for name, tensor in _owned(model)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        versions = {id(tensor): tensor._version for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        made = list(_tensors(out))
        # A tensor handed back as it came, by a dropout at rest or contiguous(), is no new value.
        if made and not all(versions.get(id(tensor)) == tensor._version for tensor in made):
            self._note(func, args, kwargs, made)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> None:
        read = tuple(self._value(tensor) for tensor in _tensors((args, kwargs)))
        node = _Node(getattr(func, "__name__", str(func)), read, tuple(made[0].shape))
        self._describe(node, args, kwargs)
        for source in dict.fromkeys(read):
            source.readers.append(node)
        self.nodes.append(node)
        for tensor in made:
            self._values[id(tensor)] = node
            self._alive.append(tensor)

    def _value(self, tensor: Tensor) -> _Node:
        if id(tensor) not in self._values:
            self._values[id(tensor)] = _Node("given", shape=tuple(tensor.shape))
            self._alive.append(tensor)
        return self._values[id(tensor)]

    def _describe(self, node: _Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reduce ``node`` to the input that matters, with the name of its owner and whether its options fit."""
        first = _argument(args, kwargs, 0, "input")
        if node.op == "batch_norm":
            # An affine-free norm is known by its statistics; torch.batch_norm has the weight where F has the mean.
            keys = ("weight", "bias", "running_mean", "running_var")
            parts = [*args[1:5], *(kwargs.get(key) for key in keys)]
            node.name = next((self._names[id(part)] for part in parts if id(part) in self._names), "?")
            node.fits = first.dim() == 4
        elif node.op == "conv2d":
            node.name = self._names.get(id(_argument(args, kwargs, 1, "weight")), "?")
        elif node.op == "pad":
            node.fits = _pads_evenly(args, kwargs)
        elif node.op in ADD:
            other = _argument(args, kwargs, 1, "other")
            # Both operands are tensors of the sum's shape, and neither is scaled.
            shapes = {tuple(getattr(operand, "shape", ())) for operand in (first, other)}
            node.fits = shapes == {node.shape} and len(node.shape) == 4 and kwargs.get("alpha", 1) == 1
            return
        elif node.op in ("mean", "avg_pool2d", "adaptive_avg_pool2d"):
            node.fits = _pools_globally(node, first, args, kwargs)
        if isinstance(first, Tensor):
            node.inputs = (self._value(first),)


def _report(nodes: list[_Node]) -> Record:
    found = Record()
    sites: dict[_Node, Site] = {}
    for node in nodes:
        if node.op == "batch_norm" and node.fits:
            found.batch_norms += 1
        elif node.op == "conv2d":
            found.convolutions += 1
            site = _site(node)
            if site is not None:
                sites[node] = site
        elif node.op in ADD and len(node.shape) == 4:
            convs = [source for source in node.inputs if source in sites and source.readers == [node]]
            if node.fits and convs:
                found.additions.append(Addition(tuple(conv.name for conv in convs)))
            else:
                found.other_additions += 1
        elif node.op in ("mean", "avg_pool2d", "adaptive_avg_pool2d") and node.fits:
            source = node.inputs[0]
            if source.op in RELU and _is_norm(source.inputs[0]):
                found.heads.append(source.inputs[0].name)
    found.sites = list(sites.values())
    return found


def _site(conv: _Node) -> Site | None:
    source = conv.inputs[0]
    padded = source.op == "pad" and source.fits
    if padded:
        source = source.inputs[0]
    relu = source.op in RELU
    if relu:
        source = source.inputs[0]
    return Site(source.name, conv.name, relu, padded) if _is_norm(source) else None


def _is_norm(node: _Node) -> bool:
    return node.op == "batch_norm" and node.fits


def _pads_evenly(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Zeros, as many on either side, in height and width only: what a convolution's own padding can do."""
    pad = list(_argument(args, kwargs, 1, "pad"))
    mode = _argument(args, kwargs, 2, "mode") or "constant"
    value = _argument(args, kwargs, 3, "value") or 0
    pad += [0] * (8 - len(pad))
    return mode == "constant" and value == 0 and pad[0] == pad[1] and pad[2] == pad[3] and not any(pad[4:])


def _pools_globally(node: _Node, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if first.dim() != 4:
        return False
    if node.op == "mean":
        dims = _argument(args, kwargs, 1, "dim")
        return isinstance(dims, (tuple, list)) and {dim % 4 for dim in dims} == {2, 3}
    return node.shape[2:] == (1, 1) and (node.op != "avg_pool2d" or _covers(first, args, kwargs))


def _covers(first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    kernel = _argument(args, kwargs, 1, "kernel_size")
    kernel = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    return kernel == tuple(first.shape[2:])


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and buffer with the path of its owner; in a dict of parameters the key stands for the owner."""
    for path, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for key, tensor in tensors.items():
            owner = path if key in ("weight", "bias", "running_mean", "running_var") else f"{path}.{key}"
            yield owner.lstrip("."), tensor
