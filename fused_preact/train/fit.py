"""One model from its first epoch, or from a checkpoint, to its last; every file of its folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from . import checkpoint, signals, weights
from .config import Config
from .data import DataSet
from .log import Log, Row, TensorBoard, metrics_csv, metrics_jsonl
from .loop import EpochStats, Trainer
from .measure import PeakMemory
from .report import MIB, Result
from .world import World


@dataclass(frozen=True)
class Options:
    """What a run writes and shows, none of which changes its numbers."""

    checkpoint_minutes: float | None = None
    """last.pt is also written inside an epoch, this long after it was last; None: at the end of epochs only."""
    keep: int = 1
    """How many of the last checkpoints stay."""
    tensorboard: bool = False
    recalibrate: bool = False
    bn_images: int | None = None
    """Of how many training images, None for all, BN's statistics are then."""
    initial: Mapping[str, Tensor] | None = None
    """Weights to begin with in place of random ones."""
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint_minutes is not None and not 0 <= self.checkpoint_minutes < math.inf:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes}: must be finite and not negative")
        if self.bn_images is not None and self.bn_images < 2:  # BN cannot take the variance of one value
            raise ValueError(f"bn_images={self.bn_images}: must be at least 2")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: must be at least 1")


class _Run:
    """The trainer and the files of one run."""

    def __init__(self, trainer: Trainer, out: Path, options: Options, asked: Callable[[], int]) -> None:
        self.trainer, self.out, self.options, self.asked = trainer, out, options, asked
        self.world = trainer.world
        self.rows: list[Row] = []
        self.best = -1.0  # the score of the epoch in best.pt
        self._saved = time.monotonic()

    def resume(self, payload: dict[str, Any]) -> None:
        """Stand where ``payload`` does."""
        checkpoint.restore(self.trainer, payload)
        self.rows = [dict(row) for row in payload["metrics"]]
        if self.world.first:
            self.best = checkpoint.keep_best(self.out / "best.pt", self.rows, payload)

    def save(self) -> dict[str, Any]:
        """Write last.pt; every rank has to."""
        payload = checkpoint.pack(self.trainer, self.rows)
        if self.world.first:
            checkpoint.save(self.out / "last.pt", payload)
        self._saved = time.monotonic()
        return payload

    def pause(self) -> None:
        """Between two steps: write last.pt where it is time to, and where a signal came, end."""
        minutes = self.options.checkpoint_minutes
        due = self.world.first and minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        save, number = self.world.agree(due, self.asked())
        if number:
            self.stop(number)
        if save:
            self.save()

    def stop(self, number: int) -> NoReturn:
        """Write last.pt, and end as signal ``number`` asks for."""
        self.save()
        raise signals.Interrupted(number)

    def finish_epoch(self, row: Row) -> None:
        """The files of an epoch: last.pt, which is the truth, then what follows from it."""
        self.trainer.next_epoch()
        self.rows.append(row)
        payload = self.save()
        if self.world.first:
            checkpoint.keep_last(self.out, self.trainer.epoch, self.options.keep)
            if checkpoint.score(row) > self.best:
                checkpoint.save(self.out / "best.pt", payload)
                self.best = checkpoint.score(row)
            self.write_metrics()

    def write_metrics(self) -> None:
        """metrics.csv and metrics.jsonl, whole."""
        for name, text in (("metrics.csv", metrics_csv), ("metrics.jsonl", metrics_jsonl)):
            checkpoint.write_bytes(self.out / name, text(self.rows))


def fit(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    resume: dict[str, Any] | None = None,
    options: Options | None = None,
    world: World | None = None,
    name: str | None = None,
) -> Result:
    """Train one model in folder ``out``, from the start or on from checkpoint ``resume``.

    After each epoch ``out`` holds last.pt, best.pt, metrics.csv and metrics.jsonl, each replaced as a whole. A signal
    ends it between two steps with ``signals.Interrupted``; last.pt is then of that moment. Of several ranks the first
    writes. Raises FloatingPointError when the loss is no longer finite, and OSError when a file cannot be written;
    last.pt is then an earlier one. Raises ValueError for a checkpoint of another run.
    """
    options, world = options or Options(), world or World()
    recipe, name = config.recipe, name or ("fused" if config.fused else "plain")
    world.forget_votes()
    memory = PeakMemory(world.device(config.device))
    trainer = Trainer(config, data, fused=config.fused, world=world)
    log = Log(recipe.epochs, name, speak=world.first, quiet=options.quiet)
    with signals.deferred() as asked:
        run = _Run(trainer, out, options, asked)
        if resume is not None:
            run.resume(resume)
        elif options.initial is not None:
            weights.begin_from(trainer, options.initial, "initial checkpoint")
        board = None
        if world.first:
            settings = json.dumps(config.to_dict(), indent=2) + "\n"
            checkpoint.write_bytes(out / "config.json", settings.encode())
            board = TensorBoard(out / "tensorboard", len(run.rows)) if options.tensorboard else None
        if trainer.epoch < recipe.epochs:
            trainer.evaluate(batches=1)  # test images that cannot be read are found now, not after an epoch
        while trainer.epoch < recipe.epochs:
            row = _epoch(run, log, memory)
            run.finish_epoch(row)
            log.epoch(row)
            if board is not None:
                board.epoch(row)
        log.close()
        for note in sorted(set().union(*world.gather(data.notes()))):
            log.line(note)
        recalibrated = _recalibrate(run) if options.recalibrate else None
        if world.first:
            # A run killed between two files, or resumed when complete, gets its metrics from the checkpoint.
            run.write_metrics()
        if board is not None:
            board.close()
    return Result(name, run.rows, memory.what, recalibrated)


def _epoch(run: _Run, log: Log, memory: PeakMemory) -> Row:
    trainer = run.trainer
    train = trainer.train_epoch(log, run.pause)
    if not math.isfinite(train.loss):
        config = trainer.config
        raise FloatingPointError(
            f"the training loss became {train.loss} in epoch {trainer.epoch + 1}; try a smaller --lr "
            f"(now {config.recipe.lr}), --warmup-epochs or another --dtype (now {config.dtype})"
        )
    test = trainer.evaluate(run.pause)
    row: Row = {
        "epoch": trainer.epoch + 1,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "train_loss": train.loss,
        "train_acc": train.accuracy,
        "test_loss": test.loss,
        "test_acc": test.accuracy,
        "images_per_s": train.images_per_s,
        "train_seconds": train.seconds,
        "peak_memory_mib": memory.read() / MIB,
    }
    if trainer.data.num_classes > 10:
        row["test_top5"] = test.top5
    if trainer.ema is not None:
        with trainer.ema.in_place():
            averaged = trainer.evaluate()
        row |= {"ema_test_loss": averaged.loss, "ema_test_acc": averaged.accuracy}
    return row


def _recalibrate(run: _Run) -> float:
    run.trainer.recalibrate(run.options.bn_images)
    accuracy = run.trainer.evaluate().accuracy
    payload = checkpoint.pack(run.trainer, run.rows)
    if run.world.first:
        checkpoint.save(run.out / "recalibrated.pt", payload)
    return accuracy


def evaluate(
    config: Config, data: DataSet, payload: dict[str, Any], *, options: Options, world: World
) -> list[str]:
    """What a checkpoint scores on the test split, a line for the weights and one for their average."""
    trainer = Trainer(config, data, fused=config.fused, world=world)
    checkpoint.restore(trainer, payload)
    if options.recalibrate:
        trainer.recalibrate(options.bn_images)
    lines = [_told(trainer.evaluate(), data)]
    if trainer.ema is not None:
        with trainer.ema.in_place():
            lines.append(f"averaged weights: {_told(trainer.evaluate(), data)}")
    return lines + sorted(set().union(*world.gather(data.notes())))


def _told(stats: EpochStats, data: DataSet) -> str:
    five = f" (top 5 {stats.top5:.2f} %)" if data.num_classes > 10 else ""
    return (
        f"test accuracy {stats.accuracy:.2f} %{five}, loss {stats.loss:.4f}, {len(data.test)} images, "
        f"{stats.images_per_s:,.0f} img/s"
    )
