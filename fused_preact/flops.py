"""FLOPs of the operations for ``torch.utils.flop_counter``: of the convolutions alone, as PyTorch counts its own.

The counter imports Triton where there is one, so it is told of the formulas when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

__all__ = ["register"]

_COUNTER = "torch.utils.flop_counter"


def _convolution(weight: Sequence[int], output: Sequence[int]) -> int:
    """FLOPs of a convolution, and of either of its gradients: ``weight`` [K,C/groups,R,S], ``output`` [N,K,OH,OW]."""
    return 2 * output[0] * math.prod(output[2:]) * math.prod(weight)


def _fprop(
    x: Any, scale: Any, shift: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _convolution(weight, out_shape[0])


def _dgrad(dy: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _convolution(weight, dy)


def _wgrad(dy: Any, x: Any, scale: Any, shift: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _convolution(weight, dy)


def _backward(dy: Any, pending: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    weight_grad: bool = args[10]  # x, bn, da, residual_grad, four of the convolution, training, apply, this
    return _convolution(weight, dy) * (2 if weight_grad else 1)


def _chain(x: Any, packed: Any, spec: Sequence[int], **kwargs: Any) -> int:
    """Of the words of kernels/cpu/chain.h."""
    numbers = iter(spec)
    channels, (height, width), total = next(numbers), x[2:], 0
    for convs in numbers:
        shortcut, _ = next(numbers), next(numbers)
        entry = channels, height, width
        for _ in range(convs):
            k, r, s, *window = (next(numbers) for _ in range(9))
            stride, padding, dilation = window[:2], window[2:4], window[4:]
            height = (height + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
            width = (width + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
            total += 2 * x[0] * height * width * k * channels * r * s
            channels = k
        if shortcut != 1:
            k, _, _ = (next(numbers) for _ in range(3))
            # A shortcut that pads with zeros multiplies nothing.
            total += 2 * x[0] * height * width * k * entry[0] if shortcut == 3 else 0
    return total


def _stem(x: Any, packed: Any, bias: Any, k: int, conv: Sequence[int], pool: Any, **kwargs: Any) -> int:
    size, stride, padding = conv
    height, width = ((length + 2 * padding - size) // stride + 1 for length in x[2:])
    return _convolution((k, x[1], size, size), (x[0], k, height, width))


def _register(counter: ModuleType) -> None:
    ops = torch.ops.fused_preact
    formulas = {
        "conv_fprop": _fprop,
        "conv_fprop_bn": _fprop,
        "conv_dgrad": _dgrad,
        "conv_wgrad": _wgrad,
        "conv_backward": _backward,
        "unit_chain": _chain,
        "stem_conv_pool": _stem,
    }
    for name, formula in formulas.items():
        if hasattr(ops, name):  # the last two exist where the kernels are compiled
            counter.register_flop_formula(getattr(ops, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as the counter's module has run; until then it may be looked for in vain."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Tell the counter of the formulas, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
