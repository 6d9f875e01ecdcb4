"""The real timm and pytorchcv, where they are installed; neither is a dependency, and a test skips without them.

Both import torchvision, which fails on a torch that its C++ library was not built for (its CUDA wheel beside a CPU
torch): "operator torchvision::nms does not exist". It only wants to describe those operators, and no classifier
calls them, so the schemas alone are enough. Without gigabytes of CUDA they are installed beside a torch by ``pip
install --no-deps timm torchvision pytorchcv`` and ``pip install safetensors huggingface_hub pyyaml requests tqdm``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

# What the oracle counts in training mode: sites, additions, heads.
TIMM = {
    "resnetv2_18": (19, 8, 1),
    "resnetv2_18d": (18, 8, 1),
    "resnetv2_50": (52, 16, 1),
    "resnetv2_50d": (51, 16, 1),
    "resnetv2_50x1_bit": (0, 0, 0),
    "densenet121": (119, 0, 1),
    "dpn68": (70, 0, 1),
    "regnetv_040": (0, 0, 0),
}
PYTORCHCV = {
    "preresnet18": (19, 8, 1),
    "preresnet50": (52, 16, 1),
    "preresnet50b": (52, 16, 1),
    "sepreresnet18": (19, 3, 1),
    "preresnet20_cifar10": (20, 9, 1),
    "preresnet164bn_cifar10": (165, 54, 1),
    "wrn16_10_cifar10": (15, 6, 1),
    "densenet40_k12_bc_cifar10": (38, 0, 1),
    "densenet121": (119, 0, 1),
    "dpn68": (70, 0, 1),
}

UNBUILT = ("nms", "qnms")
_schemas: list[torch.library.Library] = []


def import_real(name: str) -> ModuleType:
    """The module, or a skip that says why there is none; a module half imported is not left behind."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} is not installed: {error}", allow_module_level=True)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _declare()
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported here: {error}", allow_module_level=True)


def input_size(name: str) -> int:
    """What a model takes: pytorchcv's pool over a map of fixed size."""
    return 32 if "cifar" in name else 224


def timm_model(name: str) -> nn.Module:
    """An untrained model of timm."""
    return import_real("timm").create_model(name, pretrained=False, num_classes=10)


def pytorchcv_model(name: str) -> nn.Module:
    """An untrained model of pytorchcv."""
    return import_real("pytorchcv.model_provider").get_model(name, pretrained=False)


def _declare() -> None:
    """Declare the operators that torchvision describes before it asks for its own library."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in UNBUILT:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)  # a schema lives as long as its library
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm", "pytorchcv")
    ]:
        del sys.modules[name]
