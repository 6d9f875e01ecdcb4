"""Pre-activation residual networks with BN, ReLU and the identity addition fused into the convolutions.

    model = fused_preact.models.preact_resnet50().cuda()     # fused; fused=False is the plain reference
    fused_preact.fuse(their_model)                           # anybody's ResNet-v2, WideResNet, DenseNet, in place
    unit = fused_preact.PreActBottleneck(256, 256)           # drop-in units
    y = fused_preact.functional.preact_conv2d(x, weight, ...)

Importing the package imports torch, no Triton, and touches no device.
"""

from . import _interrupt, flops, functional, models  # noqa: F401 - _interrupt first: the next ones import torch
from .convert import explain, fuse, unfuse
from .functional import Statistics
from .inference import optimize_for_inference, undo_optimize_for_inference
from .modules import (
    IdentityProjection,
    PreActBasicBlock,
    PreActBottleneck,
    PreActConv2d,
    PreActSequential,
    PreActSingleBlock,
)
from .ops import backend, serving_backend
from .units import ResidualUnit

__all__ = [
    "IdentityProjection",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActConv2d",
    "PreActSequential",
    "PreActSingleBlock",
    "ResidualUnit",
    "Statistics",
    "backend",
    "explain",
    "functional",
    "fuse",
    "models",
    "optimize_for_inference",
    "serving_backend",
    "undo_optimize_for_inference",
    "unfuse",
]

__version__ = "0.1.0"

flops.register()
