"""Checkpoints that a kill cannot damage, and the exact state a run needs to go on."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .checks import check, same, short
from .log import Row
from .loop import Trainer
from .networks import like, whole

FORMAT = 2
KEYS = {
    "format",
    "model",
    "num_classes",
    "data",
    "data_card",
    "epoch",
    "step",
    "sums",
    "state",
    "ema",
    "optimizer",
    "scaler",
    "metrics",
    "config",
}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a neighbour and rename it over ``path``: a reader, or a run after a kill, sees old or new, whole.

    Raises OSError with the name of ``path`` and what the system said; then the neighbour is gone, ``path`` as before.
    """
    # One name, so a killed run leaves at most one behind.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # without it the rename may reach the disk before the bytes
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """``write_atomically`` of bytes."""
    write_atomically(path, lambda file: file.write(content))


def check_writable(folder: Path) -> None:
    """Make ``folder`` and a nameless file in it: OSError now rather than at the first checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))  # a full disk still takes names


def pack(trainer: Trainer, metrics: list[Row]) -> dict[str, Any]:
    """Everything to go on from where ``trainer`` is; every rank has to ask.

    The schedule, the batches and the random numbers are functions of that place and have no state.
    """
    place = trainer.step_in_epoch
    return {
        "format": FORMAT,
        "model": trainer.recipe.model,
        "num_classes": trainer.data.num_classes,
        "data": trainer.data.name,
        "data_card": trainer.data.card(),
        "epoch": trainer.epoch,
        "step": place,
        "sums": trainer.world.gather(trainer.sums.state()) if place else [],
        "state": whole(trainer.model.state_dict()),
        "ema": None if trainer.ema is None else whole(trainer.ema.averages),
        "optimizer": whole(trainer.optimizer.state_dict()),
        "scaler": trainer.scaler.state_dict(),
        "metrics": metrics,
        "best_accuracy": max((score(row) for row in metrics), default=0.0),
        "last_accuracy": metrics[-1]["test_acc"] if metrics else 0.0,
        "config": trainer.config.to_dict(),
    }


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` so that ``path`` always holds a whole checkpoint."""
    # In memory first: where a write to a file fails or is interrupted, torch's writer goes on to complain of a wrong
    # position, and that RuntimeError takes the place of the OSError or KeyboardInterrupt.
    content = io.BytesIO()
    torch.save(payload, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, or ``last.pt`` of a run's folder, onto the CPU; nothing in it is executed.

    Raises OSError, or ValueError for bytes that are no checkpoint or no longer the ones that were written.
    """
    path = Path(path)
    file = path / "last.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint {str(path)!r}: no such file, nor a run's folder with last.pt in it"
        )
    content = file.read_bytes()
    try:
        payload = torch.load(_verified(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"checkpoint {str(file)!r}: {len(content)} bytes that are truncated, damaged or no checkpoint"
        ) from error
    missing = sorted(KEYS - set(payload if isinstance(payload, dict) else ()))
    if missing:
        raise ValueError(f"checkpoint {str(file)!r}: not of fused_preact.train, lacks {', '.join(missing)}")
    if not same(payload["format"], FORMAT):
        raise ValueError(
            f"checkpoint {str(file)!r}: format={short(payload['format'])}, this version reads {FORMAT}"
        )
    return payload


def _verified(content: bytes) -> BinaryIO:
    """The records of a checkpoint's archive in a new one: ValueError unless each has the CRC32 written with it.

    ``torch.load`` looks at no CRC32, and damage to the directory, which has none, can make it read a record as empty.
    """
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(whole, "w") as new:
        records = old.infolist()
        # Torch stores: what unpacks to more than its own size is not ours.
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not stored or len({record.filename for record in records}) < len(records):
            raise ValueError("packed records, or two of a name")
        for record in records:
            new.writestr(record.filename, old.read(record))
    whole.seek(0)
    return whole


def restore(trainer: Trainer, payload: dict[str, Any]) -> None:
    """Put ``trainer`` where ``pack`` found it: weights, averages, momentum, loss scale and place."""
    check(payload, trainer.config, trainer.data, trainer.model)
    steps = len(trainer.batches)
    if payload["step"] > steps:
        raise ValueError(f"checkpoint has step={payload['step']}, an epoch of this run has {steps}")
    state = trainer.model.state_dict()
    trainer.model.load_state_dict(
        {name: like(value, state[name]) for name, value in payload["state"].items()}
    )
    if trainer.ema is not None:
        trainer.ema.load(payload["ema"])
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    momenta = {
        number: {
            name: None if value is None else like(value, parameters[number]) for name, value in entry.items()
        }
        for number, entry in payload["optimizer"]["state"].items()
    }
    trainer.optimizer.load_state_dict({**payload["optimizer"], "state": momenta})
    if payload["scaler"]:  # empty where no loss scale was in use
        trainer.scaler.load_state_dict(payload["scaler"])
    trainer.epoch, trainer.step_in_epoch = payload["epoch"], payload["step"]
    if payload["step"]:
        trainer.sums.load(payload["sums"], trainer.world)


def score(row: Row) -> float:
    """What makes an epoch the best: the test accuracy, of the averaged weights where they are kept."""
    return row.get("ema_test_acc", row["test_acc"])


def keep_last(folder: Path, epoch: int, keep: int) -> None:
    """Keep last.pt, just written after ``epoch`` epochs, as epoch-N.pt beside the ``keep - 1`` before it."""
    if keep < 2:
        return
    name = folder / f"epoch-{epoch:04d}.pt"
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(folder / "last.pt", temporary)  # the same bytes; last.pt is replaced, never written into
        os.replace(temporary, name)
    except OSError:  # a file system without links
        write_bytes(name, (folder / "last.pt").read_bytes())
    # Later ones are of a run that went back: they stay until this run has come as far.
    numbers = {int(path.stem[6:]): path for path in folder.glob("epoch-*.pt") if path.stem[6:].isdigit()}
    for number, path in numbers.items():
        if number <= epoch - keep:
            path.unlink(missing_ok=True)


def keep_best(path: Path, rows: Sequence[Row], payload: dict[str, Any]) -> float:
    """The test accuracy of the best epoch in ``path``, which a resumed run goes on to beat.

    A kill between the two files of an epoch leaves ``path`` behind, or missing. It may also be damaged, or of epochs
    that this run goes back behind. ``payload``, what the run resumes from, takes its place where it is better and
    of the end of an epoch.
    """
    best = -1.0
    try:
        found = load(path)
        history = [(score(row), row["train_loss"]) for row in found["metrics"]]
        if history and history == [(score(row), row["train_loss"]) for row in rows[: len(history)]]:
            best = history[-1][0]
    except (OSError, ValueError, KeyError, TypeError):  # worth as much as none
        pass
    if rows and payload["step"] == 0 and score(rows[-1]) > best:
        save(path, payload)
        best = score(rows[-1])
    return best
