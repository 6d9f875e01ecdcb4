"""Weights with what is needed to use them: read from checkpoints, and exchanged as safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import Config
from .data import check_card
from .loop import Trainer
from .networks import build_model, like

SUFFIX = ".safetensors"
KEYS = ("config", "data_card")  # of a file's metadata, as JSON


@dataclass(frozen=True)
class Weights:
    """A model's state dict on the CPU, the configuration it was trained with, and ``DataSet.card`` of its data."""

    state: dict[str, Tensor]
    config: Config
    card: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes of the data."""
        return len(self.card["class_names"])

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.card["in_channels"]


def of_payload(payload: Mapping[str, Any]) -> Weights:
    """The weights of a checkpoint; the averages in place of the parameters where it has them (EMA)."""
    config, card = Config.from_dict(payload["config"]), payload["data_card"]
    check_card(card)
    state = payload["state"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("checkpoint has a state that is no dict of tensors")
    return Weights({**state, **(payload.get("ema") or {})}, config, card)


def read(path: str | Path) -> Weights:
    """Weights of a checkpoint, of a run's folder (its last.pt) or of a safetensors file that ``write`` made.

    Nothing in it is executed. Raises OSError, or ValueError for a file that is damaged or something else.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        return of_payload(checkpoint.load(path))
    state, metadata = _open(path)
    missing = [key for key in KEYS if key not in metadata]
    if missing:
        raise ValueError(
            f"{path}: weights without {' and '.join(missing)}: not written by fused_preact.train --export"
        )
    try:
        config = Config.from_dict(_tuples(json.loads(metadata["config"])))
        card = json.loads(metadata["data_card"])
        if isinstance(card, dict) and card.get("pixel_mean") is not None:
            card["pixel_mean"] = torch.tensor(card["pixel_mean"], dtype=torch.float32)
        check_card(card)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: metadata of another version or damaged ({error})") from error
    return Weights(state, config, card)


def check_target(path: Path) -> None:
    """ValueError, ModuleNotFoundError or OSError where ``write`` could not write ``path``."""
    if path.suffix != SUFFIX:
        raise ValueError(f"--export {path}: must end in {SUFFIX}")
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--export {path}: safetensors is not installed: pip install 'fused_preact[train]'"
        ) from error
    if path.is_dir():
        raise IsADirectoryError(f"--export {path}: is a folder")
    checkpoint.check_writable(path.parent)


def write(path: Path, weights: Weights) -> None:
    """A safetensors file with the model's name, its classes, configuration and preprocessing in the metadata."""
    from safetensors.torch import save

    card = {**weights.card}
    if card["pixel_mean"] is not None:
        card["pixel_mean"] = card["pixel_mean"].tolist()  # float32 as doubles: nothing is lost
    recipe = weights.config.recipe
    metadata = {
        "format": "pt",
        "library": "fused_preact",
        "model": recipe.model,
        "recipe": recipe.name,
        "class_names": json.dumps(card["class_names"]),
        "config": json.dumps(weights.config.to_dict()),
        "data_card": json.dumps(card),
    }
    content = save({name: value.contiguous() for name, value in weights.state.items()}, metadata)
    checkpoint.write_atomically(path, lambda file: file.write(content))


def build(found: Weights) -> nn.Module:
    """The network of ``found``, its weights not yet in it."""
    return build_model(found.config, found, fused=found.config.fused)


def check_state(ours: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """ValueError with the first name or shape in which ``state`` differs from the state dict ``ours``."""
    for name, expected in ours.items():
        if name not in state:
            raise ValueError(f"{what}: lacks {name}, which the model has")
        found = state[name]
        if found.shape != expected.shape or found.is_floating_point() != expected.is_floating_point():
            raise ValueError(
                f"{what}: {name} is {found.dtype} {list(found.shape)}, the model's is {expected.dtype} "
                f"{list(expected.shape)}"
            )
    for name in state:
        if name not in ours:
            raise ValueError(f"{what}: has {name}, which the model has not")


def load_into(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Put ``state`` into ``model``; ValueError as ``check_state``, the model unchanged."""
    check_state(model.state_dict(), state, what)
    model.load_state_dict(dict(state))


def begin_from(trainer: Trainer, state: Mapping[str, Tensor], what: str) -> None:
    """Give ``trainer``, at its beginning, the weights ``state``; ValueError as ``check_state``."""
    ours = trainer.model.state_dict()
    check_state(ours, state, what)
    trainer.model.load_state_dict({name: like(state[name], value) for name, value in ours.items()})
    if trainer.ema is not None:
        trainer.ema.load(dict(state))


def initial(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, a run's folder or any safetensors file: for ``--initial-checkpoint``."""
    path = Path(path)
    if path.suffix == SUFFIX:
        return _open(path)[0]
    return of_payload(checkpoint.load(path)).state


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: safetensors is not installed: pip install 'fused_preact[train]'"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: {size} bytes, truncated, damaged or no safetensors file ({error})"
        ) from error


def _tuples(value: Any) -> Any:
    """JSON has lists where a configuration has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
