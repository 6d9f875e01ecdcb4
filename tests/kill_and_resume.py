"""Kill a run again and again, at random moments, and resume it each time: its end must be that of a run left alone.

``python tests/kill_and_resume.py --trials 100`` does so for a while, a test of test_train_resume.py once. Children
are forked once everything is loaded, so that a moment is one of training and not of importing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from fused_preact.train import checkpoint, cli, prepare  # noqa: F401 (loaded before the first fork)
from fused_preact.train.config import Config
from fused_preact.train.data import load_for
from fused_preact.train.log import TIMINGS
from fused_preact.train.loop import Trainer
from fused_preact.train.recipes import RECIPES
from fused_preact.train.report import learning_curve

RUN = ["--epochs", "3", "--limit-train", "129", "--limit-test", "50", "--device", "cpu", "--batch-size", "32"]
ALWAYS = ["--checkpoint-minutes", "0.0001", "--keep", "2"]


def load_everything() -> None:
    """What a run loads on its way, but no backward pass: autograd's threads would not survive the fork."""
    torch.set_num_threads(1)
    config = Config("digits", RECIPES["digits"], limit_test=64)
    Trainer(config, load_for(config), fused=True).evaluate()
    learning_curve([], "")


def child(flags: list[str]) -> int:
    """The command line in a process of its own; returns its id."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        os._exit(cli.main(flags))
    return process


def wait(process: int, seconds: float) -> int | None:
    """The status, or None while it runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def until_written(process: int, file: Path) -> int | None:
    """Wait until ``file`` is a new one; the status if the process ends before."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    while not file.exists() or file.stat().st_mtime_ns == before:
        status = wait(process, 0.001)
        if status is not None:
            return status
    return None


def broken_run(
    out: Path, flags: list[str], kills: int, chance: random.Random, longest: float
) -> list[tuple[int, int]]:
    """Run ``flags`` into ``out`` with up to ``kills`` kills; where (epoch, step) the checkpoint was after each."""
    places = []
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM) * kills:
        resumed = (out / "last.pt").exists()
        process = child([*(["--resume", str(out)] if resumed else [*flags, "--out", str(out)]), *ALWAYS])
        # Most of the moments are counted from the first checkpoint of this process, or none would come far.
        status = until_written(process, out / "last.pt") if chance.random() < 0.8 else None
        if status is None:
            status = wait(process, chance.uniform(0, longest))
        if status is not None:
            assert status == 0, status
            break
        os.kill(process, number)
        status = wait(process, 60)
        assert status in ((-number, 0) if number == signal.SIGKILL else (-number, 143, 0)), status
        if (out / "last.pt").exists():
            payload = checkpoint.load(out)
            places.append((payload["epoch"], payload["step"]))
        if len(places) >= kills:
            break
    status = wait(
        child(["--resume", str(out), *ALWAYS] if places else [*flags, "--out", str(out), *ALWAYS]), 120
    )
    assert status == 0, status
    return places


def differences(one: Path, other: Path) -> list[str]:
    """What differs in last.pt and best.pt of two finished runs, timings apart."""
    found = []
    for file in ("last.pt", "best.pt"):
        a, b = checkpoint.load(one / file), checkpoint.load(other / file)
        for part in ("state", "ema"):
            for name in a[part] or ():
                if not torch.equal(a[part][name], b[part][name]):
                    found.append(f"{file}: {part} {name}")
        for number, entry in a["optimizer"]["state"].items():
            if not torch.equal(entry["momentum_buffer"], b["optimizer"]["state"][number]["momentum_buffer"]):
                found.append(f"{file}: momentum {number}")
        rows = [[{k: v for k, v in row.items() if k not in TIMINGS} for row in x["metrics"]] for x in (a, b)]
        if rows[0] != rows[1] or a["epoch"] != b["epoch"] or a["scaler"] != b["scaler"]:
            found.append(f"{file}: metrics, epoch or scale")
    return found


def trial(folder: Path, seed: int, kills: int, flags: list[str]) -> list[tuple[int, int]]:
    """One run left alone and one killed ``kills`` times; raises AssertionError where their ends differ."""
    begin = time.monotonic()
    assert wait(child([*flags, "--out", str(folder / "alone")]), 300) == 0
    longest = 0.3 * (time.monotonic() - begin)
    places = broken_run(folder / "broken", flags, kills, random.Random(seed), longest)
    found = differences(folder / "alone", folder / "broken")
    assert not found, found
    return places


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="more flags of the run, after --")
    given = parser.parse_args()
    load_everything()
    for number in range(given.seed, given.seed + given.trials):
        with tempfile.TemporaryDirectory() as name:
            print(f"trial {number}:", trial(Path(name), number, given.kills, RUN + given.flags), flush=True)
    sys.exit(0)
