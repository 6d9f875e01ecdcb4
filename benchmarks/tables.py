"""Markdown tables of the results, for docs/performance.md and README.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from . import results
from .allocator import DEFAULT
from .results import Row

BASE = "eager channels_last"
Repeats = dict[tuple[str, ...], list[Row]]
"""Several runs of each row, by its key."""


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, first column left, the others right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in body)]


def groups(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by key, in the order in which the keys first appear."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def setting(row: Row) -> tuple[str, ...]:
    """What one table is about: network, dtype, batch, what it ran on, and the memory allocator's setting."""
    return row.model, row.dtype, row.batch, row.device, row.hardware, row.threads, row.key[-1]


def provenance(rows: list[Row]) -> str:
    """When, from which commit and with what the rows were measured."""
    last = max(rows, key=lambda r: r.date)
    threads = f", {last.threads} threads" if last.device == "cpu" else ""
    busy = max((float(r.others) for r in rows if r.others), default=None)
    others = "" if busy is None else f", others' load at most {busy:.2f} cores"
    machine = f"{last.hardware}{threads}, allocator {last.key[-1]}"
    return f"{machine}; {last.date}, commit {last.commit}{others}; {last.versions}"


def ms(row: Row) -> str:
    """Median with its spread."""
    return f"{float(row.p50):.4g} [{float(row.p20):.4g}, {float(row.p80):.4g}]"


def faster(row: Row | None) -> str:
    """Median speed-up; a loss says so."""
    if row is None:
        return "–"
    if row.status != "ok":
        return row.status.split()[0].rstrip(":").lower()
    if not row.speedup_p50:
        return "–"
    value = float(row.speedup_p50)
    return f"{value:.2f}×" if value >= 1 else f"{value:.2f}× (loss)"


def of_floor(row: Row) -> str:
    """The share of the floor of the row's own schedule."""
    return f"{100 * float(row.floor_ms) / float(row.p50):.0f} %" if row.floor_ms and row.p50 else "–"


def _by(row: Row) -> str:
    return f"**{row.candidate}** ({row.backend})" if row.backend else row.candidate


def over_runs(runs: Sequence[Row]) -> str:
    """The least and the greatest median speed-up of several runs of one row."""
    medians = [float(r.speedup_p50) for r in runs if r.speedup_p50]
    return f"{min(medians):.2f}–{max(medians):.2f} ({len(medians)})" if len(medians) > 1 else "–"


def networks(rows: list[Row], phase: str, repeats: Repeats) -> list[str]:
    """Whole networks: one line per candidate."""
    lines: list[str] = []
    for key, found in groups(rows, setting).items():
        model, dtype, batch, *_, memory = key
        shown = [r for r in found if r.phase == phase]
        measured = sorted((r for r in shown if r.status == "ok"), key=lambda r: float(r.p50))
        if not shown:
            continue
        body = []
        for r in measured:
            rate = f"{1e3 * int(batch) / float(r.p50):.4g}"
            spread = f"{float(r.speedup_p20):.2f}–{float(r.speedup_p80):.2f}" if r.speedup_p50 else "–"
            runs = over_runs(repeats.get(r.key, []))
            body.append([_by(r), ms(r), rate, faster(r), spread, runs, of_floor(r), r.rounds])
        head = [
            "",
            "ms [p20, p80]",
            "images/s",
            f"over {BASE}",
            "p20–p80",
            "over runs (how many)",
            "of its floor",
        ]
        head.append("rounds")
        title = f"### {model}, {dtype}, batch {batch}"
        title += ", the system's default allocator" if memory == DEFAULT else ""
        lines += [title, "", provenance(found), "", *table(head, body), ""]
        lines += [f"- {r.candidate}: {r.note}" for r in measured if r.note]
        # A candidate that was measured in one phase and broke in another is listed with what broke.
        lines += [f"- {r.candidate}: {r.status}" for r in found if r.status != "ok"]
        lines += [""] if any(r.status != "ok" or r.note for r in found) else []
    return lines


def faults(rows: list[Row]) -> list[str]:
    """What each setting of the memory allocator makes a step cost in the kernel."""
    body = []
    for key, found in groups(rows, lambda r: (*setting(r), r.candidate)).items():
        value = {r.phase: float(r.value) for r in found if r.value}
        if "faults" in value and "kernel time" in value:
            what = f"{key[0]}, {key[1]}, batch {key[2]}: {key[-1]}"
            body.append([what, key[-2], f"{value['faults']:.0f}", f"{value['kernel time']:.2f}"])
    body.sort(key=lambda cells: cells[0])
    head = ["", "allocator", "page faults", "CPU seconds in the kernel"]
    return ["### Page faults of a step", "", *table(head, body), ""] if body else []


def cases(rows: list[Row], repeats: Repeats) -> list[str]:
    """Sites or units: one line per case and dtype, one column per candidate."""
    lines: list[str] = []
    for key, found in groups(rows, lambda r: (r.model, r.batch, *setting(r)[3:])).items():
        model, batch = key[:2]
        names = [n for n in dict.fromkeys(r.candidate for r in found) if n != BASE]
        head = [
            "",
            "in the net",
            "dtype",
            f"{BASE}, ms",
            *names,
            "fused forward",
            "fused backward",
            "of its floor",
        ]
        body = []
        order = list(dict.fromkeys(r.case for r in found))
        together = sorted(found, key=lambda r: order.index(r.case))
        for (case, dtype), of_case in groups(together, lambda r: (r.case, r.dtype)).items():
            by = {(r.candidate, r.phase): r for r in of_case}
            failed = {r.candidate: r for r in of_case if r.status != "ok"}
            base, ours = by.get((BASE, "both")), by.get(("fused", "both"))
            if base is None or not base.p50:
                continue
            cells = [case, base.count, dtype, f"{float(base.p50):.4g}"]
            cells += [faster(failed.get(n) or by.get((n, "both"))) for n in names]
            cells += [faster(by.get(("fused", p))) for p in ("forward", "backward")]
            body.append([*cells, of_floor(ours) if ours else "–"])
        backend = next((r.backend for r in found if r.backend), "")
        lines += [f"### {model}, batch {batch}", "", provenance(found), ""]
        lines += [
            f"Speed-ups over {BASE}, forward and backward together; fused by {backend or 'nothing'}.",
            "",
        ]
        lines += [*table(head, body), ""]
        lines += _drift(found, repeats)
        lines += [f"- {r.case}, {r.dtype}: {r.candidate}: {r.status}" for r in found if r.status != "ok"]
        lines += [""] if any(r.status != "ok" for r in found) else []
    return lines


def _drift(rows: list[Row], repeats: Repeats) -> list[str]:
    """How far fused's median speed-ups of several runs lie apart, over the cases that have several."""
    apart = []
    for row in rows:
        medians = [float(r.speedup_p50) for r in repeats.get(row.key, []) if r.speedup_p50]
        if (row.candidate, row.phase) == ("fused", "both") and len(medians) > 1:
            apart.append(100 * (max(medians) / min(medians) - 1))
    if not apart:
        return []
    middle, most = statistics.median(apart), max(apart)
    return [
        f"Medians of fused over eager in separate runs lie {middle:.0f} % apart (median case), at most {most:.0f} %.",
        "",
    ]


def memory(rows: list[Row]) -> list[str]:
    """Saved activations, peak and largest batch."""
    lines: list[str] = []
    for key, found in groups(rows, lambda r: (r.dtype, r.device, r.hardware)).items():
        fits = next((r.phase for r in found if r.phase.startswith("fits")), "fits")
        head = [
            "",
            "saved MB",
            "of eager's",
            "peak MB",
            "of eager's",
            "peak MB an image",
            f"images in {fits[5:]}",
        ]
        body = []
        for (model, batch), of_model in groups(found, lambda r: (r.model, r.batch)).items():
            value = {(r.candidate, r.phase): float(r.value) for r in of_model if r.value and r.status == "ok"}
            for name in dict.fromkeys(r.candidate for r in of_model):
                cells = [f"{model}, batch {batch}: {name}"]
                for phase in ("saved", "peak"):
                    mine, base = value.get((name, phase)), value.get((BASE, phase))
                    cells.append("–" if mine is None else f"{mine / 1e6:.1f}")
                    cells.append("–" if mine is None or not base else f"{100 * mine / base:.0f} %")
                per_image, images = value.get((name, "per image")), value.get((name, fits))
                cells.append("–" if per_image is None else f"{per_image / 1e6:.2f}")
                cells.append("–" if images is None else f"{images:.0f}")
                body.append(cells)
        lines += [f"### {key[0]} on {key[1]}", "", provenance(found), "", *table(head, body), ""]
        lines += [f"- {r.model}: {r.candidate}: {r.status}" for r in found if r.status != "ok"]
    return lines


def overhead(rows: list[Row]) -> list[str]:
    """Microseconds on a near-empty tensor."""
    lines: list[str] = []
    for key, found in groups(rows, lambda r: (r.device, r.hardware, r.dtype)).items():
        head = ["", "forward µs", "backward µs", "beyond eager, both, µs"]
        body = []
        for (case, name), of_case in groups(found, lambda r: (r.case, r.candidate)).items():
            by = {r.phase: r for r in of_case if r.status == "ok"}
            if "both" not in by:
                body.append([f"{case}: {name}", of_case[0].status, "–", "–"])
                continue
            cells = [f"{1e3 * float(by[p].p50):.1f}" for p in ("forward", "backward")]
            body.append([f"{case}: {_by(by['both'])}", *cells, f"{float(by['both'].value):+.1f}"])
        lines += [f"### {key[2]} on {key[0]}", "", provenance(found), "", *table(head, body), ""]
    return lines


def roofline(rows: list[Row]) -> list[str]:
    """Ceilings, and floors of whole networks."""
    lines: list[str] = []
    for key, found in groups(rows, lambda r: (r.dtype, r.device, r.hardware, r.threads)).items():
        top = {r.candidate: float(r.value) for r in found if r.case == "ceiling"}
        lines += [f"### {key[0]} on {key[1]}", "", provenance(found), ""]
        if top:
            copy, gemm = top.get("copy", 0) / 1e9, top.get("gemm", 0) / 1e12
            lines += [f"Copy bandwidth (read and write) {copy:.4g} GB/s, GEMM {gemm:.4g} TFLOP/s.", ""]
        head = [
            "network, schedule",
            "GB a step",
            "GFLOP a step",
            "floor of a step, ms",
            "floor of inference, ms",
        ]
        body = []
        floors = [r for r in found if r.case in ("network", "inference")]
        for (model, batch, name), of_one in groups(floors, lambda r: (r.model, r.batch, r.candidate)).items():
            by = {(r.case, r.phase): r for r in of_one}
            step, infer = by.get(("network", "both")), by.get(("inference", "forward"))
            if step is None or infer is None:
                continue
            cells = [f"{model}, batch {batch}: {name}", f"{float(step.bytes) / 1e9:.4g}"]
            cells += [f"{float(step.flops) / 1e9:.4g}", f"{float(step.floor_ms):.4g}"]
            body.append([*cells, f"{float(infer.floor_ms):.4g}"])
        lines += [*table(head, body), ""]
    return lines


def summary(rows: list[Row]) -> list[str]:
    """The few figures that README shows: our step, inference and memory beside eager's and the best compiler's."""
    body = []
    rows = results.fair(rows)
    memory_of = {(r.model, r.device, r.candidate): float(r.value) for r in rows if r.phase == "saved"}
    for key, found in groups([r for r in rows if r.command in ("step", "infer")], setting).items():
        for command, phase in (("step", "both"), ("infer", "forward")):
            by = {r.candidate: r for r in found if (r.command, r.phase) == (command, phase)}
            ours = by.get("fused optimized", by.get("fused"))
            if ours is None or not ours.p50:
                continue
            model, dtype, batch, device, hardware, *_ = key
            compilers = ("compile", "max-autotune", "inductor frozen")
            timed = [by[n] for n in compilers if n in by and by[n].p50]
            best = min(timed, key=lambda r: float(r.p50), default=None)
            against = f"{float(best.p50) / float(ours.p50):.2f}×" if best else "–"
            saved, base = (memory_of.get((model, device, n)) for n in ("fused", BASE))
            share = f"{100 * saved / base:.0f} %" if saved and base and command == "step" else ""
            what = f"{model}, {'training step' if command == 'step' else 'inference'}, {dtype}, batch {batch}"
            cells = [what, f"{hardware} ({ours.backend})", f"{float(ours.p50):.4g} ms"]
            body.append([*cells, faster(ours), against, share])
    if not body:
        return [
            "No figures are committed yet: `python -m benchmarks step`, then `python -m benchmarks report`."
        ]
    head = [
        "",
        "hardware (backend)",
        "fused",
        "over eager",
        "over the best compiler mode",
        "saved activations",
    ]
    note = "Written by `python -m benchmarks report`; all of them, losses too: [performance](docs/performance.md)."
    return [*table(head, body), "", note]
