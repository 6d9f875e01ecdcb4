"""A whole run: epochs, checkpoints, metrics, and the fused model beside the plain one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fused_preact

from . import checkpoint
from .config import Config
from .data import Batches, DataSet
from .log import Log, Row, metrics_csv
from .loop import Trainer
from .measure import PeakMemory, compare_steps, saved_bytes
from .report import MIB, Result, learning_curve, summary


def free_folder(config: Config, root: Path = Path("runs")) -> Path:
    """A folder for a new run that no earlier run has used."""
    name = f"{config.data}-{config.recipe.model}-seed{config.seed}"
    out, number = root / name, 2
    while out.exists():
        out, number = root / f"{name}-{number}", number + 1
    return out


def plain_folder(out: Path) -> Path:
    """Where the plain model's files are in a run that compares."""
    return out / "plain"


def set_up_torch(config: Config) -> None:
    """Process-wide switches: reproducible, or as fast as cuDNN finds by trying."""
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        torch.use_deterministic_algorithms(True)


def serving_backend(config: Config) -> str:
    """The kernels that serve this run's activations; RuntimeError where those asked for cannot."""
    with fused_preact.backend(config.backend):
        activation = torch.empty(0, device=config.device, dtype=getattr(torch, config.dtype))
        return fused_preact.serving_backend(activation)


def fit(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    resume: dict[str, Any] | None = None,
    recalibrate: bool = False,
) -> Result:
    """Train one model in folder ``out``, from the start or on from checkpoint ``resume``.

    After each epoch ``out`` holds last.pt, best.pt and metrics.csv, each replaced as a whole.
    Raises FloatingPointError when the loss is no longer finite, and OSError when a file cannot be written; last.pt is
    then the epoch before. Raises ValueError for a checkpoint of another run.
    """
    recipe, name = config.recipe, "fused" if config.fused else "plain"
    memory = PeakMemory(torch.device(config.device))
    trainer = Trainer(config, data, fused=config.fused)
    rows: list[Row] = []
    best = -1.0  # test accuracy of the epoch in best.pt
    if resume is not None:
        checkpoint.restore(trainer, resume)
        rows = [dict(row) for row in resume["metrics"]]
        best = checkpoint.keep_best(out / "best.pt", rows, resume)
    settings = (json.dumps(config.to_dict(), indent=2) + "\n").encode()
    checkpoint.write_atomically(out / "config.json", lambda file: file.write(settings))
    log = Log(recipe.epochs, name)
    for epoch in range(len(rows), recipe.epochs):
        train = trainer.train_epoch(epoch, log)
        if not math.isfinite(train.loss):
            raise FloatingPointError(
                f"the training loss became {train.loss} in epoch {epoch + 1}; try a smaller --lr "
                f"(now {recipe.lr}), --warmup-epochs or another --dtype (now {config.dtype})"
            )
        test = trainer.evaluate()
        row: Row = {
            "epoch": epoch + 1,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "train_loss": train.loss,
            "train_acc": train.accuracy,
            "test_loss": test.loss,
            "test_acc": test.accuracy,
            "images_per_s": train.images_per_s,
            "train_seconds": train.seconds,
            "peak_memory_mib": memory.read() / MIB,
        }
        rows.append(row)
        payload = checkpoint.pack(trainer, epoch + 1, rows)
        checkpoint.save(out / "last.pt", payload)
        if test.accuracy > best:
            checkpoint.save(out / "best.pt", payload)
            best = test.accuracy
        checkpoint.write_atomically(out / "metrics.csv", lambda file: file.write(metrics_csv(rows)))
        log.epoch(row)
    # A run killed between its two files, or resumed when complete, gets its metrics from the checkpoint.
    checkpoint.write_atomically(out / "metrics.csv", lambda file: file.write(metrics_csv(rows)))
    recalibrated = None
    if recalibrate:
        trainer.recalibrate()
        recalibrated = trainer.evaluate().accuracy
        checkpoint.save(out / "recalibrated.pt", checkpoint.pack(trainer, recipe.epochs, rows))
    return Result(name, rows, memory.what, recalibrated)


def run(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    resume: dict[str, Any] | None = None,
    resume_plain: dict[str, Any] | None = None,
    compare: bool = False,
    recalibrate: bool = False,
) -> list[Result]:
    """``fit``, and with ``compare`` the plain model too; draws the curves and prints the closing table.

    ``resume_plain`` is the checkpoint from which the plain model goes on.
    """
    log, recipe = Log(), config.recipe
    kernels = f"fused kernels: {serving_backend(config)}" if config.fused else "plain PyTorch"
    images, every = Batches(data.train, recipe, config.seed).images, len(data.train)
    title = (
        f"{recipe.model} on {data.name}, {recipe.epochs} epochs of {images} images"
        f"{'' if images == every else f' (of {every}: one would be left over)'}, batch "
        f"{recipe.batch_size}, seed {config.seed}, {config.dtype} on {config.device}, {kernels}"
    )
    log.line(f"{title}; {len(data.test)} test images, files in {out}")
    results = [fit(config, data, out, resume=resume, recalibrate=recalibrate)]
    steps = None
    if compare:
        plain, folder = replace(config, fused=False), plain_folder(out)
        if recipe.compare_accuracy:
            results.append(fit(plain, data, folder, resume=resume_plain, recalibrate=recalibrate))
        log.line("timing training steps of the fused and the plain model in turns")
        steps = compare_steps(config, data)
    picture = learning_curve(results, f"{recipe.model} on {data.name}")
    if picture is not None:
        checkpoint.write_atomically(out / "learning_curve.png", lambda file: file.write(picture))
    else:
        log.line("no learning_curve.png: matplotlib is not installed (pip install 'fused_preact[train]')")
    log.line(f"\n{title}\n")
    models = ("fused", "plain") if compare else (results[0].name,)
    saved = {name: saved_bytes(Trainer(config, data, fused=name == "fused")) for name in models}
    log.line(summary(results, saved, steps))
    return results
