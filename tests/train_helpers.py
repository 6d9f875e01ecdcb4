"""What the tests of the training script share: a short run of a model that trains in no time."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fused_preact
from fused_preact.train.config import Config
from fused_preact.train.log import Log
from fused_preact.train.recipes import RECIPES
from fused_preact.train.world import World

CONFIG = Config("digits", replace(RECIPES["digits"].with_epochs(4), batch_size=32))

# ResNet-20 in float64, where rounding shows nothing: steps of 32, 32 and 7 images, which two ranks share unequally.
EXACT = Config(
    "digits",
    replace(RECIPES["digits"].with_epochs(2), batch_size=32),
    dtype="float64",
    model_ema=True,
    limit_train=71,
    limit_test=45,
)


def tiny(name: str, *, num_classes: int, fused: bool, in_channels: int, **options: str) -> nn.Module:
    """BN, dropout (the global random stream) and a conv, in a thousandth of the time of a ResNet."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(36, num_classes),
    )


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    """A process of this interpreter and of the package that the tests import, wherever it runs."""
    root = str(Path(fused_preact.__file__).parents[1])
    path = os.pathsep.join([*options.pop("first", []), root])
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **options.pop("variables", {})},
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    )


def temporaries(out: Path) -> list[Path]:
    return sorted(out.rglob(".*.tmp"))


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def interrupt_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Log.epoch

    def epoch(self: Log, row: dict[str, float]) -> None:
        plain(self, row)
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "epoch", epoch)


def stop_at_look(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run looks for signals after each step and each batch of a test: the look number ``at`` sees SIGTERM."""
    plain, looks = World.agree, iter(range(10**6))

    def agree(self: World, save: bool, stop: int) -> tuple[bool, int]:
        return plain(self, save, signal.SIGTERM if next(looks) == at else stop)

    monkeypatch.setattr(World, "agree", agree)
