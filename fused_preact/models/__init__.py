"""The paper's networks. ``fused=False`` is the plain reference with the same state dict."""

from __future__ import annotations

from collections.abc import Callable

from .cifar import (
    cifar_preact_resnet20,
    cifar_preact_resnet56,
    cifar_preact_resnet110,
    cifar_preact_resnet164,
    cifar_preact_resnet1001,
)
from .imagenet import (
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    preact_resnet200,
)
from .network import PreActResNet

__all__ = [
    "PreActResNet",
    "cifar_preact_resnet20",
    "cifar_preact_resnet56",
    "cifar_preact_resnet110",
    "cifar_preact_resnet164",
    "cifar_preact_resnet1001",
    "create",
    "names",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
]

_MODELS: dict[str, Callable[..., PreActResNet]] = {
    model.__name__: model
    for model in (
        cifar_preact_resnet20,
        cifar_preact_resnet56,
        cifar_preact_resnet110,
        cifar_preact_resnet164,
        cifar_preact_resnet1001,
        preact_resnet18,
        preact_resnet34,
        preact_resnet50,
        preact_resnet101,
        preact_resnet152,
        preact_resnet200,
    )
}


def names() -> list[str]:
    """The names that :func:`create` knows."""
    return list(_MODELS)


def create(name: str, *, num_classes: int, fused: bool = True, in_channels: int = 3) -> PreActResNet:
    """The network called ``name``; raises ValueError for a name not in :func:`names`."""
    if name not in _MODELS:
        raise ValueError(f"name: got {name!r}, allowed are {', '.join(_MODELS)}")
    return _MODELS[name](num_classes=num_classes, fused=fused, in_channels=in_channels)
