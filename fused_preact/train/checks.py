"""Whether a checkpoint's contents are those of this run, before anything of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .data import DataSet, check_card
from .log import columns
from .networks import build_model, build_optimizer

SETTINGS = {
    "params",
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
}  # of an SGD's group of parameters
SUMS = ("loss", "right", "seen", "timed", "seconds", "timed_seconds")


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
        if not same(payload[name], expected):
            raise ValueError(
                f"checkpoint has {name}={short(payload[name])}, this run has {name}={expected!r}"
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
        raise ValueError(f"checkpoint has scaler={short(scaler)}, allowed: none or {', '.join(allowed)}")
    for name, value in scaler.items():
        kind = type(allowed[name])
        if type(value) is not kind or (kind is int and not 0 <= value < 2**31):
            raise ValueError(f"checkpoint has scaler {name}={short(value)}, allowed: {kind.__name__}")
    parameters = dict(model.named_parameters())
    if config.model_ema:
        _check_tensors("ema", payload["ema"], parameters)
    elif payload["ema"] is not None:
        raise ValueError("checkpoint has ema, this run has model_ema=False")
    _check_metrics(payload["epoch"], payload["metrics"])
    _check_place(payload["epoch"], payload["step"], payload["sums"], config)


def _check_tensors(what: str, found: object, expected: Mapping[str, Tensor]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint has {what}={short(found)}, allowed: a dict of tensors")
    for name in expected:
        if name not in found:
            raise ValueError(f"checkpoint lacks {what} {name}, which this run's model has")
    for name, value in found.items():
        if name not in expected:
            raise ValueError(f"checkpoint has {what} {short(name)}, which this run's model has not")
        _check_tensor(f"{what} {name}", value, expected[name])


def _check_tensor(what: str, found: object, like: Tensor) -> None:
    expected = f"{like.dtype} {list(like.shape)}"
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        raise ValueError(f"checkpoint has {what}={short(found)}, allowed: {expected}")
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
            f"checkpoint has optimizer={short(found)}, allowed: state and param_groups of an SGD"
        )
    ours = expected.state_dict()["param_groups"]
    if len(groups) != len(ours) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"checkpoint has {len(groups)} optimizer groups, this run has {len(ours)}")
    for group, our in zip(groups, ours, strict=True):
        for name, value in our.items():
            # Another version of torch may know less of its own switches: they then have their defaults.
            kept = group.get(name, None if name in SETTINGS else value)
            if not (_is_number(kept) if name == "lr" else same(kept, value)):
                raise ValueError(
                    f"checkpoint has optimizer {name}={short(kept)}, this run has {short(value)}"
                )
    parameters = [parameter for group in expected.param_groups for parameter in group["params"]]
    for number, entry in state.items():
        known = type(number) is int and 0 <= number < len(parameters)
        if not known or not isinstance(entry, dict) or set(entry) - {"momentum_buffer"}:
            raise ValueError(f"checkpoint has optimizer state {short(number)}={short(entry)}")
        if entry.get("momentum_buffer") is not None:
            _check_tensor(f"momentum_buffer {number}", entry["momentum_buffer"], parameters[number])


def _check_metrics(epoch: object, found: object) -> None:
    if not isinstance(found, list) or type(epoch) is not int or len(found) != epoch:
        raise ValueError(f"checkpoint has epoch={short(epoch)}, metrics={short(found)}: one row an epoch")
    for row in found:
        names = columns(found)
        if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in names):
            raise ValueError(f"checkpoint has metrics {short(row)}, allowed: numbers for {', '.join(names)}")


def _check_place(epoch: int, step: object, sums: object, config: Config) -> None:
    """Steps done inside an epoch, and what each rank has added up in them."""
    if type(step) is not int or step < 0 or (step and epoch >= config.recipe.epochs):
        raise ValueError(f"checkpoint has step={short(step)} in epoch {epoch + 1} of {config.recipe.epochs}")
    if not isinstance(sums, list) or bool(sums) != bool(step):
        raise ValueError(
            f"checkpoint has sums={short(sums)} at step {step}: one for each rank inside an epoch"
        )
    for rank in sums:
        if not isinstance(rank, dict) or not all(_is_number(rank.get(name)) for name in SUMS):
            raise ValueError(f"checkpoint has sums {short(rank)}, allowed: numbers for {', '.join(SUMS)}")


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def same(found: object, expected: object) -> bool:
    """Equal and of one type."""
    return type(found) is type(expected) and found == expected


def short(value: object) -> str:
    """What came, on one line: a tensor's numbers would fill the screen."""
    text = (
        f"{type(value).__name__}"
        if isinstance(value, Tensor | dict | list)
        else " ".join(repr(value).split())
    )
    return text if len(text) <= 60 else text[:57] + "..."
