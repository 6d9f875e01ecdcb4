"""The paper's CIFAR networks, for images of any size: basic units (6n+2 layers) and bottlenecks (9n+2)."""

from __future__ import annotations

from .network import PreActResNet, ResNet, Variant, build

__all__ = [
    "cifar_preact_resnet20",
    "cifar_preact_resnet56",
    "cifar_preact_resnet110",
    "cifar_preact_resnet164",
    "cifar_preact_resnet1001",
    "cifar_resnet",
]

DEPTHS = (20, 32, 44, 56, 110, 164, 1001, 1202)
"""Of the paper and of He et al. 2015; others of the rule can be built too."""

_LAYERS = {"single": 3, "basic": 6, "bottleneck": 9}
"""Convolutions that one more unit (two single ones) in each of the three stages adds."""


def default_body(depth: int) -> str:
    """Basic units where the depth is 6n+2, but the paper's 164 and every other depth are bottlenecks'."""
    return "basic" if (depth - 2) % 6 == 0 and depth != 164 else "bottleneck"


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    fused: bool = True,
    *,
    in_channels: int = 3,
    order: str = "original",
    shortcut: str | None = None,
    body: str | None = None,
    stride_on_1x1: bool = True,
) -> ResNet:
    """ResNet of ``depth`` layers on maps of 32x32, 16x16 and 8x8 (for images of 32x32).

    ``body``: "basic" (6n+2 layers), "bottleneck" (9n+2; the stride is on the first 1x1 as in the official code) or
    "single", the 1-layer-skip network (3n+2, the paper's has 110 layers); by default the paper's for the depth.
    ``order`` and ``shortcut``: see :mod:`fused_preact.units`; by default zero padding (A) where the size changes, but
    projections (B) for bottlenecks. ValueError for unknown words and a depth that the body cannot make.
    """
    variant = Variant.of(order, shortcut, default_body(depth) if body is None else body, stride_on_1x1)
    layers = _LAYERS[variant.body]
    if depth <= 2 or (depth - 2) % layers:
        rule = "6n+2 and 9n+2" if body is None else f"{layers}n+2 with body {body!r}"
        raise ValueError(f"depth: got {depth}, allowed are {rule}, such as {', '.join(map(str, DEPTHS))}")
    units = [(depth - 2) // layers] * 3
    return build((in_channels, 16, 3, 1), False, (16, 32, 64), units, variant, num_classes, fused)


def _preact(depth: int, num_classes: int, fused: bool, **options: object) -> PreActResNet:
    return cifar_resnet(depth, num_classes, fused, order="preact", **options)  # type: ignore


def cifar_preact_resnet20(
    num_classes: int = 10, fused: bool = True, *, in_channels: int = 3, shortcut: str | None = None
) -> PreActResNet:
    """ResNet-20, 269,722 parameters with shortcut "A" (the default) and 272,282 with "B" (10 classes)."""
    return _preact(20, num_classes, fused, in_channels=in_channels, shortcut=shortcut)


def cifar_preact_resnet56(
    num_classes: int = 10, fused: bool = True, *, in_channels: int = 3, shortcut: str | None = None
) -> PreActResNet:
    """ResNet-56, 853,018 parameters with shortcut "A" (the default) and 855,578 with "B" (10 classes)."""
    return _preact(56, num_classes, fused, in_channels=in_channels, shortcut=shortcut)


def cifar_preact_resnet110(
    num_classes: int = 10, fused: bool = True, *, in_channels: int = 3, shortcut: str | None = None
) -> PreActResNet:
    """ResNet-110, 1,727,962 parameters with shortcut "A" (the default) and 1,730,522 with "B" (10 classes)."""
    return _preact(110, num_classes, fused, in_channels=in_channels, shortcut=shortcut)


def cifar_preact_resnet164(
    num_classes: int = 10,
    fused: bool = True,
    *,
    in_channels: int = 3,
    shortcut: str | None = None,
    stride_on_1x1: bool = True,
) -> PreActResNet:
    """ResNet-164, 1,703,258 parameters (10 classes); the stride is on the first 1x1 as in the official code."""
    options = {"in_channels": in_channels, "shortcut": shortcut, "stride_on_1x1": stride_on_1x1}
    return _preact(164, num_classes, fused, **options)


def cifar_preact_resnet1001(
    num_classes: int = 10,
    fused: bool = True,
    *,
    in_channels: int = 3,
    shortcut: str | None = None,
    stride_on_1x1: bool = True,
) -> PreActResNet:
    """ResNet-1001, 10,327,706 parameters (10 classes); otherwise as ResNet-164."""
    options = {"in_channels": in_channels, "shortcut": shortcut, "stride_on_1x1": stride_on_1x1}
    return _preact(1001, num_classes, fused, **options)
