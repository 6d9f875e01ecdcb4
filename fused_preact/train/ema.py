"""An exponential moving average of the weights, tested beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .networks import like


class EMA:
    """e <- d e + (1 - d) w after every step, with d = min(``decay``, (1 + t) / (10 + t)) at step t.

    The ramp lets the average forget the initial weights in a run that is short against 1 / (1 - decay) steps. Only
    parameters are averaged: running statistics are averages already, and the model's own serve both.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.parameters = dict(model.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step``, counted from 0 over the whole run."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), weight)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Go on from ``averages``, whole tensors."""
        self.averages = {name: like(averages[name], p.detach()) for name, p in self.parameters.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model's parameters hold the averages."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        for module in self.model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()  # fully_shard may keep what it has gathered until the next backward pass
