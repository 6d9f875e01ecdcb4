"""A module's forward with fused calls in it, and the test of whether it still is what the module does."""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..calls import has_hooks, is_batch_norm, is_convolution, runs
from .match import Found, match
from .rewrite import rewrite
from .roles import _FORWARDS
from .runtime import ChainCall, UnitCall
from .tracing import Structure, Traced, asserts_images, trace

__all__ = ["Program", "structure_of"]

_INTERNAL = set(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_numbers = itertools.count()


def structure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor], Structure]:
    """A key of the form of a call's arguments, their tensors, and the form itself."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    form = [True if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return (spec, tuple(form)), tensors, pytree.tree_unflatten(form, spec)


class Program:
    """Compiled from a trace of ``owner``; ``run(owner, *tensors)`` is its forward."""

    run: Callable[..., Any]

    def __init__(self, owner: nn.Module, inline: Callable[[nn.Module], bool], structure: Structure) -> None:
        traced = trace(owner, structure, inline)
        found = match(traced.graph, traced.module)
        self.matches = len(found.matches)
        self._watch(owner, traced, found)
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

    def _watch(self, owner: nn.Module, traced: Traced, found: Found) -> None:
        """Note what the graph was made of.

        Of a module whose code is in the graph: its attributes, its children, and which parameters and buffers it has.
        Of one that a match takes the place of: that nobody listens and nothing was replaced.
        """
        inlined = list(dict.fromkeys(traced.inlined))
        self._norms: list[nn.Module] = []
        self._convs: list[nn.Module] = []
        replaced: list[nn.Module] = []
        for m in found.matches:
            for node in m.nodes():
                if node.op == "call_module":
                    module = traced.module(str(node.target))
                    kind = (
                        self._norms
                        if is_batch_norm(module)
                        else self._convs
                        if is_convolution(module)
                        else replaced
                    )
                    kind.append(module)
        places: list[tuple[dict[str, Any], list[str]]] = []
        for module in inlined:
            held = module.__dict__
            names = [name for name in held if name not in _INTERNAL]
            if module is owner:
                names.remove("forward")
            places += [(held, names), (module._modules, list(module._modules))]
        for module in replaced:
            places.append(
                (
                    module.__dict__,
                    [n for n in ("training", "p", "padding", "output_size") if n in module.__dict__],
                )
            )
        self._places = [place for place, names in places for _ in names]
        self._names = [name for _, names in places for name in names]
        self._objects = list(map(dict.get, self._places, self._names))
        dicts = [d for m in inlined for d in (m.__dict__, m._modules, m._parameters, m._buffers)]
        self._dicts, self._sizes = dicts, list(map(len, dicts))
        self._held = [
            (d, name, d[name] is None) for m in inlined for d in (m._parameters, m._buffers) for name in d
        ]
        listened = [m for m in (*inlined, *replaced) if m is not owner]
        called = {traced.module(str(n.target)) for n in traced.graph.nodes if n.op == "call_module"}
        self._heard = [m for m in called if has_hooks(m)]
        self._hooks = [m.__dict__[name] for m in listened for name in _HOOKS]
        self._plain = [(m, type(m).forward) for m in inlined if m is not owner]
        self._plain += [
            (m, forward) for m in replaced for cls, forward in _FORWARDS.items() if isinstance(m, cls)
        ]
        self._owner = owner, type(owner).forward
        called = [traced.module(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"]
        self._heard = [m for m in called if has_hooks(m)]

    def valid(self) -> bool:
        """Whether ``owner`` and all in it that the graph was made of are as they were."""
        owner, forward = self._owner
        return (
            not any(self._hooks)
            and all(map(has_hooks, self._heard))  # without them it may be fused
            and all(map(operator.is_, map(dict.get, self._places, self._names), self._objects))
            and list(map(len, self._dicts)) == self._sizes
            and type(owner).forward is forward
            and all(is_batch_norm(m) and not has_hooks(m) for m in self._norms)
            and all(is_convolution(m) and not has_hooks(m) for m in self._convs)
            and all(runs(m, forward) for m, forward in self._plain)
            and all((d.get(name) is None) is none for d, name, none in self._held)
        )


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
