"""Checkpoints that a kill cannot damage, and the exact state a run needs to go on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .loop import Trainer

FORMAT = 1
KEYS = {
    "format",
    "model",
    "num_classes",
    "data",
    "epoch",
    "state",
    "optimizer",
    "scaler",
    "rng",
    "metrics",
    "config",
}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a neighbour and rename it over ``path``: a reader, or a run after a kill, sees old or new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so a killed run leaves at most one behind
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # without it the rename may reach the disk before the bytes
    os.replace(temporary, path)


def pack(trainer: Trainer, epoch: int, metrics: list[dict[str, float]]) -> dict[str, Any]:
    """Everything to go on after ``epoch`` finished epochs. The schedule is a function of time and has no state."""
    cuda = torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None
    return {
        "format": FORMAT,
        "model": trainer.recipe.model,
        "num_classes": trainer.data.num_classes,
        "data": trainer.data.name,
        "epoch": epoch,
        "state": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "data": trainer.batches.generator.get_state()},
        "metrics": metrics,
        "best_accuracy": max((row["test_acc"] for row in metrics), default=0.0),
        "last_accuracy": metrics[-1]["test_acc"] if metrics else 0.0,
        "config": trainer.config.to_dict(),
    }


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` so that ``path`` always holds a whole checkpoint."""
    write_atomically(path, lambda file: torch.save(payload, file))


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, or ``last.pt`` of a run's folder, onto the CPU; nothing in it is executed."""
    path = Path(path)
    file = path / "last.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint {str(path)!r}: no such file, nor a run's folder with last.pt in it"
        )
    with open(file, "rb") as stream:
        try:
            payload = torch.load(stream, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
            size = file.stat().st_size
            raise ValueError(
                f"checkpoint {str(file)!r}: {size} bytes that are truncated or no checkpoint"
            ) from error
    missing = sorted(KEYS - set(payload if isinstance(payload, dict) else ()))
    if missing:
        raise ValueError(f"checkpoint {str(file)!r}: not of fused_preact.train, lacks {', '.join(missing)}")
    if payload["format"] != FORMAT:
        raise ValueError(f"checkpoint {str(file)!r}: format={payload['format']}, this version reads {FORMAT}")
    return payload


def check(payload: dict[str, Any], *, model: str, num_classes: int, data: str) -> None:
    """Refuse a checkpoint of another model or another task."""
    for name, expected in (("model", model), ("num_classes", num_classes), ("data", data)):
        if payload[name] != expected:
            raise ValueError(f"checkpoint has {name}={payload[name]!r}, this run has {name}={expected!r}")


def restore(trainer: Trainer, payload: dict[str, Any]) -> None:
    """Put ``trainer`` where ``pack`` found it, weights, momentum, loss scale and random streams."""
    check(
        payload,
        model=trainer.recipe.model,
        num_classes=trainer.data.num_classes,
        data=trainer.data.name,
    )
    trainer.model.load_state_dict(payload["state"])
    trainer.optimizer.load_state_dict(payload["optimizer"])
    if payload["scaler"]:  # empty where no loss scale was in use
        trainer.scaler.load_state_dict(payload["scaler"])
    torch.set_rng_state(payload["rng"]["torch"])
    if trainer.device.type == "cuda" and payload["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(payload["rng"]["cuda"], trainer.device)
    trainer.batches.generator.set_state(payload["rng"]["data"])
