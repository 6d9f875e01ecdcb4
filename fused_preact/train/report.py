"""What a run shows at its end: the learning curve and a table, fused beside plain where both are known."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .log import Row
from .measure import StepComparison

MIB = 2**20
IN_TURNS = "images/s, steps in turns"
LINES = (  # name, format, how the fused value is held against the plain one
    ("test accuracy %, last epoch", ".2f", "-"),
    ("test accuracy %, best epoch", ".2f", "-"),
    ("test accuracy %, BN recalibrated", ".2f", "-"),
    ("training seconds", ".1f", "/"),
    ("images/s, median epoch", ",.0f", "/"),
    (IN_TURNS, ",.0f", "/"),
    ("peak memory MiB", ",.1f", "/"),
    ("kept for backward MiB", ",.2f", "/"),
)


@dataclass(frozen=True)
class Result:
    """One model's finished training; ``memory`` says what its peak memory counts."""

    name: str
    rows: list[Row]
    memory: str
    recalibrated: float | None = None


def learning_curve(results: Sequence[Result], title: str) -> bytes | None:
    """Training losses and test errors against epochs as a PNG like the paper's Fig. 6; None without matplotlib."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw_curves(figure.subplots(), {result.name: result.rows for result in results})
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def draw_curves(left: Any, runs: Mapping[str, Sequence[Row]]) -> None:
    """On ``left``, matplotlib's axes: training losses dashed, and on a scale at the right test errors solid."""
    right = left.twinx()
    for index, (name, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        look = {"color": f"C{index % 10}", "marker": "." if len(rows) == 1 else ""}
        left.semilogy(epochs, [row["train_loss"] for row in rows], linestyle="--", linewidth=1, **look)
        right.plot(epochs, [100 - row["test_acc"] for row in rows], label=name, **look)
        if rows and "ema_test_acc" in rows[0]:
            averaged = [100 - row["ema_test_acc"] for row in rows]
            right.plot(epochs, averaged, linestyle=":", label=f"{name}, averaged weights", **look)
    left.set(xlabel="epoch", ylabel="training loss (dashed)")
    # Logarithmic above 1 %: the first epochs' errors would press the interesting end flat.
    right.set(ylabel="test error (%) (solid)", yscale="symlog", ylim=(0, 100))
    if runs:
        right.legend(fontsize="small")


def summary(results: Sequence[Result], saved: Mapping[str, int], steps: StepComparison | None) -> str:
    """The closing table: a column for each model in ``saved``; with two, fused over (or minus) plain."""
    columns: dict[str, dict[str, float]] = {name: {LINES[-1][0]: saved[name] / MIB} for name in saved}
    for result in results:
        values = [
            result.rows[-1]["test_acc"],
            max(row["test_acc"] for row in result.rows),
            result.recalibrated,
            sum(row["train_seconds"] for row in result.rows),
            statistics.median(row["images_per_s"] for row in result.rows),
            None,
            max(row["peak_memory_mib"] for row in result.rows),
        ]
        named = zip(LINES, values, strict=False)
        columns[result.name].update({line[0]: value for line, value in named if value is not None})
    if steps:
        columns["fused"][IN_TURNS] = steps.fused_images_per_s
        columns["plain"][IN_TURNS] = steps.plain_images_per_s
    rows = []
    for name, form, against in LINES:
        found = [column.get(name) for column in columns.values()]
        if all(value is None for value in found):
            continue
        cells = ["-" if value is None else format(value, form) for value in found]
        if len(found) == 2:
            a, b = found
            if a is None or b is None:
                cells.append("")
            elif steps and name == IN_TURNS:
                cells.append(f"{steps.speedup:.2f}x")  # of the pairs, steadier than the ratio of two medians
            else:
                cells.append(f"{a - b:+.2f}" if against == "-" else f"{a / b:.2f}x")
        rows.append([name, *cells])
    text = table(["", *columns, *(["fused:plain"] if len(columns) == 2 else [])], rows)
    text += f"\npeak memory counts {results[0].memory}; kept for backward: one training step's activations"
    if steps:
        text += (
            f"\nsteps in turns: {steps.pairs} pairs of blocks, median speed ratio {steps.speedup:.3f}, "
            f"quartiles {steps.low:.3f} to {steps.high:.3f}; above 1 the fused model is the faster"
        )
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
