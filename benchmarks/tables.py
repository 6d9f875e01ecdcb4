"""Markdown tables of the results, for docs/performance.md and README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .results import Row

BASE = "eager channels_last"


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
    """What one table is about: network, dtype, batch, and what it ran on."""
    return row.model, row.dtype, row.batch, row.device, row.hardware, row.threads


def provenance(rows: list[Row]) -> str:
    """When, from which commit and with what the rows were measured."""
    last = max(rows, key=lambda r: r.date)
    threads = f", {last.threads} threads" if last.device == "cpu" else ""
    return f"{last.hardware}{threads}; {last.date}, commit {last.commit}, load average {last.load}; {last.versions}"


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


def networks(rows: list[Row], phase: str) -> list[str]:
    """Whole networks: one line per candidate."""
    lines: list[str] = []
    for key, found in groups(rows, setting).items():
        model, dtype, batch = key[:3]
        shown = [r for r in found if r.phase == phase]
        measured = sorted((r for r in shown if r.status == "ok"), key=lambda r: float(r.p50))
        if not shown:
            continue
        body = []
        for r in measured:
            rate = f"{1e3 * int(batch) / float(r.p50):.4g}"
            spread = f"{float(r.speedup_p20):.2f}–{float(r.speedup_p80):.2f}" if r.speedup_p50 else "–"
            body.append([_by(r), ms(r), rate, faster(r), spread, of_floor(r), r.rounds])
        head = ["", "ms [p20, p80]", "images/s", f"over {BASE}", "p20–p80", "of its floor", "rounds"]
        lines += [f"### {model}, {dtype}, batch {batch}", "", provenance(found), "", *table(head, body), ""]
        # A candidate that was measured in one phase and broke in another is listed with what broke.
        lines += [f"- {r.candidate}: {r.status}" for r in found if r.status != "ok"]
        lines += [""] if any(r.status != "ok" for r in found) else []
    return lines


def cases(rows: list[Row]) -> list[str]:
    """Sites or units: one line per case, one column per candidate."""
    lines: list[str] = []
    for key, found in groups(rows, setting).items():
        model, dtype, batch = key[:3]
        names = [n for n in dict.fromkeys(r.candidate for r in found) if n != BASE]
        head = ["", "in the net", f"{BASE}, ms", *names, "fused forward", "fused backward", "of its floor"]
        body = []
        for (case,), of_case in groups(found, lambda r: (r.case,)).items():
            by = {(r.candidate, r.phase): r for r in of_case}
            failed = {r.candidate: r for r in of_case if r.status != "ok"}
            base, ours = by.get((BASE, "both")), by.get(("fused", "both"))
            if base is None or not base.p50:
                continue
            cells = [case, base.count, f"{float(base.p50):.4g}"]
            cells += [faster(failed.get(n) or by.get((n, "both"))) for n in names]
            cells += [faster(by.get(("fused", p))) for p in ("forward", "backward")]
            body.append([*cells, of_floor(ours) if ours else "–"])
        backend = next((r.backend for r in found if r.backend), "")
        lines += [f"### {model}, {dtype}, batch {batch}", "", provenance(found), ""]
        lines += [
            f"Speed-ups over {BASE}, forward and backward together; fused by {backend or 'nothing'}.",
            "",
        ]
        lines += [*table(head, body), ""]
        lines += [f"- {r.case}: {r.candidate}: {r.status}" for r in found if r.status != "ok"]
        lines += [""] if any(r.status != "ok" for r in found) else []
    return lines


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
    memory_of = {(r.model, r.device, r.candidate): float(r.value) for r in rows if r.phase == "saved"}
    for key, found in groups([r for r in rows if r.command in ("step", "infer")], setting).items():
        for command, phase in (("step", "both"), ("infer", "forward")):
            by = {r.candidate: r for r in found if (r.command, r.phase) == (command, phase)}
            ours = by.get("fused optimized", by.get("fused"))
            if ours is None or not ours.p50:
                continue
            model, dtype, batch, device, hardware, _ = key
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
