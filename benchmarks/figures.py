"""The figures of docs/performance.md, drawn from the rows alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import tables
from .results import Row

COLOURS = {
    "fused": "#c0392b",
    "compile": "#2e86c1",
    "eager channels_last": "#7f8c8d",
    "bare convolutions": "#27ae60",
}


def slug(*parts: str) -> str:
    """A file name."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def names(rows: Iterable[Row]) -> dict[str, tuple[str, list[Row]]]:
    """File name -> (kind of figure, its rows), for every figure that the rows allow."""
    found: dict[str, tuple[str, list[Row]]] = {}
    rows = [r for r in rows if r.status == "ok"]

    def about(row: Row) -> tuple[str, ...]:
        # Dtypes are panels of one figure.
        return row.model, row.batch, row.device, row.hardware, row.threads

    for command in ("op", "unit"):
        timed = [r for r in rows if r.command == command and r.phase == "both" and r.p50]
        for key, chosen in tables.groups(timed, about).items():
            found[f"{command}-{slug(*key)}.svg"] = ("layers", chosen)
            if command == "op":
                forward = [r for r in rows if (r.command, r.phase) == ("op", "forward") and r.p50]
                chosen = [r for r in forward if about(r) == key]
                found[f"roofline-{slug(*key)}.svg"] = ("roofline", chosen)
    kinds = [r for r in rows if r.command == "step" and r.phase.startswith("kind:")]
    for key, chosen in tables.groups(kinds, about).items():
        found[f"kinds-{slug(*key)}.svg"] = ("kinds", chosen)
    saved = [r for r in rows if r.command == "memory" and r.phase == "saved"]
    if saved:
        found["memory-depth.svg"] = ("memory", saved)
    return found


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw every figure; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    # Without these two the same figure would be another file each time.
    matplotlib.rcParams["svg.hashsalt"] = "fused_preact"
    matplotlib.rcParams["font.size"] = 9
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (kind, chosen) in names(rows).items():
        # The memory figure tells dtypes apart by its lines.
        panels = [chosen] if kind == "memory" else list(tables.groups(chosen, _dtype).values())
        figure, grid = plt.subplots(len(panels), figsize=(9, 4.5 * len(panels)), squeeze=False)
        for axes, rows_of in zip(grid[:, 0], panels, strict=True):
            _DRAW[kind](axes, rows_of)
            axes.grid(True, alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)
        written.append(folder / name)
    return written


def _dtype(row: Row) -> tuple[str, ...]:
    return (row.dtype,)


def _title(row: Row) -> str:
    return f"{row.model}, {row.dtype}, batch {row.batch}, {row.hardware}"


def _layers(axes: Any, rows: list[Row]) -> None:
    """Speed-up over eager per layer, with the rounds' spread; below 1 is a loss."""
    cases = list(dict.fromkeys(r.case for r in rows))
    candidates = [c for c in ("bare convolutions", "compile", "fused") if any(r.candidate == c for r in rows)]
    for index, candidate in enumerate(candidates):
        by = {r.case: r for r in rows if r.candidate == candidate and r.speedup_p50}
        at = [i + 0.27 * (index - (len(candidates) - 1) / 2) for i, c in enumerate(cases) if c in by]
        middle = [float(by[c].speedup_p50) for c in cases if c in by]
        low = [float(by[c].speedup_p50) - float(by[c].speedup_p20) for c in cases if c in by]
        high = [float(by[c].speedup_p80) - float(by[c].speedup_p50) for c in cases if c in by]
        axes.bar(at, middle, 0.25, yerr=[low, high], label=candidate, color=COLOURS[candidate])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("times faster than eager channels_last")
    axes.set_title(_title(rows[0]))
    axes.legend()


def _kinds(axes: Any, rows: list[Row]) -> None:
    """Time of one step by kind of work, from the profiler."""
    candidates = list(dict.fromkeys(r.candidate for r in rows))
    bottom = [0.0] * len(candidates)
    for kind in dict.fromkeys(r.phase for r in rows):
        value = {r.candidate: float(r.value) for r in rows if r.phase == kind}
        heights = [value.get(c, 0.0) for c in candidates]
        axes.bar(candidates, heights, bottom=bottom, label=kind.removeprefix("kind:"))
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_ylabel("ms of one step, under the profiler")
    axes.set_title(_title(rows[0]))
    axes.legend(fontsize=7)


def _memory(axes: Any, rows: list[Row]) -> None:
    """Saved activations per image against depth."""
    lines = tables.groups(rows, lambda r: (r.candidate, r.model.rstrip("0123456789"), r.dtype, r.device))
    for (candidate, family, dtype, device), chosen in lines.items():
        points = sorted(
            (int(re.findall(r"\d+$", r.model)[0]), float(r.value) / int(r.batch) / 1e6) for r in chosen
        )
        style = "-" if candidate == "fused" else "--"
        label = f"{family}, {candidate}, {dtype} {device}"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label, color=COLOURS.get(candidate))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("depth")
    axes.set_ylabel("MB saved for backward per image")
    axes.legend(fontsize=7)


def _roofline(axes: Any, rows: list[Row]) -> None:
    """Achieved FLOP/s of each site's forward against its intensity; lines are the floors of the same schedule."""
    for candidate in ("eager channels_last", "compile", "fused"):
        chosen = [r for r in rows if r.candidate == candidate]
        intensity = [float(r.flops) / float(r.bytes) for r in chosen]
        achieved = [float(r.flops) / float(r.p50) / 1e9 for r in chosen]
        axes.scatter(intensity, achieved, label=candidate, color=COLOURS[candidate])
    ceiling = sorted(
        (float(r.flops) / float(r.bytes), float(r.flops) / float(r.floor_ms) / 1e9) for r in rows
    )
    axes.plot(*zip(*ceiling, strict=True), color="black", linewidth=0.8, label="counted floors")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of the candidate's own schedule")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"forward: {_title(rows[0])}")
    axes.legend()


_DRAW = {"layers": _layers, "kinds": _kinds, "memory": _memory, "roofline": _roofline}
