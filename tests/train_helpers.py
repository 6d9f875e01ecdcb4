"""What the tests of the training script share: a short run of a model that trains in no time."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from fused_preact.train.config import RECIPES, Config
from fused_preact.train.log import Log

CONFIG = Config("digits", replace(RECIPES["digits"].with_epochs(4), batch_size=32))


def tiny(name: str, *, num_classes: int, fused: bool, in_channels: int) -> nn.Module:
    """BN, dropout (the global random stream) and a conv, in a thousandth of the time of a ResNet."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(36, num_classes),
    )


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
