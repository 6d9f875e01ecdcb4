"""The split path: activate once into a temporary, convolve with the library, and run the epilogue as a pass of its
own.

For convolutions that the library does faster than the prologue saves, as a tuned table says, and for groups. Nothing
more than on the fused path is kept for backward: the activation is made again for wgrad, and freed.

It moves fewer tensors than eager PyTorch does. Forward: the activation (read, written) and the statistics (read);
eager has statistics (read), BN (read, written) and ReLU (read, written), and here the next statistics are taken while
adding the identity. Backward: one pass for mask and sums and one that applies, where eager has three; only wgrad's
activation is added. Whether it is faster too is for the tuner to say, which measures fused, split and eager.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bn_relu import activate
from .bn_stats import add_stats, bn_stats
from .common import as_format_of, channels_last, empty_floats
from .geometry import Geometry
from .relu_backward import relu_backward

__all__ = ["conv_dgrad", "conv_fprop", "conv_wgrad"]


def conv_fprop(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    stats: bool,
    output_relu: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`conv_fprop.conv_fprop`."""
    constants = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    a = channels_last(x) if scale is None or shift is None else activate(x, scale, shift, relu)
    y = F.conv2d(a, channels_last(weight), bias, *constants)
    if output_relu:
        y = y.relu_()
    if residual is not None and stats:
        y, mean, var = add_stats(y, residual)
    else:
        y = y if residual is None else y.add_(residual)
        mean, var = bn_stats(y) if stats else (empty_floats(x, 0), empty_floats(x, 0))
    return as_format_of(channels_last(y), x), mean, var


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    da: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`conv_dgrad.conv_dgrad`."""
    grad = _backward(dy, x, weight, geometry, 0)
    if scale is None or shift is None or mean is None:
        return as_format_of(channels_last(grad), x), empty_floats(x, 0), empty_floats(x, 0)
    g, sum_g, sum_gx = relu_backward(grad, da, x, scale, shift, mean, relu)
    return as_format_of(g, x), sum_g, sum_gx


def conv_wgrad(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, geometry: Geometry, relu: bool
) -> Tensor:
    """As :func:`conv_wgrad.conv_wgrad`."""
    dweight = _backward(dy, activate(x, scale, shift, relu), weight, geometry, 1)
    return torch.empty_like(weight).copy_(dweight)


def _backward(dy: Tensor, a: Tensor, weight: Tensor, g: Geometry, which: int) -> Tensor:
    """The library's dgrad (0) or wgrad (1)."""
    mask = [which == 0, which == 1, False]
    dy, a, weight = channels_last(dy), channels_last(a), channels_last(weight)
    return torch.ops.aten.convolution_backward(
        dy, a, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, mask
    )[which]
