"""Everything that needs a GPU, in one command: the most valuable figures first, each kept as soon as it is there.

Every stage is a process of its own with a time limit, so that one that hangs or crashes costs itself alone. Run the
command again and it goes on with the stages that this commit has not finished on this hardware, and the tuner with
the convolutions that its table does not have. Tables and every trial with its prediction go to the folder ``tuned``
of the results; the stages after the tuning read them.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import options, results
from .options import Setting
from .results import Row

UNFINISHED = 3
"""The tuner's exit status where its time was up before it was through."""
IMAGENET, CIFAR, SMALL = "preact_resnet50", "cifar_preact_resnet164", "cifar_preact_resnet20"


class Stage(NamedTuple):
    """One process: the arguments of a command, and the most seconds it may take."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    parallel: int = 1
    """How many processes share its cases: checking is mostly compiling, which one core does at a time."""
    module: str = "benchmarks"


def stages() -> list[Stage]:
    """In order of value; the seconds are for an H100 with 16 cores and add up to about 8 minutes."""

    def check(model: str, dtype: str, seconds: float) -> Stage:
        # 16 images: a multiple of 16 as the real batch is, so that the same specialisation of the kernels is checked.
        arguments = ("op", "--check", "16", "--model", model, "--dtype", dtype, "--peers", "fused")
        return Stage(f"correct {model} {dtype}", seconds, arguments, parallel=8)

    def step(name: str, model: str, seconds: float, *peers: str) -> Stage:
        arguments = ("step", "--model", model, "--peers", "fused", *peers)
        return Stage(name, seconds, (*arguments, "--minutes", f"{seconds / 120:.2f}"))

    def tune(name: str, model: str, batch: int, seconds: float) -> Stage:
        # The process starts and compiles before it measures; it stops by itself. About 800 kernels at 8 candidates.
        arguments = ("--model", model, "--batch", str(batch), "--dtype", "bf16", "--candidates", "8")
        minutes = f"{seconds / 80:.2f}"
        return Stage(name, seconds, (*arguments, "--minutes", minutes), module="fused_preact.tune")

    return [
        check(IMAGENET, "bf16", 75),
        step("step 50", IMAGENET, 40, "bare"),
        tune("tune 50", IMAGENET, 256, 120),
        step("step 50 compile", IMAGENET, 110, "compile"),
        Stage("op 50", 60, ("op", "--model", IMAGENET, "--peers", "fused", "--minutes", "0.5")),
        Stage("infer 50", 60, ("infer", "--model", IMAGENET, "--minutes", "0.3")),
        check(CIFAR, "bf16", 60),
        tune("tune 164", CIFAR, 128, 75),
        step("step 164", CIFAR, 45, "bare"),
        check(IMAGENET, "fp32", 60),
        check(CIFAR, "fp32", 60),
        Stage("op 164", 60, ("op", "--model", CIFAR, "--peers", "fused", "--minutes", "0.5")),
        Stage("overhead", 30, ("overhead", "--peers", "fused", "--minutes", "0.2")),
        Stage("memory 50", 60, ("memory", "--model", IMAGENET, "--peers", "eager", "--budget", "80")),
        step("step 164 compile", CIFAR, 240, "compile"),
        step("step 50 max-autotune", IMAGENET, 300, "compile", "max-autotune"),
    ]


def quick(stage: Stage) -> Stage:
    """The same stage at a size that a CPU runs in seconds, without compilers."""
    if stage.module != "benchmarks":
        return stage._replace(arguments=("--model", SMALL, "--batch", "2", "--list"))
    arguments = [
        SMALL if a in (IMAGENET, CIFAR) else a for a in stage.arguments if a not in ("compile", "16")
    ]
    if "--check" in arguments:
        arguments.insert(arguments.index("--check") + 1, "2")
    if stage.arguments[0] != "overhead":
        arguments += ["--batch", "2"]
    if stage.arguments[0] == "infer":
        arguments += ["--peers", "fused"]
    if stage.arguments[0] == "op":
        arguments += ["--limit", "2"]
    return Stage(stage.name, 120, (*arguments, "--minutes", "0.01"), min(stage.parallel, 2))


def finished(setting: Setting) -> set[str]:
    """The stages that this commit has behind it on this hardware."""
    rows = results.load(setting.folder / "gpu.csv")
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


def _tables(setting: Setting) -> Path:
    return setting.folder.resolve() / "tuned"


def _execute(command: list[str], seconds: float, setting: Setting) -> str:
    """Run one process; "ok", "UNFINISHED ..." or "ERROR ..."."""
    environment = {**os.environ, "FUSED_PREACT_CACHE": str(_tables(setting))}
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


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks gpu``; exit status 1 where a stage failed, 0 also where the time ran out."""
    parser = options.parser("gpu", __doc__, models=(), minutes=8)
    parser.set_defaults(device="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows on a CPU that the command works"
    )
    parser.add_argument("--only", nargs="+", help="stages by the start of their names")
    parser.add_argument("--again", action="store_true", help="also the stages that are finished")
    setting = options.parse(parser, argv)
    wanted = [s for s in stages() if not setting.extra.only or s.name.startswith(tuple(setting.extra.only))]
    if setting.extra.quick:
        wanted = [quick(stage) for stage in wanted]
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
    _compare_predictions(setting)
    setting.say("python -m benchmarks report writes docs/performance.md from these results")
    return status


def _compare_predictions(setting: Setting) -> None:
    """How well the cost model ordered what the tuner timed."""
    for path in sorted(_tables(setting).glob("*.trials.jsonl")):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        # Imported here: it needs Triton, and only a tuned GPU has trials.
        lines = importlib.import_module(f"{__package__}.cost").agreement(found)
        setting.say("\n".join([f"predicted and measured, {path.name}:", *lines]))
