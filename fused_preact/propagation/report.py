"""What a measurement shows: checks of the paper's statements, a table, JSON, figures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..train.report import table
from ..units import ORDERS, Shortcut
from .measure import Snapshot, UnitRecord

__all__ = ["Check", "Variant", "checks", "figures", "summary", "to_json"]

EXACT = tuple(name for name, order in ORDERS.items() if not order.after)
"""The orders whose f is the identity."""


@dataclass(frozen=True)
class Variant:
    """One network's snapshots, from initialisation on; ``label`` tells it from the others of a run."""

    label: str
    order: str
    shortcut: Shortcut
    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True)
class Check:
    """A statement of the paper, what was measured, and whether that is it."""

    variant: str
    step: int
    statement: str
    measured: float
    expected: float
    holds: bool


def checks(variant: Variant, dtype: torch.dtype) -> list[Check]:
    """The statements that are exact for ``variant``, at each snapshot.

    A residual counts as rounding up to 1000 times the machine epsilon: sums over a stage's units.
    """
    found = []
    rounding = 1000 * torch.finfo(dtype).eps
    kind, values = variant.shortcut.kind, variant.shortcut.values
    for snapshot in variant.snapshots:
        if not math.isfinite(snapshot.loss):
            continue

        def add(
            statement: str, measured: float, expected: float, holds: bool, step: int = snapshot.step
        ) -> None:
            found.append(Check(variant.label, step, statement, measured, expected, holds))

        if variant.order in EXACT:
            for statement, name in (("additive form", "additive"), ("two-term gradient", "two_term")):
                worst = _worst(snapshot.units, name)
                if worst is not None:
                    add(f"{statement}: residual", worst, 0.0, worst <= rounding)
        if kind == "scaling":
            expected = values[0] ** len(snapshot.units)
            measured = snapshot.units[0].shortcut_term
            close = math.isclose(measured, expected, rel_tol=rounding, abs_tol=1e-300)
            add(f"shortcut term: {values[0]:g}^{len(snapshot.units)}", measured, expected, close)
        if variant.order == "relu_before_addition" and kind == "A":
            least = min(u.smallest_step for u in _keeping(snapshot.units))
            add("x never falls within a stage: smallest step", least, 0.0, least >= 0)
    return found


def _keeping(units: Sequence[UnitRecord]) -> list[UnitRecord]:
    """The units but the first of each stage."""
    return [u for before, u in pairwise(units) if before.stage == u.stage] or list(units)


def _worst(units: Sequence[UnitRecord], name: str) -> float | None:
    values = [getattr(u, name) for u in units if getattr(u, name) is not None]
    return max(values) if values else None


def summary(variants: Sequence[Variant], dtype: torch.dtype) -> str:
    """A table with a row for each variant and snapshot, and below it what the paper says and what holds."""
    rows = []
    for variant in variants:
        for s in variant.snapshots:
            first = s.units[0]
            cells = [f"{s.step}", f"{s.loss:.3f}", f"{first.gradient:.2e}", f"{s.last_gradient:.2e}"]
            cells += [f"{first.shortcut_term:.3e}", f"{sum(u.factor for u in s.units) / len(s.units):.4f}"]
            cells += [
                "-" if v is None else f"{v:.1e}"
                for v in (_worst(s.units, n) for n in ("additive", "two_term"))
            ]
            cells.append(f"{100 * sum(u.negative for u in s.units) / len(s.units):.1f}")
            rows.append([variant.label, *cells])
    header = ["", "step", "loss", "|dE/dx_1|", "|dE/dx_L|", "shortcut term", "factor"]
    text = table([*header, "additive", "two-term", "y < 0 (%)"], rows)
    text += (
        "\nshortcut term: the share of dE/dx_L that the factors of h alone carry to the first unit (what f does after"
        "\nthe addition is left out); factor: their mean; additive, two-term: the worst residual in a stage, exact"
        "\nwhere f is the identity"
    )
    for variant in variants:
        if variant.shortcut.gated:
            bias, count = variant.shortcut.values[0], len(variant.snapshots[0].units)
            carry = 1 / (1 + math.exp(bias))
            text += f"\n{variant.label}: of its initial bias alone 1 - g = {carry:.5f}, "
            text += f"over {count} units {carry**count:.3g}"
    for check in [c for variant in variants for c in checks(variant, dtype)]:
        verdict = "holds" if check.holds else "DOES NOT HOLD"
        text += f"\n{verdict}: {check.variant}, step {check.step}, {check.statement} {check.measured:.3g}"
        text += f" (expected {check.expected:.3g})"
    return text


def to_json(settings: dict[str, Any], variants: Sequence[Variant], dtype: torch.dtype) -> bytes:
    """Everything measured; what is not finite is null."""
    content = {
        "settings": settings,
        "variants": [
            {
                "label": v.label,
                "order": v.order,
                "shortcut": v.shortcut._asdict(),
                "snapshots": [s.to_dict() for s in v.snapshots],
            }
            for v in variants
        ],
        "checks": [vars(c) for v in variants for c in checks(v, dtype)],
    }
    return (json.dumps(_finite(content), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- figures ------------------------------------------------------------------------------------------------------

_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))


def figures(variants: Sequence[Variant], title: str, dtype: torch.dtype) -> dict[str, bytes]:
    """PNGs by name. With training the network at its beginning is drawn thin, at its end thick."""
    drawn = {
        "gradients": _figure(
            variants, title, "gradient norm |dE/dx|", lambda u: u.gradient, "What reaches each unit's input"
        ),
        "shortcut_term": _figure(
            variants,
            title,
            "share of |dE/dx| at the end",
            lambda u: u.shortcut_term,
            "What the shortcuts alone carry back from the last unit",
        ),
        "negative": _figure(
            variants,
            title,
            "negative elements (%)",
            lambda u: 100 * u.negative,
            "Negative elements of h(x) + F(x)",
            log=False,
        ),
        "additive": _figure(
            variants,
            title,
            "max |difference| / max |x_L|",
            lambda u: u.additive,
            "The additive form, held against the signal at the stage's end",
            floor=torch.finfo(dtype).eps,
        ),
        "two_term": _figure(
            variants,
            title,
            "|difference| / |dE/dx|",
            lambda u: u.two_term,
            "Both terms of the gradient, held against the whole",
            floor=torch.finfo(dtype).eps,
        ),
    }
    if any(v.shortcut.gated for v in variants):
        drawn["gates"] = _figure(
            variants,
            title,
            "mean of 1 - g",
            lambda u: u.factor,
            "What the gates let through",
            log=False,
            gates=True,
        )
    return drawn


def _figure(
    variants: Sequence[Variant],
    title: str,
    ylabel: str,
    value: Callable[[UnitRecord], float | None],
    what: str,
    *,
    log: bool = True,
    floor: float | None = None,
    gates: bool = False,
) -> bytes:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, variant in enumerate(variants):
        if gates and not variant.shortcut.gated:
            continue
        moments = (
            [variant.snapshots[0], *variant.snapshots[-1:]]
            if len(variant.snapshots) > 1
            else variant.snapshots
        )
        for moment in moments:
            values = [value(u) for u in moment.units]
            drawn = [math.nan if v is None or (log and v <= 0) else v for v in values]
            label = variant.label if len(moments) == 1 else f"{variant.label}, step {moment.step}"
            if all(map(math.isnan, drawn)):
                label += " (0)" if 0 in values else " (not defined)"
            axes.plot(
                [u.unit for u in moment.units],
                drawn,
                color=f"C{index}",
                linestyle=_STYLES[index % len(_STYLES)],
                linewidth=1.0 if len(moments) > 1 and moment is moments[0] else 2.2,
                label=label,
            )
    units = variants[0].snapshots[0].units
    for before, after in pairwise(units):
        if before.stage != after.stage:
            axes.axvline(after.unit - 0.5, color="0.8", linewidth=0.8, zorder=0)
    if floor is not None:
        axes.axhline(floor, color="0.5", linewidth=0.8)
        axes.annotate(
            "machine epsilon", (units[-1].unit, floor), ha="right", va="bottom", color="0.4", fontsize=9
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("residual unit, counted from the input (grey lines: the map is halved)", fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.set_title(f"{what}\n{title}", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()
