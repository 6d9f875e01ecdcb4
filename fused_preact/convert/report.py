"""``explain``: what became of each site of a model, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..calls import has_hooks, is_batch_norm, is_convolution, observed, runs_batch_norm, runs_convolution
from ..modules import PreActConv2d, PreActSequential, _PreActUnit, is_identity_projection
from .analysis import Analysis, Part, analyse
from .match import Chain, Head
from .roles import _ADD, Add, Convolve, Normalise, Pad, Pool, Relu, Same

__all__ = ["Explanation", "Row", "explain"]

AS_WRITTEN = "as written"


@dataclass(frozen=True)
class Row:
    """One site, head or left addition.

    ``kind``: "site" (BN, ReLU or nothing, 2-d convolution), "convolution" (behind another norm or activation),
    "addition", "head", or "norm" in code that cannot be traced. ``site``: the paths of what it is made of, or the
    names of the parameters that functions are called with, ``?`` where there is none. ``where``: the path of the
    module whose forward holds it, empty for the model's own. ``path``: "unit", "chain", "site" or "head", the same
    with "own" in front for modules of this package, or "as written"; ``call`` is one number for all rows of one fused
    call. ``fused``: whether that is so now, not only once ``fuse`` has run. ``reason``: why not.
    """

    kind: str
    site: str
    where: str
    path: str
    fused: bool
    reason: str
    call: int | None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: ``str()`` of it is a table, ``rows`` its rows, ``to_dict()`` is for JSON."""

    model: str
    mode: str
    """"training", "evaluation", or "mixed" where modules differ."""
    rows: tuple[Row, ...]
    additions: int
    """Residual additions, those in a fused call too."""

    @property
    def fused(self) -> bool:
        """Whether all that can run fused does so now."""
        found = [row for row in self.rows if row.path != AS_WRITTEN]
        return bool(found) and all(row.fused for row in found)

    @property
    def summary(self) -> str:
        """One sentence."""
        sites = [row for row in self.rows if row.kind == "site"]
        found = [row for row in sites if row.path != AS_WRITTEN]
        now = sum(row.fused for row in found)
        if not sites:
            text = "no BN -> ReLU -> convolution site"
        elif not found:
            text = f"0 of {len(sites)} sites fused"
        elif now == len(found):
            text = f"{now} of {len(sites)} sites fused{self._calls(found)}"
        elif not now:
            text = f"{len(found)} of {len(sites)} sites would be fused by fuse(model){self._calls(found)}"
        else:
            fused = [row for row in found if row.fused]
            text = f"{now} of {len(sites)} sites fused{self._calls(fused)}"
            text += f", {len(found) - now} more would be by fuse(model)"
        left = [row for row in self.rows if row.kind == "addition" and row.path == AS_WRITTEN]
        heads = [row for row in self.rows if row.kind == "head"]
        for count, total, noun in (
            (self.additions - len(left), self.additions, "addition"),
            (sum(row.path != AS_WRITTEN for row in heads), len(heads), "head"),
        ):
            if total:
                text += f"; {count} of {_count(total, noun)}"
        others = sum(row.kind == "convolution" for row in self.rows)
        if others:
            text += f"; {_count(others, 'other convolution')} as written"
        return text

    @staticmethod
    def _calls(rows: list[Row]) -> str:
        calls: dict[str, set[int | None]] = {}
        for row in rows:
            calls.setdefault(row.path.removeprefix("own "), set()).add(row.call)
        parts = [
            _count(len(calls[kind]), noun)
            for kind, noun in (("unit", "unit"), ("chain", "chain"), ("site", "single call"))
            if kind in calls
        ]
        return f" in {_listed(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists, strings, numbers and None."""
        return {
            "model": self.model,
            "mode": self.mode,
            "fused": self.fused,
            "summary": self.summary,
            "additions": self.additions,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.model} in {self.mode} mode: {self.summary}".replace("mixed mode", "more than one mode")
        ]
        if not self.rows:
            return lines[0]
        mixed = len({row.fused for row in self.rows if row.path != AS_WRITTEN}) > 1
        table = [("where", "site", "path", "reason")]
        for row in self.rows:
            path = f"{row.path} (not yet)" if mixed and not row.fused and row.path != AS_WRITTEN else row.path
            table.append((row.where or "(model)", _relative(row.site, row.where), path, row.reason))
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        table.insert(1, tuple("-" * n for n in (*widths, max(len(line[3]) for line in table))))  # type: ignore[arg-type]
        for line in table:
            cells = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)]
            lines.append("  ".join([*cells, line[3]]).rstrip())
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """What becomes of each BN -> ReLU -> convolution site of ``model``, in the mode that it is in: a table.

    Before :func:`fuse` it says what would run fused, after it what does; where nothing does, why not. Listed are the
    sites, every other convolution behind a norm or an activation, heads, and the residual additions that no fused
    call makes. Of modules that cannot be traced the convolutions are listed, with ``?`` for what they read.

    ``model`` is not changed and not run. Raises TypeError where it is no module, or a scripted one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: got a scripted module, allowed is the torch.nn.Module that it was made of")
    writer = _Writer(model, analyse(model))
    writer.write()
    flags = {m.training for m in model.modules()}
    mode = "mixed" if len(flags) > 1 else "training" if True in flags else "evaluation"
    return Explanation(type(model).__name__, mode, tuple(writer.rows), writer.additions)


def _relative(site: str, where: str) -> str:
    """``site`` with a point in the place of the path of the module that holds it."""
    if not where:
        return site
    return " ".join(
        "." + word[len(where) + 1 :] if word.startswith(f"{where}.") else word for word in site.split(" ")
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# --- rows -----------------------------------------------------------------------------------------------------


class _Writer:
    """Collects the rows in the order in which the model runs, as far as that is known."""

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.model = model
        self.places = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        self.rows: list[Row] = []
        self.additions = 0
        self.calls = 0
        self.opaque = analysis.opaque
        self.watched = observed(torch.empty(0))
        self.sources: dict[str, list[Callable[[], None]]] = {}
        # What comes after all else of a module.
        self.tails: dict[str, Callable[[], None]] = {}
        for path, module in model.named_modules():
            if isinstance(module, PreActConv2d | _PreActUnit) and module.fused:
                self._add(path, lambda path=path, module=module: self._own(path, module))  # type: ignore[misc]
            elif _is_network(module) and module.fused and not _is_fused(module):
                self.tails[path] = lambda path=path, module=module: self._own_head(path, module)  # type: ignore[misc]
        for path, reason in analysis.opaque.items():
            self._add(path, lambda path=path, reason=reason: self._hidden(path, reason))  # type: ignore[misc]
        if not analysis.parts and not analysis.opaque:
            for path, module in model.named_modules():
                if (
                    _is_any_convolution(module)
                    and not isinstance(module, nn.Conv2d)
                    and module.in_channels > 4
                ):
                    self._add(path, lambda path=path, module=module: self._foreign(path, module))  # type: ignore[misc]
        for part in analysis.parts:
            self._add(part.path, lambda part=part: self._part(part))  # type: ignore[misc]

    def _add(self, path: str, emit: Callable[[], None]) -> None:
        self.sources.setdefault(path, []).append(emit)

    def write(self) -> None:
        while left := {*self.sources, *self.tails}:
            self._emit(min(left, key=self._place))

    def _place(self, path: str) -> int:
        return self.places[path]

    def _emit(self, path: str) -> None:
        """The rows of the module at ``path``, and of what is in it."""
        for emit in self.sources.pop(path, []):
            emit()
        inside = [p for p in self.sources if p.startswith(f"{path}.")] if path else []
        for p in sorted(inside, key=self._place):
            if p in self.sources:
                self._emit(p)
        if path in self.tails:
            self.tails.pop(path)()

    def _row(
        self, kind: str, site: str, where: str, path: str, fused: bool, reason: str, call: int | None
    ) -> None:
        self.rows.append(Row(kind, site, where, path, fused, reason, call))

    def _next(self) -> int:
        self.calls += 1
        return self.calls

    # --- modules of this package ------------------------------------------------------------------------------

    def _own(self, path: str, module: Any) -> None:
        unit = isinstance(module, _PreActUnit)
        pairs = list(module._names) if unit else [("bn", "conv")]
        names = [name for pair in pairs for name in pair]
        if unit and module.shortcut is not None:
            pairs.insert(1, (pairs[0][0], "shortcut"))
            names.append("shortcut")
        reasons = [self._own_reason(_join(path, name), getattr(module, name)) for name in names]
        reason = next(filter(None, reasons), self._observed())
        taken = AS_WRITTEN if reason else "own unit" if unit else "own site"
        call = None if reason else self._next()
        for bn, conv in pairs:
            self._row(
                "site", f"{_join(path, bn)} -> {_join(path, conv)}", path, taken, not reason, reason, call
            )
        if unit:
            self.additions += 1
            if reason:
                site = f"{_join(path, names[-1] if module.shortcut is None else pairs[-1][1])} + "
                site += "its input" if module.shortcut is None else _join(path, "shortcut")
                self._row("addition", site, path, taken, False, reason, None)

    def _own_reason(self, path: str, module: Any) -> str:
        if runs_batch_norm(module) or runs_convolution(module):
            return ""
        if is_identity_projection(module) and not has_hooks(module):
            return ""
        return _other(module, path)

    def _own_head(self, path: str, module: Any) -> None:
        bn = _join(path, "bn")
        reason = "" if runs_batch_norm(module.bn) else _other(module.bn, bn)
        reason = reason or self._observed()
        taken = AS_WRITTEN if reason else "own head"
        self._row("head", f"{bn} -> mean", path, taken, not reason, reason, None if reason else self._next())

    def _observed(self) -> str:
        return "hooks on the calls of all modules, or a tracer" if self.watched else ""

    # --- what could not be looked into -------------------------------------------------------------------------

    def _hidden(self, path: str, reason: str) -> None:
        """What the code of the module at ``path`` calls itself: nobody knows in which order."""
        module = self.model.get_submodule(path)
        held = list(_held(module, path))
        convolutions = [name for name, child in held if _is_any_convolution(child)]
        norms = [name for name, child in held if _is_any_norm(child)]
        if not norms and isinstance(module, nn.Conv2d):
            return  # (a convolution of somebody's own; whoever reads its graph says so)
        # What reads an image reads no activation.
        small = {name for name, child in held if getattr(child, "in_channels", 9) <= 4}
        for name in convolutions:
            if name not in small:
                self._row("site", f"? -> {name}", path, AS_WRITTEN, False, reason, None)
        if not convolutions:
            for name in norms:
                self._row("norm", f"{name} -> ?", path, AS_WRITTEN, False, reason, None)

    def _foreign(self, path: str, module: nn.Module) -> None:
        """A convolution of a model without two-dimensional ones, which is not looked into."""
        self._row(
            "convolution",
            f"? -> {path}",
            path.rpartition(".")[0],
            AS_WRITTEN,
            False,
            _other(module, path),
            None,
        )

    # --- what was traced ---------------------------------------------------------------------------------------

    def _part(self, part: Part) -> None:
        reader = _Reader(self, part)
        for node in part.traced.graph.nodes:
            if node.op == "call_module":
                self._emit(part.full(str(node.target)))
            reader.rows(node)


def _is_network(module: Any) -> bool:
    """Whether it is a network of fused_preact.models, which makes its head itself."""
    return (
        type(module).__module__.startswith("fused_preact.models.")
        and isinstance(getattr(module, "stages", None), PreActSequential)
        and isinstance(getattr(module, "bn", None), nn.Module)
    )


def _is_fused(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return bool(getattr(forward, "is_fused", False)) and forward.owner is module  # type: ignore[union-attr]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _held(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers among the children of ``module``, also by way of a list of modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and type(child).forward is nn.Module.forward:
            yield from _held(child, _join(path, name))
        else:
            yield _join(path, name), child


def _is_any_convolution(module: Any) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_any_norm(module: Any) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or (
        type(module).__module__ == "torch.nn.modules.normalization"
    )


def _is_any_activation(module: Any) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, nn.MultiheadAttention
    )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def _other(module: Any, path: str) -> str:
    """What keeps the module at ``path``, a norm, an activation or a convolution, from being the plain one."""
    name = type(module).__name__
    if has_hooks(module):
        return f"hooks on {path}"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return f"the forward of {path} was replaced"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return f"{path} is compiled by itself"
    if _is_any_convolution(module):
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
    if _is_any_norm(module):
        if isinstance(module, nn.BatchNorm2d):
            return f"{path} is {_a(name)} with a forward of its own"
        return f"{path} is {_a(name)}, not a BatchNorm2d"
    return f"{path} is {_a(name)}, not a ReLU"


# --- reading a graph ------------------------------------------------------------------------------------------

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


class _Reader:
    """Rows of one traced part."""

    def __init__(self, writer: _Writer, part: Part) -> None:
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
            self._found("site", f"{self.name(site.norm.node)} -> {self.name(node)}", path, chain)
        elif node in self.heads:
            head = self.heads[node]
            if not self._is_own_head(node):
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
            if _is_fused(module):
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
        if self._is_own_head(node):
            return
        role = self.values.roles[node]
        readers = [r for r in self._readers(behind.act) if r is not node]
        if isinstance(role, Pool) and role.window is not None and any(map(self._is_convolution, readers)):
            return  # subsamples, and the head is elsewhere
        reason = behind.reason or self._needed(node, behind) or self.left.get(node) or _UNKNOWN
        site = f"{self.name(behind.norm)} -> {self.name(node)}"
        self.writer._row("head", site, self.where(node), AS_WRITTEN, False, reason, None)

    def _is_own_head(self, node: Node) -> bool:
        """Whether a network of this package makes it itself, past the graph."""
        module = self._module(self.where(node))
        return _is_network(module) and module.fused and not _is_fused(module)

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
            return "" if runs_convolution(module) else _other(module, path)
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
                reason or self._norm_reason(value) or _NO_RELU,
                self._is_plain_norm(value),
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
        if behind.act is None:
            return ""
        others = [r for r in self._readers(behind.act) if r is not node and r not in self.sites]
        strange = [r for r in others if not self._is_convolution(r) or self._convolution_reason(r)]
        for reader in [r for r in strange if not isinstance(self.values.roles[r], Add)] or strange:
            return f"the activation is needed by {self.called(reader)} too"
        return ""

    # --- what a node is ---------------------------------------------------------------------------------------

    def _leaf(self, node: Node) -> Any:
        return self.part.traced.module(str(node.target)) if node.op == "call_module" else None

    def _is_convolution(self, node: Node) -> bool:
        if node.op == "call_module":
            return _is_any_convolution(self._leaf(node))
        return node.op == "call_function" and _target(node) in _CONVOLUTIONS

    def _is_plain_convolution(self, node: Node) -> bool:
        return is_convolution(self._leaf(node)) if node.op == "call_module" else _target(node) == "conv2d"

    def _is_norm(self, node: Node) -> bool:
        if node.op == "call_module":
            return _is_any_norm(self._leaf(node))
        return node.op == "call_function" and _target(node) in _NORMS

    def _is_plain_norm(self, node: Node) -> bool:
        return is_batch_norm(self._leaf(node)) if node.op == "call_module" else _target(node) == "batch_norm"

    def _norm_reason(self, node: Node) -> str:
        if isinstance(self.values.roles[node], Normalise):
            return ""
        if node.op == "call_module":
            return _other(self._leaf(node), self.name(node))
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
            return _other(self._leaf(node), self.part.full(str(node.target)))
        return f"the activation is {_target(node)}, not a ReLU"

    def _only_activates(self, node: Node) -> bool:
        """Whether a module that was not looked into may be a norm or an activation: it holds no convolution."""
        module = self._leaf(node)
        return not any(_is_any_convolution(m) or isinstance(m, nn.Linear) for m in module.modules())

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
            fits = _is_any_convolution if function in _CONVOLUTIONS else _is_any_norm
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


_NO_RELU = "no ReLU between the norm and it"
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
