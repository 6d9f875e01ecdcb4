"""Commands that run many others: each a process of its own with a time limit, each kept as soon as it is there.

A stage that hangs or crashes costs itself alone. Run the command again and it goes on with the stages that this
commit has not finished on this hardware.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import results
from .options import Setting
from .results import Row

UNFINISHED = 3
"""The tuner's exit status where its time was up before it was through."""


class Stage(NamedTuple):
    """One process: the arguments of a command, and the most seconds it may take."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    parallel: int = 1
    """How many processes share its cases: checking is mostly compiling, which one core does at a time."""
    module: str = "benchmarks"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs stages."""
    parser.add_argument("--only", nargs="+", help="stages by the start of their names")
    parser.add_argument("--again", action="store_true", help="also the stages that are finished")


def chosen(stages: Sequence[Stage], setting: Setting) -> list[Stage]:
    """The stages that ``--only`` names, else all."""
    return [s for s in stages if not setting.extra.only or s.name.startswith(tuple(setting.extra.only))]


def finished(setting: Setting) -> set[str]:
    """The stages that this commit has behind it on this hardware."""
    rows = results.load(setting.folder / f"{setting.command}.csv")
    here = results.commit(), setting.device, results.hardware(setting.device)
    return {r.case for r in rows if r.status == "ok" and (r.commit, r.device, r.hardware) == here}


def _command(stage: Stage, index: int, setting: Setting) -> list[str]:
    command = [sys.executable, "-m", stage.module, *stage.arguments, "--device", setting.device]
    if stage.module != "benchmarks":
        return command
    # The slices of a stage write to files of their own: two writers of one file would lose rows.
    folder = setting.folder if stage.parallel == 1 else setting.folder / f"slice-{index}"
    command += ["--results", str(folder.resolve()), "--backend", setting.backend]
    if stage.parallel > 1:
        command += ["--slice", f"{index}/{stage.parallel}", "--threads", "1"]
    else:
        command += ["--threads", str(setting.threads)]
    return command


def tables(setting: Setting) -> Path:
    """Where the tuner keeps its tables and trials."""
    return setting.folder.resolve() / "tuned"


def _execute(command: list[str], seconds: float, setting: Setting) -> str:
    """Run one process; "ok", "UNFINISHED ..." or "ERROR ..."."""
    environment = {**os.environ, "FUSED_PREACT_CACHE": str(tables(setting))}
    try:
        done = subprocess.run(
            command,
            cwd=results.ROOT,
            env=environment,
            timeout=seconds,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        _show(error.stdout)
        _show(error.stderr)
        return f"ERROR not finished after {seconds:.0f} s"
    _show(done.stdout)
    if command[2] != "benchmarks":
        _show(done.stderr)  # the tuner's progress
    if done.returncode == 0:
        return "ok"
    if done.returncode == UNFINISHED and command[2] != "benchmarks":
        return "UNFINISHED: its time was up"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    refused = [line for line in done.stdout.splitlines() if "REFUSED" in line]
    return f"ERROR exit status {done.returncode}: {(refused or [last])[0][:200]}"


def _show(output: str | bytes | None) -> None:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    print(text, end="", flush=True)


def _gather(stage: Stage, setting: Setting) -> None:
    """Move the slices' rows into the shared files."""
    for index in range(stage.parallel):
        folder = setting.folder / f"slice-{index}"
        for path in sorted(folder.glob("*.csv")):
            results.append(setting.folder / path.name, results.load(path))
            path.unlink()
        if folder.exists():
            folder.rmdir()


def _run(stage: Stage, seconds: float, setting: Setting) -> Row:
    setting.say(f"--- {stage.name}: at most {seconds:.0f} s")
    begun = time.monotonic()
    with ThreadPoolExecutor(stage.parallel) as pool:
        commands = [_command(stage, index, setting) for index in range(stage.parallel)]
        outcomes = list(pool.map(lambda command: _execute(command, seconds, setting), commands))
    if stage.parallel > 1:
        _gather(stage, setting)
    row = setting.row("", 0, case=stage.name, candidate="stage", phase="wall")
    row.status = next((o for o in outcomes if o != "ok"), "ok")
    row.value, row.unit = results.number(time.monotonic() - begun), "s"
    return row


def run(wanted: Sequence[Stage], setting: Setting) -> int:
    """Run the stages that are not finished until the minutes are spent; 1 where one failed, else 0."""
    done = set() if setting.extra.again else finished(setting)
    left, status = [], 0
    for stage in wanted:
        if stage.name in done:
            setting.say(f"--- {stage.name}: finished before")
            continue
        remaining = setting.minutes * 60 - (time.monotonic() - setting.started)
        if remaining < 15:
            left.append(stage.name)
            continue
        # The limits are what a stage usually needs; the last ones may have what is left.
        row = _run(stage, min(remaining, stage.seconds * 1.5), setting)
        setting.finish([row])
        status |= int(row.status.startswith("ERROR"))
    if left:
        setting.say(f"not reached, run the command again: {', '.join(left)}")
    return status
