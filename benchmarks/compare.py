"""Regressions beyond noise between two results files (or folders), or between two commits.

    python -m benchmarks compare old.csv new.csv
    python -m benchmarks compare main HEAD --bench "op --model cifar_preact_resnet164 --limit 4 --minutes 2"

A change counts where it is larger than the rounds' spread of both sides together and than 3 %. Times that were taken
beside a base are compared twice, in milliseconds and relative to the base, and both have to have changed: a machine
that is slower today slows both sides, and a base that was faster in one run slows nobody. Several runs of the same
code count together.

Commits are built in worktrees of their own, installed into temporary folders (about a minute each, with the packages
of this environment) and measured in turns by this checkout's benchmarks; a commit whose package lacks what these
benchmarks call cannot be measured, and its error is printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import results
from .measure import Spread, spread
from .results import Row

LEAST = 0.03
TURNS = 3


class Change(NamedTuple):
    """What became of one measured thing."""

    key: tuple[str, ...]
    verdict: str
    change: float
    noise: float
    reason: str = ""


def _pooled(rows: list[Row], relative: bool) -> Spread | None:
    """Repeated measurements as one: the median of their medians, within the widest spread; None where not timed."""
    costs = []
    for row in rows:
        if row.status != "ok" or not row.p50:
            continue
        if not relative:
            costs.append(Spread(float(row.p20), float(row.p50), float(row.p80)))
        elif row.speedup_p50 and row.base != row.candidate:
            faster = Spread(float(row.speedup_p20), float(row.speedup_p50), float(row.speedup_p80))
            costs.append(Spread(1 / faster.p80, 1 / faster.p50, 1 / faster.p20))
    if not costs:
        return None
    return Spread(min(c.p20 for c in costs), spread([c.p50 for c in costs]).p50, max(c.p80 for c in costs))


def _verdict(a: Spread, b: Spread) -> tuple[str, float, float]:
    """What became of a cost, by which share, and the share that is noise."""
    noise = (a.p80 - a.p20) / 2 / a.p50 + (b.p80 - b.p20) / 2 / b.p50
    change = b.p50 / a.p50 - 1
    limit = max(LEAST, noise)
    return "slower" if change > limit else "faster" if change < -limit else "same", change, noise


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Every key that both sides measured, or that broke, with its verdict: slower, faster, same or broken."""
    # Hardware and threads stay in the key: times of different machines are not compared.
    sides: list[dict[tuple[str, ...], list[Row]]] = [defaultdict(list), defaultdict(list)]
    for side, rows in zip(sides, (before, after), strict=True):
        for row in rows:
            # A broken candidate has one row, whatever its phase; it stands for all of them.
            side[row.key].append(row)
    found = []
    broken = {_without_phase(r): r.status for rows in sides[1].values() for r in rows if r.status != "ok"}
    for key, old in sides[0].items():
        a = _pooled(old, relative=False)
        if a is None:
            continue
        status = broken.get(_without_phase(old[0]))
        if status:
            found.append(Change(key, "broken", 0, 0, status))
            continue
        new = sides[1].get(key, [])
        b = _pooled(new, relative=False)
        if b is None:
            continue
        verdict, change, noise = _verdict(a, b)
        a, b = _pooled(old, relative=True), _pooled(new, relative=True)
        if a is not None and b is not None:
            beside, change, noise = _verdict(a, b)
            verdict = verdict if verdict == beside else "same"
        served = old[-1].backend, new[-1].backend
        reason = "" if served[0] == served[1] else f"served by {served[0]}, then by {served[1]}"
        found.append(Change(key, verdict, change, noise, reason))
    return found


def _without_phase(row: Row) -> tuple[str, ...]:
    return row.command, row.model, row.case, row.candidate, row.dtype, row.batch, row.device


def read(name: str) -> list[Row] | None:
    """The newest rows of a file or folder with earlier runs of the same code, None where ``name`` is neither."""
    path = Path(name)
    if not path.exists():
        return None
    rows = results.load_all(path) if path.is_dir() else results.load(path)
    runs = results.repeats(rows)
    return [r for newest in results.latest(rows) for r in (runs[newest.key] if newest.p50 else [newest])]


# --- two commits ------------------------------------------------------------------------------------------


def _run(*command: str, cwd: Path = results.ROOT, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()[-1000:]}")


def resolve(name: str) -> str | None:
    """The short hash of a commit, None where ``name`` is none."""
    command = ("git", "rev-parse", "--verify", "--quiet", "--short=10", f"{name}^{{commit}}")
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def install(commit: str, folder: Path) -> Path:
    """Build and install one commit's package into a folder of its own; returns what PYTHONPATH needs.

    Raises RuntimeError where the build fails: a side without compiled kernels would be another comparison.
    """
    tree, site = folder / "tree", folder / "site"
    # ninja lies beside Python, in environments that are not activated too.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {"FUSED_PREACT_BUILD_EXT": "1", **os.environ, "PATH": path}
    _run("git", "worktree", "add", "--detach", str(tree), commit)
    try:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
        _run(*pip, "--target", str(site), str(tree), env=env)
    finally:
        _run("git", "worktree", "remove", "--force", str(tree))
    return site


def measure_commits(commits: list[str], bench: list[str], turns: int) -> list[list[Row]]:
    """Each commit's rows of ``python -m benchmarks BENCH``, the commits in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        harness = folder / "harness"
        harness.mkdir()
        # The same benchmarks for both, without this checkout's package beside them.
        (harness / "benchmarks").symlink_to(Path(__file__).parent)
        sites = []
        sides: list[list[Row]] = [[] for _ in commits]
        for index, commit in enumerate(commits):
            print(f"installing {commit}", flush=True)
            (folder / str(index)).mkdir()
            sites.append(install(commit, folder / str(index)))
        for turn in range(turns):
            # Back and forth, so that a machine that warms up favours neither.
            for index, commit in list(enumerate(commits))[:: -1 if turn % 2 else 1]:
                print(f"turn {turn + 1} of {turns}: {commit}", flush=True)
                path = os.pathsep.join([str(sites[index]), str(harness)])
                env = {**os.environ, "PYTHONPATH": path, "FUSED_PREACT_BENCH_COMMIT": commit}
                out = folder / str(index) / f"results-{turn}"
                command = [sys.executable, "-m", "benchmarks", *bench, "--results", str(out)]
                done = subprocess.run(command, cwd=harness, env=env, capture_output=True, text=True)
                rows = results.load_all(out)
                # 1 says that a result was refused: those rows are there, and count as broken.
                if done.returncode not in (0, 1) or not rows:
                    raise RuntimeError(f"{commit}: {done.stderr.strip()[-1000:]}")
                for status in dict.fromkeys(r.status for r in rows if r.status != "ok"):
                    print(f"{commit}: {status}", flush=True)
                sides[index] += rows
        return sides


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks compare``; exit status 1 where one of our own rows is slower or broken."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", help="results file, folder of them, or commit")
    parser.add_argument("after", help="the same kind")
    parser.add_argument(
        "--bench", default="op --model cifar_preact_resnet164 --limit 4 --minutes 1 --peers fused"
    )
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each commit is measured")
    parser.add_argument("--all", action="store_true", help="also list what stayed the same")
    args = parser.parse_args(argv)
    before, after = read(args.before), read(args.after)
    if before is None and after is None:
        commits = {name: resolve(name) for name in (args.before, args.after)}
        for name, commit in commits.items():
            if commit is None:
                parser.error(f"{name!r}: no such file, folder or commit")
        if args.turns < 1:
            parser.error(f"--turns: got {args.turns}, allowed are 1 and more")
        wanted = [c for c in (commits[args.before], commits[args.after]) if c]
        before, after = measure_commits(wanted, shlex.split(args.bench), args.turns)
    if before is None or after is None:
        missing = args.before if before is None else args.after
        parser.error(f"{missing!r}: no such file or folder, allowed are two results or two commits")
    found = changes(before, after)
    for change in sorted(found, key=lambda c: -c.change):
        if args.all or change.verdict != "same":
            what = " ".join(part for part in change.key[1:7] if part)
            print(
                f"{change.verdict:7} {100 * change.change:+7.1f} % (noise {100 * change.noise:.1f} %)  {what}"
            )
            if change.reason:
                print(f"        {change.reason}")
    counts = {v: sum(c.verdict == v for c in found) for v in ("slower", "faster", "broken", "same")}
    print(", ".join(f"{n} {v}" for v, n in counts.items()))
    if not found:
        print("nothing in common: same command, network, batch, dtype, hardware, threads and allocator")
        return 2
    ours = [c for c in found if c.key[3].startswith("fused")]
    return int(any(c.verdict in ("slower", "broken") for c in ours))
