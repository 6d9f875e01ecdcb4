"""The paper's networks. ``fused=False`` is the plain reference with the same state dict."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from .cifar import (
    DEPTHS,
    cifar_preact_resnet20,
    cifar_preact_resnet56,
    cifar_preact_resnet110,
    cifar_preact_resnet164,
    cifar_preact_resnet1001,
    cifar_resnet,
)
from .imagenet import (
    UNITS,
    imagenet_resnet,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    preact_resnet200,
)
from .network import PreActResNet, ResNet

__all__ = [
    "PreActResNet",
    "ResNet",
    "cifar_preact_resnet20",
    "cifar_preact_resnet56",
    "cifar_preact_resnet110",
    "cifar_preact_resnet164",
    "cifar_preact_resnet1001",
    "cifar_resnet",
    "create",
    "imagenet_resnet",
    "list_models",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
]

_NAMES = [f"cifar_{preact}resnet{depth}" for preact in ("preact_", "") for depth in DEPTHS]
_NAMES += [f"{preact}resnet{depth}" for preact in ("preact_", "") for depth in UNITS]
_NAME = re.compile(r"(cifar_)?(preact_)?resnet([1-9][0-9]*)")


def list_models(filter: str = "*") -> list[str]:
    """The paper's networks by name; ``filter`` is a pattern such as ``"cifar_*"``.

    :func:`create` takes CIFAR names of other depths (6n+2, 9n+2) too.
    """
    return [name for name in _NAMES if fnmatch.fnmatchcase(name, filter)]


def create(
    name: str,
    *,
    num_classes: int,
    fused: bool = True,
    in_channels: int = 3,
    order: str | None = None,
    shortcut: str | None = None,
    body: str | None = None,
    stride_on_1x1: bool | None = None,
) -> ResNet:
    """The network called ``name``: ``[cifar_][preact_]resnet<depth>``, see :func:`list_models`.

    "preact" in the name is full pre-activation; without it ``order`` says which units (default "original").
    ``shortcut``, ``body`` and ``stride_on_1x1`` if given as in :func:`cifar_resnet` and :func:`imagenet_resnet`.
    Raises ValueError for names, words and combinations that are not there, with what is allowed.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or (parts[1] is None and int(parts[3]) not in UNITS):
        raise ValueError(
            f"name: got {name!r}, allowed are {', '.join(_NAMES)}, and cifar ones of depth 6n+2 and 9n+2"
        )
    if order is None:
        order = "preact" if parts[2] else "original"
    elif parts[2] and order != "preact":
        raise ValueError(
            f"order: got {order!r} for {name!r}, allowed is 'preact'; "
            f"{name.replace('preact_', '')!r} takes every order"
        )
    options: dict[str, Any] = {"order": order, "shortcut": shortcut, "body": body, "in_channels": in_channels}
    if stride_on_1x1 is not None:
        options["stride_on_1x1"] = stride_on_1x1
    make = imagenet_resnet if parts[1] is None else cifar_resnet
    return make(int(parts[3]), num_classes, fused, **options)
