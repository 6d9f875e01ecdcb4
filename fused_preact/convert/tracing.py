"""Symbolic tracing of a module's forward, with what cannot be traced left as a call.

``torch.fx.Tracer`` and four things more: a submodule that fails to trace, draws random numbers in Python, sets
attributes or asks for the type of a value stays a call of that module, with the reason; buffers are read when the
graph runs; and whoever is called with lists of tensors is traced with lists.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node, Proxy
from torch.utils import _pytree as pytree

from ..calls import has_hooks, is_batch_norm, is_convolution
from .roles import IN_PLACE

__all__ = ["TENSOR", "Traced", "Untraceable", "asserts_images", "trace"]

Structure = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, with ``TENSOR`` in the place of each tensor."""


class TENSOR:
    """Stands for a tensor in a :data:`Structure`."""


# One at a time: to trace is to patch nn.Module.
_TRACING = threading.RLock()


# Modules of these files are written in PyTorch's operations where they are not fused.
_PLAIN_INSIDE = ("fused_preact.modules", "fused_preact.units")

_REPLACED = "its forward was replaced on the instance"


class Untraceable(Exception):
    """Says why a module cannot be traced."""


class _Proxy(Proxy):
    """A traced value. Code that asks whether it is a tensor would be told that it is not, and do something else."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # (It cannot say that it is one: PyTorch's C++ code asks in the same way and would take it for one.)
        frame = sys._getframe(1)
        name = frame.f_globals.get("__name__", "")
        if "isinstance" in frame.f_code.co_names and not name.startswith(("torch.", "fused_preact.")):
            raise Untraceable("it asks for the type of a tensor")
        return type(self)


def _operator(name: str) -> Callable[[_Proxy, Any], Proxy]:
    def record(self: _Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", IN_PLACE[name], (self, other), {})

    return record


# Proxy takes ``x += y`` for ``x = x + y``, which is something else where x has another name too.
for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _operator(_name))


class Traced:
    """A graph of what ``root`` does, the modules whose code is in it, and what was left as calls, with the reason."""

    def __init__(
        self, root: nn.Module, graph: fx.Graph, inlined: list[nn.Module], opaque: dict[str, str]
    ) -> None:
        self.root, self.graph, self.inlined, self.opaque = root, graph, inlined, opaque

    def module(self, path: str) -> nn.Module:
        return self.root.get_submodule(path)


def trace(
    root: nn.Module, structure: Structure | None = None, inline: Callable[[nn.Module], bool] | None = None
) -> Traced:
    """Trace ``root``; ``inline`` says which modules' code is to be in the graph (all that are not PyTorch's).

    Without ``structure`` it is called with its required arguments, all tensors. Raises :class:`Untraceable`.
    """
    if _is_replaced(root):
        raise Untraceable(_REPLACED)
    with _TRACING:
        tracer = _Tracer(structure, inline)
        state = _State(root)
        try:
            graph = tracer.trace(root)
        except Exception as error:
            raise Untraceable(_reason(error)) from error
        finally:
            changed = state.restore()
    if changed:
        raise Untraceable(changed)
    for node in list(graph.nodes):
        # Of what the graph makes from images; the same question about an input stays, for whoever gives another.
        if asserts_images(node) and node.all_input_nodes[0].all_input_nodes[0].op != "placeholder":
            compared = node.all_input_nodes[0]
            size = compared.all_input_nodes[0]
            for gone in (node, compared, size):
                graph.erase_node(gone)
    return Traced(root, graph, [root, *tracer.inlined], tracer.opaque)


def asserts_images(node: Node) -> bool:
    """Whether ``node`` asserts of a value that it has four dimensions, and nobody else reads the comparison."""
    compared = node.args[0] if node.target is torch._assert else None
    if not isinstance(compared, Node) or compared.target is not operator.eq or compared.args[1:] != (4,):
        return False
    size = compared.args[0]
    if not isinstance(size, Node) or len(compared.users) > 1 or len(size.users) > 1 or node.users:
        return False
    return (size.target is getattr and size.args[1:] == ("ndim",)) or (size.op, size.target) == (
        "call_method",
        "dim",
    )


def _is_replaced(module: nn.Module) -> bool:
    """Whether somebody but :func:`fuse` hung another forward on ``module``."""
    forward = module.__dict__.get("forward")
    return forward is not None and not getattr(forward, "is_fused", False)


def _reason(error: Exception) -> str:
    if isinstance(error, Untraceable):
        return str(error)
    if "control flow" in str(error) or "bool" in str(error):
        return "its control flow depends on the data"
    return f"cannot be traced ({type(error).__name__}: {' '.join(str(error).split())[:100]})"


def _plain(a: Any) -> str:
    return "dict" if isinstance(a, dict) else "list"


class _State:
    """What tracing must not change: random streams, and the attributes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        held = module.__dict__
        self.held = [held, module._parameters, module._buffers, module._modules]
        self.held += [value for value in held.values() if type(value) in (dict, list, set)]
        self.before = [held.copy() for held in self.held]
        self.random, self.torch = random.getstate(), torch.get_rng_state()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> str | None:
        """Undo what changed; says what, or None."""
        reason = None
        if random.getstate() != self.random:
            random.setstate(self.random)
            reason = "it draws random numbers in Python"
        if not torch.equal(torch.get_rng_state(), self.torch):
            torch.set_rng_state(self.torch)
            reason = "it draws random numbers in Python"
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            now = numpy.random.get_state()
            if now[2:] != self.numpy[2:] or (now[1] != self.numpy[1]).any():
                numpy.random.set_state(self.numpy)
                reason = "it draws random numbers in Python"
        for held, before in zip(self.held, self.before, strict=True):
            if not _same(held, before):
                held.clear()
                (held.extend if isinstance(held, list) else held.update)(before)
                reason = "its forward sets attributes"
        return reason


def _same(held: Any, before: Any) -> bool:
    """Whether a container holds the same objects."""
    if len(held) != len(before):
        return False
    if isinstance(held, dict):
        return all(held.get(key, held) is value for key, value in before.items())
    if isinstance(held, list):
        return all(a is b for a, b in zip(held, before, strict=True))
    return set(map(id, held)) == set(map(id, before))


def _context() -> tuple[Any, ...]:
    """What a ``with`` block may set around operations, which a graph does not hold."""
    devices = [d for d in ("cpu", "cuda", "xpu") if torch.amp.is_autocast_available(d)]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices],
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_dispatch_stack(),
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, structure: Structure | None, inline: Callable[[nn.Module], bool] | None) -> None:
        super().__init__()
        self.structure, self.inline = structure, inline
        self.inlined: list[nn.Module] = []
        self.opaque: dict[str, str] = {}
        self.thread, self.context = threading.get_ident(), _context()

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _context() != self.context:
            raise Untraceable("it sets a mode of PyTorch around some of its operations")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict | list) and not type(a).__module__.startswith(("builtins", "torch.fx.")):
            raise Untraceable(f"it makes a {type(a).__name__}, of which a graph makes a plain {_plain(a)}")
        return a.node if type(a) is _Proxy else super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Placeholders for the tensors among the arguments; what has a default keeps it."""
        if self.structure is None:
            code = root_fn.__code__
            optional = len(root_fn.__kwdefaults__ or ())
            if code.co_kwonlyargcount > optional or code.co_flags & 0x0C:  # *args, **kwargs
                raise Untraceable("its forward takes a variable number of arguments")
            required = code.co_argcount - 1 - len(root_fn.__defaults__ or ())
            self.structure = (TENSOR,) * required, {}
        leaves, spec = pytree.tree_flatten(self.structure)
        leaves = [
            self.create_proxy("placeholder", f"arg{i}", (), {}) if leaf is TENSOR else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        root = self.root

        def call(*args: Any) -> Any:
            return root_fn(root, *args, **kwargs)

        return call, args

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val  # somebody runs a model while we trace another
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            # torch.func.functional_call puts plain tensors in the place of parameters.
            for name, held in self.root.named_parameters():
                if held is attr_val:
                    return self.create_proxy("get_attr", name, (), {})
        # Without the cache: nodes of a submodule that turned out opaque are erased.
        return super().getattr(attr, attr_val, {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_batch_norm(m) or is_convolution(m) or m.__module__.startswith("fused_preact."):
            return m.__module__ not in _PLAIN_INSIDE or bool(getattr(m, "fused", False))
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if self.inline is not None and not self.inline(m):
            return self._opaque(m, path, args, kwargs, None)
        if has_hooks(m):
            return self._opaque(m, path, args, kwargs, "has hooks")
        if _is_replaced(m):
            return self._opaque(m, path, args, kwargs, _REPLACED)
        last = next(iter(reversed(self.graph.nodes)), None)
        stack, calls, inlined = dict(self.module_stack), dict(self.num_calls), len(self.inlined)
        state = _State(m)
        error: str | None = None
        value: Any = None
        try:
            self.inlined.append(m)
            value = super().call_module(m, forward, args, kwargs)
        except Exception as failure:
            error = _reason(failure)
        error = state.restore() or error
        if error is None:
            return value
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        self.module_stack.clear()
        self.module_stack.update(stack)
        self.num_calls.clear()
        self.num_calls.update(calls)
        del self.inlined[inlined:]
        return self._opaque(m, path, args, kwargs, error)

    def _opaque(self, m: nn.Module, path: str, args: Any, kwargs: Any, reason: str | None) -> Any:
        if reason is not None:
            self.opaque[path] = reason
        return self.create_proxy("call_module", path, args, kwargs)
