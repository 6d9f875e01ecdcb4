"""Checkpoints that a kill cannot damage, and the exact state a run needs to go on."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from .config import Config
from .data import DataSet, check_card
from .log import COLUMNS, Row
from .loop import Trainer, build_model, build_optimizer

FORMAT = 2
SETTINGS = {
    "params",
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
}  # of an SGD's group of parameters
KEYS = {
    "format",
    "model",
    "num_classes",
    "data",
    "data_card",
    "epoch",
    "state",
    "optimizer",
    "scaler",
    "rng",
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


def check_writable(folder: Path) -> None:
    """Make ``folder`` and a nameless file in it: OSError now rather than at the first checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))  # a full disk still takes names


def pack(trainer: Trainer, epoch: int, metrics: list[dict[str, float]]) -> dict[str, Any]:
    """Everything to go on after ``epoch`` finished epochs. The schedule is a function of time and has no state."""
    cuda = torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None
    return {
        "format": FORMAT,
        "model": trainer.recipe.model,
        "num_classes": trainer.data.num_classes,
        "data": trainer.data.name,
        "data_card": trainer.data.card(),
        "epoch": epoch,
        "state": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        "metrics": metrics,
        "best_accuracy": max((row["test_acc"] for row in metrics), default=0.0),
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
    if not _same(payload["format"], FORMAT):
        raise ValueError(
            f"checkpoint {str(file)!r}: format={_short(payload['format'])}, this version reads {FORMAT}"
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


def check(payload: Mapping[str, Any], config: Config, data: DataSet, model: nn.Module | None = None) -> None:
    """ValueError unless ``payload`` is the state of a run of ``config`` on ``data``, complete and in every shape.

    Whatever passes is taken by ``restore`` and by the run that goes on from it. ``model`` is the one that will be
    restored; without it one is made of shapes alone.
    """
    if len(config.recipe.mean) not in (1, data.in_channels):
        raise ValueError(
            f"checkpoint has mean={config.recipe.mean} for images of {data.in_channels} channels"
        )
    ours = {"model": config.recipe.model, "num_classes": data.num_classes, "data": data.name}
    for name, expected in ours.items():
        if not _same(payload[name], expected):
            raise ValueError(
                f"checkpoint has {name}={_short(payload[name])}, this run has {name}={expected!r}"
            )
    check_card(payload["data_card"], data)
    if model is None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_model(config, data, fused=config.fused)
    _check_tensors("state", payload["state"], model.state_dict())
    _check_optimizer(payload["optimizer"], build_optimizer(model, config.recipe))
    scaler = payload["scaler"]
    allowed = torch.amp.GradScaler("cpu").state_dict()
    if not isinstance(scaler, dict) or (scaler and set(scaler) != set(allowed)):
        raise ValueError(f"checkpoint has scaler={_short(scaler)}, allowed: none or {', '.join(allowed)}")
    for name, value in scaler.items():
        kind = type(allowed[name])
        if type(value) is not kind or (kind is int and not 0 <= value < 2**31):
            raise ValueError(f"checkpoint has scaler {name}={_short(value)}, allowed: {kind.__name__}")
    _check_random_streams(payload["rng"], config.device)
    _check_metrics(payload["epoch"], payload["metrics"])


def _check_tensors(what: str, found: object, expected: Mapping[str, Tensor]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint has {what}={_short(found)}, allowed: a dict of tensors")
    for name in expected:
        if name not in found:
            raise ValueError(f"checkpoint lacks {what} {name}, which this run's model has")
    for name, value in found.items():
        if name not in expected:
            raise ValueError(f"checkpoint has {what} {_short(name)}, which this run's model has not")
        _check_tensor(f"{what} {name}", value, expected[name])


def _check_tensor(what: str, found: object, like: Tensor) -> None:
    expected = f"{like.dtype} {list(like.shape)}"
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        raise ValueError(f"checkpoint has {what}={_short(found)}, allowed: {expected}")
    if found.dtype != like.dtype or found.shape != like.shape:
        raise ValueError(
            f"checkpoint has {what} of {found.dtype} {list(found.shape)}, this run has {expected}"
        )


def _check_optimizer(found: object, expected: torch.optim.Optimizer) -> None:
    """The settings of ``expected``, at any rate, and for each parameter a momentum of its shape, or none yet."""
    parts = found if isinstance(found, dict) else {}
    state, groups = parts.get("state"), parts.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        raise ValueError(
            f"checkpoint has optimizer={_short(found)}, allowed: state and param_groups of an SGD"
        )
    ours = expected.state_dict()["param_groups"]
    if len(groups) != len(ours) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"checkpoint has {len(groups)} optimizer groups, this run has {len(ours)}")
    for group, our in zip(groups, ours, strict=True):
        for name, value in our.items():
            # Another version of torch may know less of its own switches: they then have their defaults.
            kept = group.get(name, None if name in SETTINGS else value)
            if not (_is_number(kept) if name == "lr" else _same(kept, value)):
                raise ValueError(
                    f"checkpoint has optimizer {name}={_short(kept)}, this run has {_short(value)}"
                )
    parameters = [parameter for group in expected.param_groups for parameter in group["params"]]
    for number, entry in state.items():
        known = type(number) is int and 0 <= number < len(parameters)
        if not known or not isinstance(entry, dict) or set(entry) - {"momentum_buffer"}:
            raise ValueError(f"checkpoint has optimizer state {_short(number)}={_short(entry)}")
        if entry.get("momentum_buffer") is not None:
            _check_tensor(f"momentum_buffer {number}", entry["momentum_buffer"], parameters[number])


def _check_random_streams(found: object, device: str) -> None:
    streams = found if isinstance(found, dict) else {}
    places = {"torch": "cpu"}
    if device.startswith("cuda") and streams.get("cuda") is not None:  # None: the run began on a CPU
        places["cuda"] = device
    for name, place in places.items():
        try:
            torch.Generator(place).set_state(cast(Tensor, streams.get(name)))
        except (TypeError, RuntimeError) as error:
            state = _short(streams.get(name))
            raise ValueError(f"checkpoint has rng {name}={state}, allowed: a generator's state") from error


def _check_metrics(epoch: object, found: object) -> None:
    if not isinstance(found, list) or type(epoch) is not int or len(found) != epoch:
        raise ValueError(f"checkpoint has epoch={_short(epoch)}, metrics={_short(found)}: one row an epoch")
    for row in found:
        if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in COLUMNS):
            raise ValueError(
                f"checkpoint has metrics {_short(row)}, allowed: numbers for {', '.join(COLUMNS)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _same(found: object, expected: object) -> bool:
    return type(found) is type(expected) and found == expected


def _short(value: object) -> str:
    """What came, on one line: a tensor's numbers would fill the screen."""
    text = (
        f"{type(value).__name__}"
        if isinstance(value, Tensor | dict | list)
        else " ".join(repr(value).split())
    )
    return text if len(text) <= 60 else text[:57] + "..."


def restore(trainer: Trainer, payload: dict[str, Any]) -> None:
    """Put ``trainer`` where ``pack`` found it, weights, momentum, loss scale and random streams."""
    check(payload, trainer.config, trainer.data, trainer.model)
    trainer.model.load_state_dict(payload["state"])
    trainer.optimizer.load_state_dict(payload["optimizer"])
    if payload["scaler"]:  # empty where no loss scale was in use
        trainer.scaler.load_state_dict(payload["scaler"])
    torch.set_rng_state(payload["rng"]["torch"])
    if trainer.device.type == "cuda" and payload["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(payload["rng"]["cuda"], trainer.device)


def keep_best(path: Path, rows: Sequence[Row], payload: dict[str, Any]) -> float:
    """The test accuracy of the best epoch in ``path``, which a resumed run goes on to beat.

    A kill between the two files of an epoch leaves ``path`` behind, or missing. It may also be damaged, or of epochs
    that this run goes back behind. ``payload``, what the run resumes from, takes its place where it is better.
    """
    best = -1.0
    try:
        found = load(path)
        history = [(row["test_acc"], row["train_loss"]) for row in found["metrics"]]
        if history and history == [(row["test_acc"], row["train_loss"]) for row in rows[: len(history)]]:
            best = history[-1][0]
    except (OSError, ValueError, KeyError, TypeError):  # worth as much as none
        pass
    if rows and rows[-1]["test_acc"] > best:
        save(path, payload)
        best = rows[-1]["test_acc"]
    return best
