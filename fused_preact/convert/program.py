"""A module's forward with fused calls in it, and the test of whether it still is what the module does."""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from .match import match
from .rewrite import rewrite
from .roles import _FORWARDS
from .runtime import ChainCall, UnitCall
from .tracing import TENSOR, Structure, Traced, asserts_images, trace

__all__ = ["Failure", "Program", "structure_of"]

_INTERNAL = set(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
_numbers = itertools.count()


def structure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor], Structure]:
    """A key of the form of a call's arguments, their tensors, and the form itself.

    No tensors where there is an argument whose value may change while it stays the same object.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    form = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not all(leaf is TENSOR or isinstance(leaf, _CONSTANTS) for leaf in form):
        return None, [], ((), {})
    # (1, 1.0 and True are equal, and not the same argument.)
    return (spec, tuple((type(leaf), leaf) for leaf in form)), tensors, pytree.tree_unflatten(form, spec)


class Program:
    """Compiled from a trace of ``owner``; ``run(owner, *tensors)`` is its forward."""

    run: Callable[..., Any]

    def __init__(self, owner: nn.Module, inline: Callable[[nn.Module], bool], structure: Structure) -> None:
        traced = trace(owner, structure, inline)
        called = [traced.module(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"]
        self._watch = Watch(owner, list(dict.fromkeys(traced.inlined)), list(dict.fromkeys(called)))
        found = match(traced.graph, traced.module)
        self.matches = len(found.matches)
        self._unit: tuple[ChainCall, list[str | None]] | None = None
        if self.matches:
            rewrite(traced.graph, found)
            self.run = _compiled(traced)
            self._unit = _whole(traced)

    def unit(self, owner: nn.Module) -> UnitCall | None:
        """What ``owner`` computes with if it is one residual unit and nothing else, else None."""
        if self._unit is None:
            return None
        call, paths = self._unit
        return call.unit(tuple(None if path is None else operator.attrgetter(path)(owner) for path in paths))

    def valid(self) -> bool:
        """Whether ``owner`` and all in it that the graph was made of are as they were."""
        return self._watch.quiet()


class Failure:
    """What there is of a module that cannot be traced: nothing to run until it changes."""

    matches = 0

    def __init__(self, owner: nn.Module) -> None:
        self._watch = Watch(owner, list(owner.modules()), [])

    def valid(self) -> bool:
        """Whether ``owner`` is as it was."""
        return self._watch.quiet()


class Watch:
    """What a trace depends on, in lists that are compared without a loop in Python.

    Of a module whose code is in the graph: its attributes, its children, and which parameters and buffers it has. Of
    one that is called: what its role depends on. Of both: their classes, and whether somebody listens.
    """

    def __init__(self, owner: nn.Module, inlined: list[nn.Module], called: list[nn.Module]) -> None:
        places: list[tuple[dict[str, Any], str]] = []
        for module in inlined:
            held = module.__dict__
            places += [(held, n) for n in held if n not in _INTERNAL and (n, module) != ("forward", owner)]
            places += [(module._modules, name) for name in module._modules]
        for module in called:
            places += [(module.__dict__, name) for name in _names(module)]
        self._places, self._names = [place for place, _ in places], [name for _, name in places]
        self._objects = list(map(dict.get, self._places, self._names))
        self._dicts = [d for m in inlined for d in (m.__dict__, m._modules, m._parameters, m._buffers)]
        self._sizes = list(map(len, self._dicts))
        self._held = [(d, name) for m in inlined for d in (m._parameters, m._buffers) for name in d]
        self._missing = self._absent()
        self._hooks = [m.__dict__[name] for m in (*inlined, *called) if m is not owner for name in _HOOKS]
        self._heard = list(map(bool, self._hooks))
        self._modules = [*inlined, *called]
        self._types = list(map(type, self._modules))
        pairs = [(cls, name) for cls in set(self._types) for name in _METHODS if hasattr(cls, name)]
        self._classes, self._methods = [cls for cls, _ in pairs], [name for _, name in pairs]
        self._functions = list(map(getattr, self._classes, self._methods))

    def _absent(self) -> list[bool]:
        return [d.get(name) is None for d, name in self._held]

    def quiet(self) -> bool:
        """Whether all is as it was."""
        same = operator.is_
        return (
            all(map(same, map(dict.get, self._places, self._names), self._objects))
            and list(map(len, self._dicts)) == self._sizes
            and list(map(bool, self._hooks)) == self._heard
            and all(map(same, map(type, self._modules), self._types))
            and all(map(same, map(getattr, self._classes, self._methods), self._functions))
            and self._absent() == self._missing
        )


_METHODS = ("forward", "__call__", "_check_input_dim", "_conv_forward")
_REPLACED = ("forward", "_compiled_call_impl", "inplace")


def _names(module: nn.Module) -> tuple[str, ...]:
    """The attributes that the role of ``module`` depends on; what a fused call reads anew is not among them."""
    if isinstance(module, nn.BatchNorm2d):
        return (*_REPLACED, "_check_input_dim")
    if isinstance(module, nn.Conv2d):
        return (*_REPLACED, "_conv_forward", "padding", "padding_mode", "dilation", "kernel_size")
    if isinstance(module, tuple(_FORWARDS)):
        return (*_REPLACED, *(name for name in module.__dict__ if name not in _INTERNAL), "training")
    return _REPLACED


def _whole(traced: Traced) -> tuple[ChainCall, list[str | None]] | None:
    """The call and the paths of what it is given, where the rewritten graph is one residual unit of one tensor."""
    asserted = {node for node in traced.graph.nodes if asserts_images(node)}
    asserted |= {
        operand for node in asserted for eq in node.all_input_nodes for operand in (eq, *eq.all_input_nodes)
    }
    asserted -= {node for node in asserted if node.op == "placeholder"}
    nodes = [node for node in traced.graph.nodes if node.op != "get_attr" and node not in asserted]
    if [node.op for node in nodes] != ["placeholder", "call_function", "output"]:
        return None
    x, made, output = nodes
    call = getattr(made.target, "call", None)
    if not isinstance(call, ChainCall) or call.shortcut not in ("identity", "activation", "projection"):
        return None
    given = made.args[2:]
    known = all(node is None or (isinstance(node, Node) and node.op == "get_attr") for node in given)
    if made.args[0] is not x or output.args[0] is not made or not known:
        return None
    return call, [str(node.target) if isinstance(node, Node) else None for node in given]


def _compiled(traced: Traced) -> Callable[..., Any]:
    """The graph as a function of the module and its tensors."""
    code = traced.graph.python_code("self")
    name = f"<fused_preact {type(traced.root).__name__} {next(_numbers)}>"
    linecache.cache[name] = len(code.src), None, code.src.splitlines(True), name
    space = dict(code.globals)
    exec(
        compile(code.src, name, "exec"), space
    )  # the code that FX writes for a graph, as its GraphModule does
    function: Callable[..., Any] = space["forward"]
    return function
