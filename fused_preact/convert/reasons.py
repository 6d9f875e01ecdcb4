"""What became of the nodes of a traced graph, and why: the rows of :mod:`report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from ..calls import has_hooks, is_batch_norm, is_convolution, runs_convolution
from .analysis import Part
from .match import Chain, Head
from .roles import _ADD, Add, Convolve, Normalise, Pad, Pool, Relu, Same

__all__ = ["AS_WRITTEN", "Reader", "is_any_convolution", "is_any_norm", "is_fused", "other"]

AS_WRITTEN = "as written"


def is_fused(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return bool(getattr(forward, "is_fused", False)) and forward.owner is module  # type: ignore[union-attr]


def is_any_convolution(module: Any) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def is_any_norm(module: Any) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or (
        type(module).__module__ == "torch.nn.modules.normalization"
    )


def _is_any_activation(module: Any) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, nn.MultiheadAttention
    )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def other(module: Any, path: str) -> str:
    """What keeps the module at ``path``, a norm, an activation or a convolution, from being the plain one."""
    name = type(module).__name__
    if has_hooks(module):
        return f"hooks on {path}"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return f"the forward of {path} was replaced"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return f"{path} is compiled by itself"
    if is_any_convolution(module):
        if not isinstance(module, nn.Conv2d):
            return f"{path} is {_a(name)}, not a Conv2d"
        if module.padding_mode != "zeros":
            return f"{path} has padding_mode={module.padding_mode!r}"
        if (
            type(module).forward is not nn.Conv2d.forward
            or type(module)._conv_forward is not nn.Conv2d._conv_forward
        ):
            return f"{path} is {_a(name)} with a forward of its own"
        return f"{path} pads one side more than the other"
    if is_any_norm(module):
        if isinstance(module, nn.BatchNorm2d):
            return f"{path} is {_a(name)} with a forward of its own"
        return f"{path} is {_a(name)}, not a BatchNorm2d"
    return f"{path} is {_a(name)}, not a ReLU"


_ACTIVATIONS = {
    *(
        "celu",
        "elu",
        "gelu",
        "glu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "logsigmoid",
        "mish",
    ),
    *(
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "softsign",
        "tanh",
        "threshold",
    ),
    *("clamp", "clamp_min"),
}
_NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm"}
_CONVOLUTIONS = {
    *(
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
    ),
}
_BETWEEN = {
    *(
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "avg_pool2d",
        "max_pool2d",
        "dropout",
        "dropout2d",
        "pad",
    ),
    *("interpolate", "upsample", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach"),
}
_BETWEEN_MODULES = tuple(
    f"torch.nn.modules.{name}" for name in ("dropout", "padding", "pooling", "upsampling")
)


class Reader:
    """Rows of one traced part."""

    def __init__(self, writer: Any, part: Part) -> None:
        self.writer, self.part, self.values = writer, part, part.found.values
        self.left = {left.node: left.reason for left in part.found.left}
        self.sites: dict[Node, tuple[Any, Chain]] = {}
        for chain in part.found.chains:
            for site in chain.sites + ([chain.projection] if chain.projection else []):
                self.sites[site.conv.node] = site, chain
        self.heads = {head.pool.node: head for head in part.found.heads}
        self.sums = {chain.add.node for chain in part.found.chains if chain.add is not None}
        self.numbers: dict[int, int] = {}
        self.given = _given(part)

    def rows(self, node: Node) -> None:
        """The rows that ``node`` is the end of."""
        if node in self.sites:
            site, chain = self.sites[node]
            whole = chain.shortcut in ("identity", "activation", "projection")
            path = "unit" if whole else "chain" if len(chain.sites) > 1 else "site"
            kind = "pool" if site.conv.subsamples else "site"
            self._found(kind, f"{self.name(site.norm.node)} -> {self.name(node)}", path, chain)
        elif node in self.heads:
            head = self.heads[node]
            self._found("head", f"{self.name(head.norm.node)} -> {self.name(node)}", "head", head)
        elif node in self.sums:
            self.writer.additions += 1
        elif self._is_convolution(node):
            self._convolution(node)
        elif isinstance(self.values.roles[node], Pool):
            self._pool(node)
        elif node.op != "call_module" and node.target in _ADD:
            self._addition(node)

    def _found(self, kind: str, site: str, path: str, match: Chain | Head) -> None:
        row = self.part.owner(match)
        where = self.part.full(row[-1] if row else "")
        now = self._installed(match, row)
        reason = ""
        if not now and getattr(self._module(where), "fused", None) is False:
            reason = "fused=False"
        if self.writer.watched:
            now, reason, path = False, self.writer._observed(), AS_WRITTEN
        call = self.numbers.get(id(match)) or self.writer._next()
        self.numbers[id(match)] = call
        self.writer._row(kind, site, where, path, now, reason, None if path == AS_WRITTEN else call)

    def _installed(self, match: Chain | Head, row: tuple[str, ...]) -> bool:
        """Whether a module whose code the match is in has its forward from ``fuse``, and may look as deep."""
        callers = {self.part.full(path) for path in self.part.callers(match)}
        for path in ["", *row]:
            full = self.part.full(path)
            module = self._module(full)
            callers.discard(full)
            if is_fused(module):
                inline = set(map(id, module.__dict__["forward"].inline))
                if all(id(self._module(p)) in inline for p in callers):
                    return True
        return False

    # --- what was left ----------------------------------------------------------------------------------------

    def _convolution(self, node: Node) -> None:
        behind = self._behind(node)
        if behind is None:
            return
        own = self._convolution_reason(node)
        reason = own or behind.reason or self._needed(node, behind) or self.left.get(node) or _UNKNOWN
        plain = self._is_plain_convolution(node) and behind.plain
        names = [self.name(n) for n in (behind.norm, node) if n is not None]
        if behind.norm is None:
            names.insert(0, "?" if behind.act is None else self.name(behind.act))
        self.writer._row(
            "site" if plain else "convolution",
            " -> ".join(names),
            self.where(node),
            AS_WRITTEN,
            False,
            reason,
            None,
        )

    def _pool(self, node: Node) -> None:
        behind = self._behind(node)
        if behind is None or behind.norm is None or behind.act is None or behind.between:
            return
        role = self.values.roles[node]
        readers = [r for r in self._readers(behind.act) if r is not node]
        if isinstance(role, Pool) and role.window is not None and any(map(self._is_convolution, readers)):
            return  # subsamples, and the head is elsewhere
        reason = behind.reason or self._needed(node, behind) or self.left.get(node) or _UNKNOWN
        site = f"{self.name(behind.norm)} -> {self.name(node)}"
        self.writer._row("head", site, self.where(node), AS_WRITTEN, False, reason, None)

    def _addition(self, node: Node) -> None:
        operands = [self.values.value(node, operand) for operand in node.all_input_nodes]
        if not operands or not all(operand in self.given for operand in operands):
            return  # something is added to a constant or a parameter
        if len(operands) == 1:
            if sum(arg is node.all_input_nodes[0] for arg in node.args) < 2:
                return  # ... or a number to a tensor
            operands *= 2
        sources = [self._through(operand)[0] for operand in operands]
        if not any(self._is_convolution(source) or self._from_convolution(source) for source in sources):
            return
        self.writer.additions += 1
        site = " + ".join(map(self.name, sources))
        reason = self._addition_reason(node, operands, sources)
        self.writer._row("addition", site, self.where(node), AS_WRITTEN, False, reason, None)

    def _addition_reason(self, node: Node, operands: list[Node], sources: list[Node]) -> str:
        if not isinstance(self.values.roles[node], Add):
            return "it scales an operand"
        if sources[0] is sources[1]:
            return "both operands are one tensor"
        fused = [source for source in sources if source in self.sites]
        if not fused:
            return f"no operand comes straight from a fused convolution: {' and '.join(map(self.called, sources))}"
        for source in fused:
            for reader in self._readers(source):
                if reader is not node:
                    return f"{self.name(source)} is needed by {self.called(reader)} too"
        written = self.values.writes[node]
        if written is not None and not self.values.private(node, written):
            return "it writes to a tensor that others can see"
        return "an operand is written to in between"

    def _from_convolution(self, node: Node) -> bool:
        """Whether a convolution's output reaches ``node`` by way of one other operation or two."""
        near = [node]
        for _ in range(3):
            near = [operand for n in near for operand in n.all_input_nodes]
            if any(map(self._is_convolution, near)):
                return True
        return False

    def _convolution_reason(self, node: Node) -> str:
        if node.op == "call_module":
            module = self.part.traced.module(str(node.target))
            path = self.part.full(str(node.target))
            return "" if runs_convolution(module) else other(module, path)
        name = _target(node)
        if name != "conv2d":
            return f"{name}, not conv2d"
        return "" if isinstance(self.values.roles[node], Convolve) else "its arguments are no constants"

    def _behind(self, node: Node) -> _Behind | None:
        """The norm and the activation that ``node`` stands behind; None where it reads neither."""
        first = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(first, Node):
            return None
        value, between = self._through(self.values.value(node, first))
        reason = self._between_reason(between, "it")
        if self._is_norm(value):
            return _Behind(
                value,
                None,
                between,
                reason or self._norm_reason(value),
                self._is_plain_norm(value) and not between,
            )
        if not self._is_activation(value):
            hidden = (
                self.writer.opaque.get(self.part.full(str(value.target)))
                if value.op == "call_module"
                else None
            )
            if hidden is None or not self._only_activates(value):
                return None
            return _Behind(None, None, between, f"reads {self.name(value)}: {hidden}", False)
        act = value
        relu = self._is_plain_relu(act)
        reason = reason or self._activation_reason(act)
        before = act.args[0] if act.args else act.kwargs.get("input")
        if not isinstance(before, Node):
            return _Behind(None, act, between, reason or "no norm before the activation", False)
        norm, more = self._through(self.values.value(act, before))
        reason = reason or self._between_reason(more, "its activation")
        if not self._is_norm(norm):
            hidden = (
                self.writer.opaque.get(self.part.full(str(norm.target))) if norm.op == "call_module" else None
            )
            what = f"{self.name(norm)}: {hidden}" if hidden else self.called(norm)
            return _Behind(
                None, act, [*between, *more], reason or f"its activation reads no norm but {what}", False
            )
        reason = reason or self._norm_reason(norm)
        plain = relu and self._is_plain_norm(norm)
        return _Behind(norm, act, [*between, *more], reason, plain and not between and not more)

    def _needed(self, node: Node, behind: _Behind) -> str:
        """Who else needs what ``node`` reads."""
        if behind.norm is not None and behind.act is not None:
            for reader in self._readers(behind.norm):
                if reader is not behind.act:
                    return f"the normalised tensor is needed by {self.called(reader)} too"
        active = behind.norm if behind.act is None else behind.act
        if active is None:
            return ""
        noun = "normalised tensor" if behind.act is None else "activation"
        others = [r for r in self._readers(active) if r is not node and r not in self.sites]
        strange = [r for r in others if not self._is_convolution(r) or self._convolution_reason(r)]
        for reader in [r for r in strange if not isinstance(self.values.roles[r], Add)] or strange:
            return f"the {noun} is needed by {self.called(reader)} too"
        return ""

    # --- what a node is ---------------------------------------------------------------------------------------

    def _leaf(self, node: Node) -> Any:
        return self.part.traced.module(str(node.target)) if node.op == "call_module" else None

    def _is_convolution(self, node: Node) -> bool:
        if node.op == "call_module":
            return is_any_convolution(self._leaf(node))
        return node.op == "call_function" and _target(node) in _CONVOLUTIONS

    def _is_plain_convolution(self, node: Node) -> bool:
        return is_convolution(self._leaf(node)) if node.op == "call_module" else _target(node) == "conv2d"

    def _is_norm(self, node: Node) -> bool:
        if node.op == "call_module":
            return is_any_norm(self._leaf(node))
        return node.op == "call_function" and _target(node) in _NORMS

    def _is_plain_norm(self, node: Node) -> bool:
        return is_batch_norm(self._leaf(node)) if node.op == "call_module" else _target(node) == "batch_norm"

    def _norm_reason(self, node: Node) -> str:
        if isinstance(self.values.roles[node], Normalise):
            return ""
        if node.op == "call_module":
            return other(self._leaf(node), self.name(node))
        name = _target(node)
        return "the norm's arguments are no constants" if name == "batch_norm" else f"{name}, not batch_norm"

    def _is_activation(self, node: Node) -> bool:
        if node.op == "call_module":
            return _is_any_activation(self._leaf(node)) or isinstance(self.values.roles[node], Relu)
        return node.op in ("call_function", "call_method") and _target(node) in _ACTIVATIONS

    def _is_plain_relu(self, node: Node) -> bool:
        return isinstance(self.values.roles[node], Relu) or isinstance(self._leaf(node), nn.ReLU)

    def _activation_reason(self, node: Node) -> str:
        if isinstance(self.values.roles[node], Relu):
            return ""
        if node.op == "call_module":
            return other(self._leaf(node), self.part.full(str(node.target)))
        return f"the activation is {_target(node)}, not a ReLU"

    def _only_activates(self, node: Node) -> bool:
        """Whether a module that was not looked into may be a norm or an activation: it holds no convolution."""
        module = self._leaf(node)
        return not any(is_any_convolution(m) or isinstance(m, nn.Linear) for m in module.modules())

    def _through(self, node: Node) -> tuple[Node, list[Node]]:
        """``node`` without what passes it on, and what stands between that a fused call cannot make."""
        between: list[Node] = []
        while True:
            role = self.values.roles.get(node)
            first = node.args[0] if node.args else node.kwargs.get("input")
            if not isinstance(first, Node):
                return node, between
            if not isinstance(role, Same | Pad):
                module = self._leaf(node)
                name = _target(node)
                passes = type(module).__module__ in _BETWEEN_MODULES or isinstance(module, nn.Identity)
                if not (passes if module is not None else name in _BETWEEN):
                    return node, between
                if isinstance(role, Pool) and not (role.window is not None and self._is_map(node)):
                    return node, between  # global: what follows is a classifier
                between.append(node)
            node = self.values.value(node, first)

    def _is_map(self, node: Node) -> bool:
        """Whether what is pooled over a window stays a map: a convolution reads it."""
        return any(map(self._is_convolution, self._readers(node)))

    def _between_reason(self, between: list[Node], reader: str) -> str:
        if not between:
            return ""
        node = between[-1]
        module = self._leaf(node)
        if module is not None and has_hooks(module):
            return f"hooks on {self.name(node)}"
        return f"{self.called(node)} stands in front of {reader}"

    def _readers(self, node: Node) -> Iterator[Node]:
        for reader in self.values.readers[node]:
            if isinstance(self.values.roles[reader], Same | Pad):
                yield from self._readers(reader)
            else:
                yield reader

    # --- names ------------------------------------------------------------------------------------------------

    def _module(self, path: str) -> Any:
        return self.writer.model.get_submodule(path)

    def where(self, node: Node) -> str:
        """The module whose forward calls ``node``."""
        rows = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        if node.op == "call_module":
            rows = rows[:-1]
        return self.part.full(rows[-1] if rows else "")

    def called(self, node: Node) -> str:
        """``node`` in a sentence."""
        if node.op == "call_module":
            return f"{type(self._leaf(node)).__name__} {self.name(node)}"
        function = _target(node)
        if function in _NORMS or function in _CONVOLUTIONS:
            return f"{function} of {self.name(node)}"
        return {"output": "the output", "placeholder": "the input"}.get(node.op) or function

    def name(self, node: Node) -> str:
        """The path of a module, or of the module or parameter that a function is called with, or ?."""
        if node.op == "call_module":
            return self.part.full(str(node.target))
        if node.op == "placeholder":
            return "input"
        function = _target(node)
        if function in _NORMS or function in _CONVOLUTIONS:
            tensors = [*node.args[1:], *node.kwargs.values()]
            if function in _NORMS:
                # The weight before the statistics, however they come.
                tensors.sort(key=lambda t: isinstance(t, Node) and "running" in str(t.target))
            for tensor in tensors:
                parameter = self._parameter(tensor)
                if parameter is not None:
                    return parameter
            inner = self.where(node)
            fits = is_any_convolution if function in _CONVOLUTIONS else is_any_norm
            return inner if fits(self._module(inner)) else "?"
        return function

    def _parameter(self, tensor: Any) -> str | None:
        while (
            isinstance(tensor, Node)
            and tensor.op == "call_method"
            and tensor.target in ("to", "type", "contiguous")
        ):
            tensor = tensor.args[0]
        if not isinstance(tensor, Node) or tensor.op != "get_attr":
            return None
        path = self.part.full(str(tensor.target))
        owner, _, name = path.rpartition(".")
        return owner if owner and name in ("weight", "bias", "running_mean", "running_var") else path


@dataclass(frozen=True)
class _Behind:
    norm: Node | None
    act: Node | None
    between: list[Node]
    reason: str
    plain: bool
    """Whether it is BN -> ReLU or nothing, hooks and arguments apart."""


_UNKNOWN = "an activation in its chain is a shortcut too, and no fused call makes the addition"


def _target(node: Node) -> str:
    """The name of a function or method, in place or not."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name if name.endswith("__") else name.rstrip("_")


_SIZES = {"size", "dim", "numel", "stride", "shape", "ndim", "dtype", "device"}


def _given(part: Part) -> set[Node]:
    """The nodes that are tensors and depend on what the module is called with."""
    found: set[Node] = set()
    for node in part.traced.graph.nodes:
        attribute = node.args[1] if node.target is getattr and len(node.args) > 1 else node.target
        if node.op == "placeholder" or (
            attribute not in _SIZES and any(operand in found for operand in node.all_input_nodes)
        ):
            found.add(node)
    return found
