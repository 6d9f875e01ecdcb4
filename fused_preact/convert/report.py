"""``explain``: what became of each site of a model, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calls import has_hooks, observed, runs_batch_norm, runs_convolution
from ..modules import PreActConv2d, _PreActUnit, is_identity_projection
from ..units import ResidualUnit
from .analysis import Analysis, Part, analyse, runs_fused
from .reasons import AS_WRITTEN, Reader, is_any_convolution, is_any_norm, other

__all__ = ["Explanation", "Row", "explain"]


@dataclass(frozen=True)
class Row:
    """One site, head or left addition.

    ``kind``: "site" (BN, ReLU or nothing, 2-d convolution), "convolution" (behind another norm or activation),
    "addition", "head", "pool" (a 1x1 one that subsamples beside a site), or "norm" in code that cannot be traced.
    ``site``: the paths of what it is made of, or the names of the parameters that functions are called with, ``?``
    where there is none. ``where``: the path of the module whose forward holds it, empty for the model's own.
    ``path``: "unit", "chain", "site" or "head", the same with "own" in front for modules of this package, or "as
    written"; ``call`` is one number for all rows of one fused call. ``fused``: whether that is so now, not only once
    ``fuse`` has run. ``reason``: why not.
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
            elif isinstance(module, ResidualUnit) and module.fused:
                self._add(path, lambda path=path, module=module: self._own_parts(path, module))  # type: ignore[misc]
            elif runs_fused(module):
                self.tails[path] = lambda path=path, module=module: self._own_head(path, module)  # type: ignore[misc]
        for path, reason in analysis.opaque.items():
            self._add(path, lambda path=path, reason=reason: self._hidden(path, reason))  # type: ignore[misc]
        if not analysis.parts and not analysis.opaque:
            for path, module in model.named_modules():
                if (
                    is_any_convolution(module)
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
        inside = [p for p in self.sources if not path or p.startswith(f"{path}.")]
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

    def _own_parts(self, path: str, module: ResidualUnit) -> None:
        """The rows of a unit that is no single call: its sites, the convolution that is none, its addition."""
        if "conv1" in module.parts:
            stored = "bn1" in module.before
            reason = (
                "the activation is needed by the shortcut too"
                if stored
                else "no norm before the activation"
                if "relu" in (*module.before, module.parts[0])
                else "it reads the unit's input, which the shortcut needs too"
            )
            site = f"{_join(path, 'bn1') if stored else '?'} -> {_join(path, 'conv1')}"
            self._row("site" if stored else "convolution", site, path, AS_WRITTEN, False, reason, None)
        added = ""
        for row in [part for part in module.parts if not isinstance(part, str)]:
            reasons = [self._own_reason(_join(path, n), getattr(module, n)) for pair in row for n in pair]
            reason = next(filter(None, reasons), self._observed())
            taken = AS_WRITTEN if reason else "own chain" if len(row) > 1 else "own site"
            call = None if reason else self._next()
            for bn, conv in row:
                site = f"{_join(path, bn)} -> {_join(path, conv)}"
                self._row("site", site, path, taken, not reason, reason, call)
            added = reason
        self.additions += 1
        last = module.parts[-1]
        if isinstance(last, str):
            added = f"{_join(path, last) if last != 'relu' else 'a ReLU'} stands in front of it"
        elif not module.adds_in_epilogue:
            added = "it scales an operand"
        if added:
            name = last if isinstance(last, str) else last[-1][1]
            operand = name if name == "relu" else _join(path, name)
            other = "its input" if module.shortcut is None else _join(path, "shortcut")
            self._row("addition", f"{operand} + {other}", path, AS_WRITTEN, False, added, None)

    def _own_reason(self, path: str, module: Any) -> str:
        if runs_batch_norm(module) or runs_convolution(module):
            return ""
        if is_identity_projection(module) and not has_hooks(module):
            return ""
        return other(module, path)

    def _own_head(self, path: str, module: Any) -> None:
        bn = _join(path, "bn")
        reason = "" if runs_batch_norm(module.bn) else other(module.bn, bn)
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
        convolutions = [name for name, child in held if is_any_convolution(child)]
        norms = [name for name, child in held if is_any_norm(child)]
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
            other(module, path),
            None,
        )

    # --- what was traced ---------------------------------------------------------------------------------------

    def _part(self, part: Part) -> None:
        reader = Reader(self, part)
        for node in part.traced.graph.nodes:
            if node.op == "call_module":
                self._emit(part.full(str(node.target)))
            reader.rows(node)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _held(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers among the children of ``module``, also by way of a list of modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and type(child).forward is nn.Module.forward:
            yield from _held(child, _join(path, name))
        else:
            yield _join(path, name), child
