"""The paper's ImageNet networks: basic units (18, 34) and bottlenecks (50, 101, 152, 200).

The stem is conv7x7/2 -> maxpool3x3/2. With full pre-activation the BN-ReLU after it is the first unit's own, shared
by both paths; otherwise BN-ReLU comes before the pooling.
"""

from __future__ import annotations

from .network import PreActResNet, ResNet, Variant, build

__all__ = [
    "imagenet_resnet",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
]

UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Units of each stage by depth; those of 18 and 34 are basic."""


def imagenet_resnet(
    depth: int,
    num_classes: int = 1000,
    fused: bool = True,
    *,
    in_channels: int = 3,
    order: str = "original",
    shortcut: str | None = None,
    body: str | None = None,
    stride_on_1x1: bool = False,
) -> ResNet:
    """ResNet of ``depth`` layers on maps of 56x56 to 7x7 (for images of 224x224).

    ``order`` and ``shortcut``: see :mod:`fused_preact.units`; by default projections (B) where the size changes. The
    stride of bottlenecks is on the 3x3. ``body`` follows from the depth: no other is allowed. ValueError for unknown
    words and depths.
    """
    if depth not in UNITS:
        raise ValueError(f"depth: got {depth}, allowed are {', '.join(map(str, UNITS))}")
    own = "basic" if depth < 50 else "bottleneck"
    if body not in (None, own):
        raise ValueError(f"body: got {body!r} for depth {depth}, allowed is {own!r}")
    variant = Variant.of(order, shortcut, own, stride_on_1x1, option="B")
    return build(
        (in_channels, 64, 7, 2), True, (64, 128, 256, 512), UNITS[depth], variant, num_classes, fused
    )


def _preact(
    depth: int, num_classes: int, fused: bool, in_channels: int, stride_on_1x1: bool = False
) -> PreActResNet:
    options = {"in_channels": in_channels, "stride_on_1x1": stride_on_1x1}
    return imagenet_resnet(depth, num_classes, fused, order="preact", **options)  # type: ignore


def preact_resnet18(num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3) -> PreActResNet:
    """ResNet-18, 11,687,720 parameters (1000 classes)."""
    return _preact(18, num_classes, fused, in_channels)


def preact_resnet34(num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3) -> PreActResNet:
    """ResNet-34, 21,795,880 parameters (1000 classes)."""
    return _preact(34, num_classes, fused, in_channels)


def preact_resnet50(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-50, 25,549,352 parameters (1000 classes)."""
    return _preact(50, num_classes, fused, in_channels, stride_on_1x1)


def preact_resnet101(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-101, 44,541,480 parameters (1000 classes)."""
    return _preact(101, num_classes, fused, in_channels, stride_on_1x1)


def preact_resnet152(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-152, 60,185,128 parameters (1000 classes)."""
    return _preact(152, num_classes, fused, in_channels, stride_on_1x1)


def preact_resnet200(
    num_classes: int = 1000, fused: bool = True, *, in_channels: int = 3, stride_on_1x1: bool = False
) -> PreActResNet:
    """ResNet-200, 64,666,152 parameters (1000 classes)."""
    return _preact(200, num_classes, fused, in_channels, stride_on_1x1)
