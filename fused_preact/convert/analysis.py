"""Where the matches of a model are: which module's forward has to be rewritten for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from ..calls import has_hooks
from ..modules import PreActSequential
from .match import Chain, Found, Head, match
from .roles import Same
from .tracing import Traced, Untraceable, trace

__all__ = ["Analysis", "Part", "analyse", "is_network", "modes", "put", "runs_fused"]


def is_network(module: Any) -> bool:
    """Whether it is a network of fused_preact.models, which makes its head itself."""
    written = getattr(type(module).forward, "__module__", None) or ""  # (None: made by exec, as FX does)
    return (
        written.startswith("fused_preact.models.")
        and isinstance(getattr(module, "stages", None), PreActSequential)
        and isinstance(getattr(module, "bn", None), nn.Module)
    )


def runs_fused(module: Any) -> bool:
    """Whether it is a network that runs fused by itself: there is nothing to rewrite but what may hang below it."""
    return is_network(module) and bool(module.fused) and "forward" not in module.__dict__


@dataclass(eq=False)
class Part:
    """A traced module of the model and what was found in it."""

    path: str
    traced: Traced
    found: Found

    def owner(self, match: Chain | Head) -> tuple[str, ...]:
        """The path of the smallest module whose code holds the whole match, as a row of modules from here to it."""
        rows = [_callers(node) for node in match.nodes()]
        common = rows[0]
        for row in rows[1:]:
            same = 0
            while same < min(len(common), len(row)) and common[same] == row[same]:
                same += 1
            common = common[:same]
        return common

    def callers(self, match: Chain | Head) -> set[str]:
        """The paths of all modules whose code the match is in."""
        return {path for node in match.nodes() for path in _callers(node)}

    def passing(self) -> set[str]:
        """The paths of the modules that only pass on what they are given, such as an empty ``Sequential``."""
        paths = {module: path for path, module in self.traced.root.named_modules() if path}
        roles = self.found.values.roles.items()
        active = {path for node, role in roles if not isinstance(role, Same) for path in _callers(node)}
        return {paths[m] for m in self.traced.inlined if m in paths} - active

    def full(self, path: str) -> str:
        """A path of this part's as one of the model's."""
        return ".".join(p for p in (self.path, path) if p)


def _callers(node: Node) -> tuple[str, ...]:
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return tuple(stack[:-1] if node.op == "call_module" else stack)


@dataclass(eq=False)
class Analysis:
    """All parts of a model, and what could not be looked into, with the reason."""

    parts: list[Part] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)

    def owners(self) -> dict[str, set[str]]:
        """By the path of each module to rewrite: the paths of the modules whose code its matches are in."""
        found: dict[str, set[str]] = {}
        for part in self.parts:
            passing = part.passing()
            rows: dict[tuple[str, ...], list[Chain | Head]] = {}
            for m in part.found.matches:
                rows.setdefault(part.owner(m), []).append(m)
            while rows:
                row = max(rows, key=len)
                matches = rows.pop(row)
                owner = row[-1] if row else ""
                inline = {path for m in matches for path in part.callers(m)}
                inline |= {path for path in passing if not owner or path.startswith(f"{owner}.")}
                if row and not _suffices(part.traced, owner, inline, matches):
                    rows.setdefault(row[:-1], []).extend(matches)
                else:
                    found.setdefault(part.full(owner), set()).update(map(part.full, inline))
        return found


def _suffices(whole: Traced, owner: str, inline: set[str], matches: list[Chain | Head]) -> bool:
    """Whether the owner's own trace shows the matches: what it returns may look needed there, and not be."""
    inner = {id(whole.module(path)) for path in inline}
    module = whole.module(owner)
    try:
        traced = trace(module, None, lambda m: id(m) in inner)
    except Untraceable:
        return True  # not with these arguments
    found = match(traced.graph, traced.module)
    return _size(found.matches) >= _size(matches)


def _size(matches: list[Chain | Head]) -> int:
    return sum(len(m.nodes()) for m in matches)


def analyse(model: nn.Module) -> Analysis:
    """Trace ``model`` in the mode that it is in, whole where it can be, else block by block."""
    analysis = Analysis()
    waiting = [("", model)]
    seen: set[int] = set()
    while waiting:
        path, module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        if not any(isinstance(m, nn.Conv2d) for m in module.modules()) and not _has_weights(module):
            continue
        if _is_leaf(module) and not _is_container(module):
            continue
        blocks = [(_join(path, name), child) for name, child in module.named_children()]
        if _is_container(module) or runs_fused(module):
            waiting = blocks + waiting
            continue
        try:
            traced = trace(module)
        except Untraceable as error:
            analysis.opaque[path] = str(error)
            waiting = blocks + waiting
            continue
        part = Part(path, traced, match(traced.graph, traced.module))
        analysis.parts.append(part)
        for node in traced.graph.nodes:
            if node.op == "call_module" and runs_fused(network := traced.module(str(node.target))):
                waiting.append((_join(path, str(node.target)), network))
        for inner, reason in traced.opaque.items():
            child = module.get_submodule(inner)
            if has_hooks(child):
                # A call of its own, and inside it may be fused.
                waiting.append((_join(path, inner), child))
            else:
                analysis.opaque[_join(path, inner)] = reason
                waiting += [(_join(path, f"{inner}.{name}"), c) for name, c in child.named_children()]
    return analysis


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_container(module: nn.Module) -> bool:
    """Whether what is to be found is in its children: lists, and the wrappers of ``torch.nn.parallel``."""
    wraps = type(module).__module__.startswith("torch.nn.parallel.")
    return wraps or isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_leaf(module: nn.Module) -> bool:
    name = type(module).__module__
    return name.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )


def _has_weights(module: nn.Module) -> bool:
    """Whether a module without convolutions among its children may convolve with parameters of its own."""
    return any(p.dim() == 4 for p in module.parameters())


@contextlib.contextmanager
def modes(model: nn.Module) -> Iterator[list[dict[nn.Module, bool]]]:
    """The modes in which a model is called: as it is, all in training and all in evaluation; restores the first."""
    modules = list(model.modules())
    now = {m: m.training for m in modules}
    every = [now, dict.fromkeys(modules, True), dict.fromkeys(modules, False)]
    distinct = [mode for i, mode in enumerate(every) if mode not in every[:i]]
    try:
        yield distinct
    finally:
        put(now)


def put(mode: dict[nn.Module, bool]) -> None:
    """Set the flags, past a ``train()`` that somebody may have overridden."""
    for module, training in mode.items():
        module.__dict__["training"] = training
