"""The paper's units and networks written a second time, from its figures: strings of operations over a state dict.

Nothing of the package is used. BN and zero padding are spelled out; statistics that BN would track are returned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Fig. 4, (a) to (e), for units of one, two and three weight layers: c convolution, b BN, r ReLU, + addition; at | the
# tensor is what a projection, zero padding or a first unit's shortcut reads ("before splitting into two paths").
FIGURE_4 = {
    ("original", "single"): "| c1 b1 + r",
    ("original", "basic"): "| c1 b1 r c2 b2 + r",
    ("original", "bottleneck"): "| c1 b1 r c2 b2 r c3 b3 + r",
    ("bn_after_addition", "single"): "| c1 + b1 r",
    ("bn_after_addition", "basic"): "| c1 b1 r c2 + b2 r",
    ("bn_after_addition", "bottleneck"): "| c1 b1 r c2 b2 r c3 + b3 r",
    ("relu_before_addition", "single"): "| c1 b1 r +",
    ("relu_before_addition", "basic"): "| c1 b1 r c2 b2 r +",
    ("relu_before_addition", "bottleneck"): "| c1 b1 r c2 b2 r c3 b3 r +",
    ("relu_only_preact", "single"): "r | c1 b1 +",
    ("relu_only_preact", "basic"): "r | c1 b1 r c2 b2 +",
    ("relu_only_preact", "bottleneck"): "r | c1 b1 r c2 b2 r c3 b3 +",
    ("preact", "single"): "b1 r | c1 +",
    ("preact", "basic"): "b1 r | c1 b2 r c2 +",
    ("preact", "bottleneck"): "b1 r | c1 b2 r c2 b3 r c3 +",
}
ORDERS = ("original", "bn_after_addition", "relu_before_addition", "relu_only_preact", "preact")
BODIES = ("single", "basic", "bottleneck")


class Tensors:
    """A state dict below a prefix, the mode, and what BN would leave in its buffers."""

    def __init__(self, state: dict[str, Tensor], training: bool, prefix: str = "") -> None:
        self.state, self.training, self.prefix = state, training, prefix
        self.tracked: dict[str, Tensor] = {}

    def below(self, name: str) -> Tensors:
        inner = Tensors(self.state, self.training, f"{self.prefix}{name}.")
        inner.tracked = self.tracked
        return inner

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[f"{self.prefix}{name}"]

    def bn(self, name: str, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) gamma + beta; momentum 0.1 and the unbiased variance for the running ones."""
        if self.training:
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
            count = x.numel() // x.shape[1]
            for kind, new in (("mean", mean), ("var", var * count / (count - 1))):
                old = self[f"{name}.running_{kind}"]
                self.tracked[f"{self.prefix}{name}.running_{kind}"] = (0.9 * old + 0.1 * new).detach()
        else:
            mean, var = self[f"{name}.running_mean"], self[f"{name}.running_var"]
        scaled = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return scaled * self[f"{name}.weight"][:, None, None] + self[f"{name}.bias"][:, None, None]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self[f"{name}.weight"]
        bias = self.state.get(f"{self.prefix}{name}.bias")
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[2] // 2)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def zero_padded(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: every stride-th pixel, zeros for the channels that come new."""
    x = x[:, :, ::stride, ::stride]
    return torch.cat([x, x.new_zeros(x.shape[0], channels - x.shape[1], *x.shape[2:])], 1)


def shortcut_of(p: Tensors, kind: str, x: Tensor, channels: int, stride: int) -> tuple[Tensor, Any]:
    """Fig. 2: h(x), and what F is multiplied with."""
    name, *numbers = kind.split(":")
    values = [float(n) for n in numbers]
    if "shortcut.0.weight" in p:
        h = p.bn("shortcut.1", p.conv("shortcut.0", x, stride))
    elif "shortcut.weight" in p:
        h = p.conv("shortcut", x, stride)
    elif stride > 1 or channels != x.shape[1]:
        h = zero_padded(x, channels, stride)
    else:
        h = x
    if name == "scaling":
        return values[0] * h, values[1]
    if name in ("exclusive_gating", "shortcut_gating"):
        g = 1 / (1 + torch.exp(-p.conv("gate", x, stride)))
        return h * (1 - g), g if name == "exclusive_gating" else 1
    if name == "dropout":
        if not p.training:
            return 0.5 * h, 1
        return h * (F.dropout(torch.ones_like(h), 0.5) > 0), 1
    return h, 1


def unit(
    p: Tensors,
    x: Tensor,
    order: str,
    kind: str,
    body: str,
    stride: int = 1,
    first: bool = False,
    stride_on_1x1: bool = False,
) -> Tensor:
    """One unit; its widths come from the weights."""
    steps = FIGURE_4[order, body].split()
    channels = p[f"conv{sum(s[0] == 'c' for s in steps)}.weight"].shape[0]
    changes = stride > 1 or channels != x.shape[1] or kind == "conv"
    strided = "c2" if body == "bottleneck" and not stride_on_1x1 else "c1"
    h, factor = (None, 1) if first or changes else shortcut_of(p, kind, x, channels, stride)
    f = x
    for step in steps:
        if step == "|" and h is None:
            h, factor = shortcut_of(p, kind, f, channels, stride)
        elif step == "r":
            f = relu(f)
        elif step == "+":
            f = h + factor * f
        elif step[0] == "b":
            f = p.bn(f"bn{step[1]}", f)
        elif step[0] == "c":
            f = p.conv(f"conv{step[1]}", f, stride if step == strided else 1)
    return f


def cifar(p: Tensors, x: Tensor, order: str, kind: str, body: str, units: int, on_1x1: bool = True) -> Tensor:
    """A CIFAR network: conv, its first activation before any path splits, three stages, the last activation, FC."""
    x = p.conv("stem.0", x)
    if order != "preact":
        x = relu(p.bn("stem.1", x))
    for stage in range(3):
        for i in range(units):
            stride = 2 if stage and not i else 1
            inner = p.below(f"stages.{stage}.{i}")
            x = unit(inner, x, order, kind, body, stride, not stage and not i, on_1x1)
    if order == "preact":
        x = relu(p.bn("bn", x))
    elif order == "relu_only_preact":
        x = relu(x)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
