"""The paper's ImageNet networks: basic units (18, 34) and bottlenecks (50, 101, 152, 200).

The stem is conv7x7/2 -> maxpool3x3/2; the BN-ReLU after it is the first unit's own, shared by both paths.
"""

from __future__ import annotations

from torch import nn

from ..modules import PreActBasicBlock, PreActBottleneck, Stem
from .network import PreActResNet, make_stage

__all__ = [
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
]


def _imagenet(
    units: tuple[int, int, int, int],
    bottleneck: bool,
    num_classes: int,
    fused: bool,
    in_channels: int,
    stride_on_1x1: bool,
) -> PreActResNet:
    stages = []
    channels = 64
    for index, (count, width) in enumerate(zip(units, (64, 128, 256, 512), strict=True)):
        stride = 1 if index == 0 else 2
        if bottleneck:
            width *= PreActBottleneck.expansion
            stage = make_stage(
                PreActBottleneck,
                channels,
                width,
                count,
                stride,
                "B",
                fused=fused,
                stride_on_1x1=stride_on_1x1,
            )
        else:
            # Equal widths in stage 1: the shared activation takes the place of a projection.
            first = "A" if channels == width else "B"
            stage = make_stage(PreActBasicBlock, channels, width, count, stride, first, fused=fused)
        stages.append(stage)
        channels = width
    stem = Stem(
        nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
    )
    return PreActResNet(stem, stages, channels, num_classes, fused)


def preact_resnet18(num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3) -> PreActResNet:
    """ResNet-18, 11,687,720 parameters (1000 classes)."""
    return _imagenet((2, 2, 2, 2), False, num_classes, fused, in_channels, False)


def preact_resnet34(num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3) -> PreActResNet:
    """ResNet-34, 21,795,880 parameters (1000 classes)."""
    return _imagenet((3, 4, 6, 3), False, num_classes, fused, in_channels, False)


def preact_resnet50(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-50, 25,549,352 parameters (1000 classes)."""
    return _imagenet((3, 4, 6, 3), True, num_classes, fused, in_channels, stride_on_1x1)


def preact_resnet101(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-101, 44,541,480 parameters (1000 classes)."""
    return _imagenet((3, 4, 23, 3), True, num_classes, fused, in_channels, stride_on_1x1)


def preact_resnet152(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-152, 60,185,128 parameters (1000 classes)."""
    return _imagenet((3, 8, 36, 3), True, num_classes, fused, in_channels, stride_on_1x1)


def preact_resnet200(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-200, 64,666,152 parameters (1000 classes)."""
    return _imagenet((3, 24, 36, 3), True, num_classes, fused, in_channels, stride_on_1x1)
