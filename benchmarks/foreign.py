"""A network of ours written as other people write theirs: the same layers, in modules that know nothing of them.

Blocks as in the CIFAR repositories (functional ReLUs, the sum in place, the shortcut an attribute that may be
missing), stages as ``nn.Sequential``, a head of three functions.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["block", "network"]


class Block(nn.Module):
    """A basic or bottleneck unit."""

    def __init__(self, unit: Any) -> None:
        super().__init__()
        for name, child in unit.named_children():
            if name != "shortcut":
                setattr(self, name, child)
        if unit.shortcut is not None:
            self.shortcut = unit.shortcut
        self.deep = hasattr(self, "conv3")

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        if self.deep:
            out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


class Network(nn.Module):
    """Stem, stages, head and classifier."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(*net.stem)
        self.stages = nn.Sequential(*(nn.Sequential(*map(Block, stage)) for stage in net.stages))
        self.bn, self.fc = net.bn, net.fc

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stages(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def block(unit: nn.Module) -> nn.Module:
    """``unit`` (one of ours) as somebody else's block with the same children."""
    return Block(unit)


def network(net: nn.Module) -> nn.Module:
    """``net`` (one of ours) as somebody else's network with the same children, in the same mode."""
    return Network(net).train(net.training)
