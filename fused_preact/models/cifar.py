"""The paper's CIFAR networks: 6n+2 basic (20, 56, 110) and 9n+2 bottleneck (164, 1001), for images of any size."""

from __future__ import annotations

from torch import nn

from ..modules import PreActBasicBlock, PreActBottleneck, Stem
from .network import PreActResNet, make_stage

__all__ = [
    "cifar_preact_resnet20",
    "cifar_preact_resnet56",
    "cifar_preact_resnet110",
    "cifar_preact_resnet164",
    "cifar_preact_resnet1001",
]


def _cifar(
    depth: int, num_classes: int, fused: bool, in_channels: int, shortcut: str | None, stride_on_1x1: bool
) -> PreActResNet:
    bottleneck = depth in (164, 1001)
    units = (depth - 2) // (9 if bottleneck else 6)
    if shortcut is None:
        # The paper: zero padding (option A) for the basic networks, projections for the bottlenecks.
        shortcut = "B" if bottleneck else "A"
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut: got {shortcut!r}, allowed are 'A' (zero padding) and 'B' (projection)")
    widths = (64, 128, 256) if bottleneck else (16, 32, 64)
    stages = []
    channels = 16
    for index, width in enumerate(widths):
        stride = 1 if index == 0 else 2
        # The first unit of stage 1 shares its activation between both paths whatever its width.
        first = "A" if channels == width else shortcut
        if bottleneck:
            stage = make_stage(
                PreActBottleneck,
                channels,
                width,
                units,
                stride,
                first,
                fused=fused,
                stride_on_1x1=stride_on_1x1,
            )
        else:
            stage = make_stage(PreActBasicBlock, channels, width, units, stride, first, fused=fused)
        stages.append(stage)
        channels = width
    stem = Stem(nn.Conv2d(in_channels, 16, 3, padding=1, bias=False))
    return PreActResNet(stem, stages, channels, num_classes, fused)


def cifar_preact_resnet20(
    num_classes: int = 10, fused: bool = True, *, in_channels: int = 3, shortcut: str | None = None
) -> PreActResNet:
    """ResNet-20, 269,722 parameters with shortcut "A" (the default) and 272,282 with "B" (10 classes)."""
    return _cifar(20, num_classes, fused, in_channels, shortcut, True)


def cifar_preact_resnet56(
    num_classes: int = 10, fused: bool = True, *, in_channels: int = 3, shortcut: str | None = None
) -> PreActResNet:
    """ResNet-56, 853,018 parameters with shortcut "A" (the default) and 855,578 with "B" (10 classes)."""
    return _cifar(56, num_classes, fused, in_channels, shortcut, True)


def cifar_preact_resnet110(
    num_classes: int = 10, fused: bool = True, *, in_channels: int = 3, shortcut: str | None = None
) -> PreActResNet:
    """ResNet-110, 1,727,962 parameters with shortcut "A" (the default) and 1,730,522 with "B" (10 classes)."""
    return _cifar(110, num_classes, fused, in_channels, shortcut, True)


def cifar_preact_resnet164(
    num_classes: int = 10,
    fused: bool = True,
    *,
    in_channels: int = 3,
    shortcut: str | None = None,
    stride_on_1x1: bool = True,
) -> PreActResNet:
    """ResNet-164, 1,703,258 parameters (10 classes); the stride is on the first 1x1 as in the official code."""
    return _cifar(164, num_classes, fused, in_channels, shortcut, stride_on_1x1)


def cifar_preact_resnet1001(
    num_classes: int = 10,
    fused: bool = True,
    *,
    in_channels: int = 3,
    shortcut: str | None = None,
    stride_on_1x1: bool = True,
) -> PreActResNet:
    """ResNet-1001, 10,327,706 parameters (10 classes); otherwise as ResNet-164."""
    return _cifar(1001, num_classes, fused, in_channels, shortcut, stride_on_1x1)
