"""Result rows: what was measured, on what, with which versions and from which commit; kept as CSV files."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from . import allocator

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line of a results file; empty strings where a column does not apply.

    Times are milliseconds per call, speed-ups are over ``base`` and paired round by round, ``floor_ms`` is the least
    time that the row's own schedule could take at the measured ceilings, ``samples`` holds every round.
    ``others`` is how many cores other processes kept busy meanwhile, ``allocator`` the C library's setting
    (:mod:`.allocator`), ``note`` what a reader has to know about the row.
    """

    date: str = ""
    commit: str = ""
    command: str = ""
    model: str = ""
    case: str = ""
    count: str = ""
    candidate: str = ""
    backend: str = ""
    phase: str = ""
    dtype: str = ""
    batch: str = ""
    device: str = ""
    hardware: str = ""
    threads: str = ""
    others: str = ""
    allocator: str = ""
    versions: str = ""
    status: str = "ok"
    rounds: str = ""
    p20: str = ""
    p50: str = ""
    p80: str = ""
    base: str = ""
    speedup_p20: str = ""
    speedup_p50: str = ""
    speedup_p80: str = ""
    floor_ms: str = ""
    bytes: str = ""
    flops: str = ""
    value: str = ""
    unit: str = ""
    note: str = ""
    samples: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured, independent of when and of which commit."""
        return (
            self.command,
            self.model,
            self.case,
            self.candidate,
            self.phase,
            self.dtype,
            self.batch,
            self.device,
            self.hardware,
            self.threads,
            # Rows from before the setting was recorded were measured under the system's own.
            self.allocator or allocator.DEFAULT,
        )

    def times(self) -> list[float]:
        """The rounds in milliseconds."""
        return [float(s) for s in self.samples.split()]


COLUMNS = [f.name for f in fields(Row)]


def number(value: float) -> str:
    """Five significant digits: below any noise here, and short in a file."""
    return f"{value:.5g}"


@functools.cache
def commit() -> str:
    """The last commit that changed what is measured or how, with "+" where files differ from it.

    Committing results or pages does not make another run of the same code. FUSED_PREACT_BENCH_COMMIT overrides.
    """
    override = os.environ.get("FUSED_PREACT_BENCH_COMMIT")
    if override:
        return override
    measured = "fused_preact", "kernels", "setup.py", ":(glob)benchmarks/*.py"
    git = "git", "-C", str(ROOT)
    last = _output(*git, "log", "-1", "--format=%h", "--abbrev=10", "--", *measured)
    if not last:
        return "unknown"
    return last + ("+" if _output(*git, "status", "--porcelain", "-uno", "--", *measured) else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def hardware(device: str) -> str:
    """The name of the GPU, or of the CPU with its widest instruction set and core count."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model, flags = platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                flags = line
    widest = next((name for name in ("amx_bf16", "avx512f", "avx2") if f" {name}" in flags), "")
    return f"{model} {widest} x{os.cpu_count()}".replace("  ", " ")


def versions(packages: Sequence[str] = ()) -> str:
    """Torch, Python and the given packages, as "name version" separated by semicolons."""
    found = [f"torch {torch.__version__}", f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def stamp(rows: Iterable[Row], device: str, threads: int, packages: Sequence[str] = ()) -> list[Row]:
    """Fill in what all rows of a run share."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    stamped = list(rows)
    for row in stamped:
        row.date, row.commit, row.device = now, commit(), device
        row.hardware, row.threads, row.versions = hardware(device), str(threads), versions(packages)
        row.allocator = row.allocator or allocator.name()
    return stamped


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file by writing a new one beside it and renaming: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, [*load(path), *rows])


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, replacing the file at once."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(out.getvalue())
    temporary.replace(path)


def replace(path: Path, text: str) -> None:
    """Write a generated page at once, and say so."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    print(f"wrote {path}")


def load(path: Path) -> list[Row]:
    """The rows of one file, none where it does not exist; columns of older files may be missing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(**{k: v for k, v in line.items() if k in COLUMNS}) for line in csv.DictReader(file)]


def load_all(folder: Path) -> list[Row]:
    """The rows of every results file in a folder, in the order of their names."""
    return [row for path in sorted(folder.glob("*.csv")) for row in load(path)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each key, in the order in which the keys first appear; files are in order of time."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        newest[row.key] = row
    return list(newest.values())


def repeats(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The timed rows of each key that share commit and versions with its newest: the same thing measured again."""
    rows = [r for r in rows if r.p50]
    newest = {r.key: r for r in rows}
    found: dict[tuple[str, ...], list[Row]] = {key: [] for key in newest}
    for row in rows:
        if (row.commit, row.versions) == (newest[row.key].commit, newest[row.key].versions):
            found[row.key].append(row)
    return found


def fair(rows: Iterable[Row]) -> list[Row]:
    """Without what was measured under the system's default allocator and also with freed memory kept."""
    rows = list(rows)
    kept = {r.key[:-1] for r in rows if r.key[-1] != allocator.DEFAULT}
    return [r for r in rows if r.key[-1] != allocator.DEFAULT or r.key[:-1] not in kept]


def to_json(rows: Iterable[Row]) -> str:
    """The rows as JSON, without empty columns."""
    return json.dumps([{k: v for k, v in asdict(row).items() if v != ""} for row in rows], indent=1)
