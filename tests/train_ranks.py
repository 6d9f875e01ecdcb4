"""One of two processes of tests/test_train_ranks.py: trains with the other, each run into a folder of its own."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import EXACT

from fused_preact.train import checkpoint, signals, world
from fused_preact.train.config import Config
from fused_preact.train.data import load_for
from fused_preact.train.fit import Options, fit
from fused_preact.train.loop import Trainer

TOGETHER = replace(EXACT, sync_bn=True)
RUNS: dict[str, Config] = {
    "together": TOGETHER,
    "sharded": replace(TOGETHER, fsdp=True),
    "in parts": replace(EXACT, grad_accum_steps=2, limit_train=72),  # all parts alike
}


def stop_one_rank(ranks: world.World, at: int) -> None:
    """SIGTERM to rank 1 in step ``at``: rank 0 has to hear of it from there."""
    plain, steps = Trainer.step, iter(range(1000))

    def step(self: Trainer, *args: Any) -> Any:
        if next(steps) == at and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    Trainer.step = step  # type: ignore[method-assign]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    ranks = world.join("cpu")
    assert ranks.size == 2
    data = load_for(EXACT)
    for name, config in RUNS.items():
        fit(config, load_for(config), root / name, world=ranks)
    # What one process began, two end.
    begun = checkpoint.load(root / "begun by one")
    fit(TOGETHER, data, root / "ended by two", world=ranks, resume=begun)
    stop_one_rank(ranks, at=4)
    with pytest.raises(signals.Interrupted) as caught, signals.handled():
        fit(TOGETHER, data, root / "stopped", world=ranks, options=Options(keep=3))
    assert caught.value.number == signal.SIGTERM
    stopped = checkpoint.load(root / "stopped")
    fit(TOGETHER, data, root / "went on", world=ranks, resume=ranks.broadcast(stopped))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
