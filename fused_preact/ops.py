"""The operations as ``torch.library`` ops, their fake kernels, and which backend serves them.

``torch.ops.fused_preact.*`` dispatch by device: the plain-PyTorch reference is registered as
CompositeExplicitAutograd and serves every device; Triton's kernels are registered for CUDA (ROCm included)
and XPU, the compiled ones of ``kernels/cpu`` for CPU, and so take precedence there. The ops carry no autograd
formula, and all but ``bn_update_running`` are functional: the public functions in :mod:`fused_preact.functional`
are the way in.

:func:`backend` forces one backend, for comparisons and for debugging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import library, reference

__all__ = ["BACKENDS", "backend", "compiled_for_cpu", "requested_backend", "run", "serving_backend", "table"]

BACKENDS = ("auto", "triton", "cpu", "reference")

_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_HEAD = "Tensor dy, Tensor x, Tensor scale, Tensor shift, Tensor mean"
_SCHEMAS = {
    "bn_stats": "(Tensor x) -> (Tensor, Tensor)",
    "bn_scale_shift": "(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    # The one that writes: in place to the buffers, outside of what autograd sees.
    "bn_update_running": "(Tensor[] mean, Tensor[] var, Tensor(a!)[] running_mean, Tensor(b!)[] running_var,"
    " Tensor(c!)[] num_batches_tracked, float? momentum, SymInt[] count) -> ()",
    "conv_fprop": "(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor? bias, Tensor? residual,"
    f" {_CONV}, bool stats, bool output_relu=False, bool prologue_relu=True) -> (Tensor, Tensor, Tensor)",
    "conv_fprop_bn": "(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor? bias,"
    f" {_CONV}, Tensor? bn_weight, Tensor? bn_bias, float eps, bool prologue_relu=True)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "conv_dgrad": "(Tensor dy, Tensor weight, Tensor x, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? da,"
    f" {_CONV}, bool prologue_relu=True) -> (Tensor, Tensor, Tensor)",
    "conv_wgrad": "(Tensor dy, Tensor x, Tensor scale, Tensor shift, Tensor weight,"
    f" {_CONV}, bool prologue_relu=True) -> Tensor",
    "conv_backward": "(Tensor dy, Tensor[] pending, Tensor weight, Tensor x, Tensor[] bn, Tensor? da,"
    f" Tensor? residual_grad, {_CONV}, bool training, bool apply, bool weight_grad, bool prologue_relu=True)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "bn_backward_apply": "(Tensor g, Tensor x, Tensor mean, Tensor scale, Tensor rstd, Tensor sum_g,"
    " Tensor sum_gx, bool training, Tensor? residual_grad) -> Tensor",
    "bn_relu_avg_pool": "(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    "bn_relu_avg_pool_reduce": f"({_HEAD}) -> (Tensor, Tensor)",
    "bn_relu_avg_pool_apply": f"({_HEAD}, Tensor rstd, Tensor sum_g, Tensor sum_gx, bool training) -> Tensor",
}

_library = torch.library.Library("fused_preact", "DEF")


# --- fake kernels: shapes, dtypes and strides of the results, without data ------------------------------


def _empty_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty image tensor with the dtype, device and memory format of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format_of(x))


def _vector(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=reference.statistics_dtype(x.dtype), device=x.device)


def _fake_bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


def _fake_bn_scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(var), torch.empty_like(var), torch.empty_like(var)


def _fake_bn_update_running(mean: list[Tensor], *args: Any) -> None:
    return None


def _fake_conv_fprop(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    stats: bool,
    *relus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = reference.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = _empty_like(x, (x.shape[0], weight.shape[0], *size))
    channels = weight.shape[0] if stats else 0
    return y, _vector(x, channels), _vector(x, channels)


def _fake_conv_fprop_bn(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *bn: Any,
) -> tuple[Tensor, ...]:
    y, *statistics = _fake_conv_fprop(
        x, scale, shift, weight, bias, None, stride, padding, dilation, groups, True
    )
    return y, *statistics, *(_vector(x, weight.shape[0]) for _ in range(3))


def _fake_conv_dgrad(
    dy: Tensor, weight: Tensor, x: Tensor, scale: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    channels = 0 if scale is None else x.shape[1]
    return _empty_like(x, tuple(x.shape)), _vector(x, channels), _vector(x, channels)


def _fake_conv_wgrad(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, *args: Any
) -> Tensor:
    return torch.empty_like(weight)


def _fake_conv_backward(
    dy: Tensor,
    pending: list[Tensor],
    weight: Tensor,
    x: Tensor,
    bn: list[Tensor],
    da: Tensor | None,
    residual_grad: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    apply: bool,
    weight_grad: bool,
    relu: bool = True,
) -> tuple[Tensor, ...]:
    dweight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    sum_g, sum_gx, dgamma = (_vector(x, x.shape[1]) for _ in range(3))
    return _empty_like(x, tuple(x.shape)), sum_g, sum_gx, dweight, dgamma


def _fake_bn_backward_apply(g: Tensor, x: Tensor, *args: Any) -> Tensor:
    return _empty_like(x, tuple(x.shape))


def _fake_bn_relu_avg_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1])


def _fake_bn_relu_avg_pool_reduce(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_bn_stats(x)


def _fake_bn_relu_avg_pool_apply(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
    return _empty_like(x, tuple(x.shape))


# --- which backend serves ---------------------------------------------------------------------------------


@functools.cache
def _triton_table() -> Any:
    """The Triton launchers; imported by the first operation that needs them, never by the package."""
    return importlib.import_module("fused_preact.kernels.triton")


_TRITON_MISSING = (
    None
    if importlib.util.find_spec("triton")
    else "the package triton is not installed (CUDA builds of torch bring it; else pip install triton)"
)


def _triton_missing() -> str | None:
    """Why Triton cannot serve at all in this process, or None. Found out at import: Dynamo traces this."""
    return _TRITON_MISSING


@functools.cache
def _warn_without_triton() -> None:
    warnings.warn(
        f"fused_preact: {_triton_missing()}; plain PyTorch serves instead, without fusion",
        RuntimeWarning,
        stacklevel=3,
    )


def _beyond_triton(args: tuple[Any, ...]) -> bool:
    """Whether the reference serves this call on every device.

    float64 (the oracle's dtype), no elements, and more than 2^31 pixels: the kernels count elements in 64 bits but
    pixels in 32.
    """
    # The one operation whose first argument is a list, bn_update_running, has nothing but vectors.
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    if first.dtype == torch.float64:  # and with it every other tensor's
        return True
    for t in args:
        if isinstance(t, Tensor):
            elements = t.numel()
            if elements == 0 or (elements >= 2**31 and t.dim() > 1 and elements // t.shape[1] >= 2**31):
                return True
    return False


def _triton_op(name: str) -> Callable[..., Any]:
    """The kernel registered for GPUs: Triton's launcher, or the reference for what it does not serve."""
    fallback = getattr(reference, name)

    def serve(*args: Any) -> Any:
        if _triton_missing() is not None:
            _warn_without_triton()
            return fallback(*args)
        if _beyond_triton(args):
            return fallback(*args)
        return getattr(_triton_table(), name)(*args)

    return serve


_triton = SimpleNamespace(**{name: _triton_op(name) for name in _SCHEMAS})

_cpu_missing: str | None = None
"""Why there are no compiled CPU kernels, or None where they are loaded, from ``_cpu_library``."""


@functools.cache
def _warn_without_cpu_kernels() -> None:
    warnings.warn(
        f"fused_preact: {_cpu_missing}; plain PyTorch serves instead, without fusion",
        RuntimeWarning,
        stacklevel=3,
    )


def _cpu_op(name: str) -> Callable[..., Any]:
    """The kernel registered for the CPU where no compiled one is: the reference, saying so once."""
    fallback = getattr(reference, name)

    def serve(*args: Any) -> Any:
        tensors = [
            t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)
        ]
        if all(t.dtype != torch.float64 for t in tensors):
            _warn_without_cpu_kernels()
        return fallback(*args)

    return serve


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    for _key in ("CUDA", "XPU"):
        _library.impl(_name, getattr(_triton, _name), _key)
    torch.library.register_fake(f"fused_preact::{_name}", globals()[f"_fake_{_name}"], lib=_library)

_cpu_library, _cpu_missing = library.load()
if _cpu_missing is not None:
    for _name in _SCHEMAS:
        _library.impl(_name, _cpu_op(_name), "CPU")

_dispatched = SimpleNamespace(**{name: getattr(torch.ops.fused_preact, name).default for name in _SCHEMAS})


class _Requested(threading.local):
    # A context variable would be the natural home, but Dynamo cannot trace ContextVar.get.
    name: str | None = None


_requested = _Requested()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, allowed are {', '.join(map(repr, BACKENDS))}")
    return name


def requested_backend() -> str:
    """The backend asked for in this thread, by :func:`backend` or by ``FUSED_PREACT_BACKEND``, else "auto"."""
    if _requested.name is not None:
        return _requested.name
    return _ENVIRONMENT


_ENVIRONMENT = _checked(os.environ.get("FUSED_PREACT_BACKEND", "auto"), "FUSED_PREACT_BACKEND")


def _unavailable(name: str, device: torch.device | None) -> str | None:
    """Why backend ``name`` cannot serve tensors on ``device`` (None: on any device), or None."""
    if name == "cpu":
        if _cpu_missing is None and device is not None and device.type != "cpu":
            return f"the compiled CPU kernels serve CPU tensors and the tensors are on {device}"
        return _cpu_missing
    if name == "triton":
        missing = _triton_missing()
        if missing is not None:
            return missing
        if device is not None and device.type not in ("cuda", "xpu", "meta") and not _interpreting():
            # (Meta tensors run nothing: they serve to record launches, kernels.triton.common.recording.)
            return (
                f"Triton needs a CUDA, ROCm or XPU device and the tensors are on {device}"
                " (TRITON_INTERPRET=1, set before the process starts, runs the kernels slowly on the CPU)"
            )
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for what this thread runs in the ``with`` block: forward, and the backward of it.

    "auto": Triton on CUDA, ROCm and XPU tensors, compiled kernels on CPU tensors where they were built,
    plain PyTorch otherwise. "triton", "cpu", "reference": that one. The environment variable
    ``FUSED_PREACT_BACKEND`` sets the default.

    Raises ValueError for an unknown name and RuntimeError, saying what is missing, for one that is not there.
    """
    missing = _unavailable(_checked(name, "backend(name)"), None)
    if missing is not None:
        raise RuntimeError(f"backend({name!r}) is not available: {missing}")
    before = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = before


def serving_backend(x: Tensor) -> str:
    """The backend that serves tensors like ``x``: "triton", "cpu" or "reference".

    Raises RuntimeError where the requested backend cannot serve them.
    """
    name = requested_backend()
    if name != "auto":
        missing = _unavailable(name, x.device)
        if missing is not None:
            raise RuntimeError(f"backend {name!r} was asked for and is not available: {missing}")
        # float64 is the oracle's dtype: the reference serves it on every device.
        return "reference" if x.dtype == torch.float64 else name
    if x.device.type in ("cuda", "xpu") and x.dtype != torch.float64 and _triton_missing() is None:
        return "triton"
    if x.device.type == "cpu" and x.dtype != torch.float64 and _cpu_missing is None:
        return "cpu"
    return "reference"


def compiled_for_cpu() -> bool:
    """Whether the operators of ``kernels/cpu`` are loaded."""
    return _cpu_missing is None


def table(requested: str, x: Tensor) -> Any:
    """The operations of the requested backend for tensors like ``x``, as an object with one function each."""
    if requested == "reference":
        return reference
    if torch.compiler.is_compiling():
        return _dispatched
    if requested == "triton":
        # Also for the interpreter's CPU tensors, which the dispatcher would send elsewhere.
        return _triton if _beyond_triton((x,)) else _triton_table()
    if (
        (x.is_cuda or x.is_xpu)
        and _triton_missing() is None
        and not _beyond_triton((x,))
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    ):
        # Where the dispatcher would come back to Python by a way that costs more than the launches. Modes that want
        # to see the ops (selective checkpointing, FLOP counters) and subclasses still go through it. What Triton can
        # serve of the unit's input it can serve of the unit.
        return _triton_table()
    return _dispatched


def run(
    k: Any,
    memo: dict[Any, Any] | None,
    key: Any,
    function: Callable[..., list[Tensor | None]],
    constants: Any,
    tensors: Sequence[Tensor | None],
    held: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """``function(k, constants, tensors)``, which a backend may remember in ``memo`` and do again with less work.

    ``memo`` belongs to tensors of the same shapes, dtypes and device, and to the tensors ``held`` in ``constants``;
    ``key`` names the function and what else it depends on; ``tensors[0]`` is not None. Triton's backend remembers the
    launches (:mod:`.kernels.triton.tape`), the others nothing.
    """
    replayed = None if memo is None else getattr(k, "replayed", None)
    if replayed is None:
        return function(k, constants, tensors)
    found: list[Tensor | None] = replayed(k, memo, key, function, constants, tensors, held)
    return found
