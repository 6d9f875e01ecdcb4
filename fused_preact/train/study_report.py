"""A study's results as a table and as pictures, beside the paper's."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .log import Row
from .paper import FAIL
from .report import draw_curves


def markdown(results: dict[str, Any]) -> str:
    """The table, and below it what differs from the paper's runs."""
    table, seeds = results["table"], results["seeds"]
    lines = []
    if table is not None:
        lines += [f"Table {table}: {results['title']}. Test errors in percent after the last epoch.", ""]
    many = seeds > 1
    header = ["", *(["net"] if table is not None else []), f"median of {seeds}" if many else "error"]
    header += ["mean ± std"] if many else []
    header += ["the paper", "its net"] if table is not None else []
    rows = [
        [
            cell["row"],
            *([cell["column"]] if table is not None else []),
            _error(cell),
            *([_spread(cell)] if many else []),
            *([cell["paper"], cell["paper_net"]] if table is not None else []),
        ]
        for cell in results["cells"]
    ]
    lines += _aligned(header, rows)
    lines += ["", f"What was run: {_what(results)}."]
    if table is not None:
        lines += [f"The paper: {PAPER_RUNS[table]}. A fail is an error above {FAIL:.0f} %."]
    return "\n".join(lines) + "\n"


PAPER_RUNS = dict.fromkeys(
    (1, 2, 3), "CIFAR images of 32x32, 50,000 to train on, 64,000 steps of 128, median of 5 runs"
)


def _what(results: dict[str, Any]) -> str:
    seeds, first = results["seeds"], results["first_seed"]
    size = {
        "digits": "scikit-learn's digits (1,297 images of 8x8 to train on, 500 to test)",
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
    }.get(results["data"], results["data"])
    limits = [
        f"the first {results[name]} of the {kind} images"
        for name, kind in (("limit_train", "training"), ("limit_test", "test"))
        if results[name] is not None
    ]
    seconds = sum(cell["seconds"] for cell in results["cells"])
    which = f"seed {first}" if seeds == 1 else f"seeds {first} to {first + seeds - 1}"
    return (
        f"{', '.join([size, *limits])}, {results['epochs']} epochs, batch {results['batch_size']}, {which}, "
        f"{results['dtype']} on {results['device']}, torch {results['torch']}, {results['date']}, "
        f"{seconds / 60:.0f} minutes of training"
    )


def _error(cell: dict[str, Any]) -> str:
    if cell["median"] is None:
        return "fail (diverged)"
    return f"fail ({cell['median']:.2f})" if cell["fail"] else f"{cell['median']:.2f}"


def _spread(cell: dict[str, Any]) -> str:
    return "-" if cell["mean"] is None else f"{cell['mean']:.2f} ± {cell['std']:.2f}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    numbers = range(1, len(header))

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * (width - 1) + ":") if i in numbers else "-" * width for i, width in enumerate(widths)]
    return [line(header), line(rule), *map(line, rows)]


def picture(results: dict[str, Any]) -> bytes | None:
    """Every cell's median with its seeds as dots, and the paper's figure beside it; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    cells = results["cells"]
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(cells)), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True)
    names = [f"{cell['row']}, {cell['column']}" for cell in cells]
    places = range(len(cells))
    for axis, title in (
        (ours, f"here: {results['data']}, {results['epochs']} epochs"),
        (theirs, "the paper: CIFAR"),
    ):
        axis.set(title=title, xlabel="test error (%)")
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(places, names)
    ours.invert_yaxis()  # both: they share it
    most = max(
        [cell["median"] for cell in cells if cell["median"] is not None and not cell["fail"]], default=FAIL
    )
    inside = [
        [error for error in cell["errors"] if error is not None and error <= 1.2 * most] for cell in cells
    ]
    medians = [None if cell["fail"] else cell["median"] for cell in cells]
    _bars(ours, medians, most, [_error(cell) for cell in cells], inside)
    for place, errors in zip(places, inside, strict=True):
        ours.plot(errors, [place] * len(errors), "k.", markersize=4)
    told = [cell["paper"] for cell in cells]
    figures = [float(text) if text not in ("", "fail") else None for text in told]
    highest = max([value for value in figures if value is not None], default=FAIL)
    _bars(theirs, figures, highest, told, [[] for _ in cells])
    theirs.tick_params(labelleft=False)
    figure.suptitle(f"Table {results['table']}: {results['title']}")
    return _png(figure)


def _bars(
    axis: Any,
    values: Sequence[float | None],
    most: float,
    told: Sequence[str],
    dots: Sequence[Sequence[float]],
) -> None:
    """A bar for each value, pale and as long as the longest for a fail; the text behind it and behind its dots."""
    for place, (value, text, beside) in enumerate(zip(values, told, dots, strict=True)):
        if value is None and not text:
            continue
        length, look = (most, ("C3", 0.25)) if value is None else (value, ("C0", 0.7))
        axis.barh(place, length, color=look[0], alpha=look[1])
        end = (max([length, *beside]), place)
        axis.annotate(text, end, (5, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, 1.5 * most or 1)


def curves(runs: Mapping[str, Sequence[Row]], title: str) -> bytes | None:
    """Learning curves of several runs in one picture; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw_curves(figure.subplots(), runs)
    figure.suptitle(title)
    return _png(figure)


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return content.getvalue()
