"""A module's forward with fused calls in it, and the test of whether it still is what the module does."""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calls import has_hooks, is_batch_norm, is_convolution, runs
from .match import Found, match
from .rewrite import rewrite
from .roles import _FORWARDS
from .tracing import Structure, Traced, trace

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
        self.matches = len(found.chains) + len(found.heads)
        self._watch(owner, traced, found)
        if self.matches:
            rewrite(traced.graph, found)
            self.run = _compiled(traced)

    def _watch(self, owner: nn.Module, traced: Traced, found: Found) -> None:
        """Note what the graph was made of.

        Of a module whose code is in the graph: its attributes, its children, and which parameters and buffers it has.
        Of one that a match takes the place of: that nobody listens and nothing was replaced.
        """
        inlined = list(dict.fromkeys(traced.inlined))
        self._norms: list[nn.Module] = []
        self._convs: list[nn.Module] = []
        replaced: list[nn.Module] = []
        for m in (*found.chains, *found.heads):
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

    def valid(self) -> bool:
        """Whether ``owner`` and all in it that the graph was made of are as they were."""
        owner, forward = self._owner
        return (
            not any(self._hooks)
            and all(map(has_hooks, self._heard))
            and all(map(operator.is_, map(dict.get, self._places, self._names), self._objects))
            and list(map(len, self._dicts)) == self._sizes
            and type(owner).forward is forward
            and all(is_batch_norm(m) and not has_hooks(m) for m in self._norms)
            and all(is_convolution(m) and not has_hooks(m) for m in self._convs)
            and all(runs(m, forward) for m, forward in self._plain)
            and all((d.get(name) is None) is none for d, name, none in self._held)
        )


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
