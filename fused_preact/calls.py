"""When a fused call may stand in for the calls of modules: only where nobody could tell.

That is where each module would run exactly the ``forward`` of its PyTorch class, with nothing around it: no subclass
or instance that replaces ``forward`` or what ``forward`` calls, no hook on the module and none on all modules, no
compiled call, no patched ``nn.Module.__call__``, and nobody who traces the calls. Elsewhere the modules run one by
one.

PyTorch's own functions are remembered when this module is imported: one that is replaced later is noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _nn_module

__all__ = [
    "called",
    "even_padding",
    "has_hooks",
    "is_batch_norm",
    "is_convolution",
    "observed",
    "recomputing",
    "runs",
    "runs_batch_norm",
    "runs_convolution",
    "transforming",
]

_CALL = nn.Module.__call__
_CALL_IMPL = nn.Module._call_impl
# From where forwards are called: with hooks by a function inside.
_CALLS = {
    code
    for code in (
        _CALL_IMPL.__code__,
        *_CALL_IMPL.__code__.co_consts,
        nn.Module._slow_forward.__code__,
    )
    if isinstance(code, CodeType)
}
_BATCH_NORM = nn.BatchNorm2d.forward
_CHECK = nn.BatchNorm2d._check_input_dim
_SYNC_BATCH_NORM = nn.SyncBatchNorm.forward
_SYNC_CHECKS = nn.SyncBatchNorm._check_input_dim, nn.SyncBatchNorm._check_non_zero_input_channels
_CONVOLUTION = nn.Conv2d.forward
_CONVOLVE = nn.Conv2d._conv_forward

# The dictionaries themselves, which nn.Module.__call__ looks into: hooks on the calls of all modules.
_GLOBAL_HOOKS = (
    _nn_module._global_forward_hooks,
    _nn_module._global_forward_pre_hooks,
    _nn_module._global_backward_hooks,
    _nn_module._global_backward_pre_hooks,
)


def transforming() -> bool:
    """Whether a ``torch.func`` transform, forward-mode AD or ``torch.jit.trace`` is at work.

    They need PyTorch's own operations: the closed-form backward has no rules for them. ``torch.compile`` traces
    ours.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing does it over again.

    Running statistics are those of the first time; to update them once more would count the batch twice.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def observed(input: Any) -> bool:
    """Whether somebody follows the calls of all modules: global hooks, tracers, a patched ``nn.Module.__call__``.

    ``input`` is what the module at hand is called with: no tensor where ``torch.fx`` traces symbolically.
    """
    if not isinstance(input, Tensor):
        return True
    first, second, third, fourth = _GLOBAL_HOOKS
    if first or second or third or fourth:
        return True
    if torch.compiler.is_compiling():
        return False
    call = nn.Module.__call__
    return (
        transforming() or (call is not _CALL and not _of_fx(call)) or nn.Module._call_impl is not _CALL_IMPL
    )


def _of_fx(call: Callable[..., Any]) -> bool:
    """Whether tracers of ``torch.fx`` put ``call`` there. Of ours only make_fx's gets to that question.

    It notes in which module an operation ran, and needs no other calls for that. The function's ``__module__`` is
    that of what it wraps.
    """
    scope: dict[str, Any] = getattr(call, "__globals__", {})
    return scope.get("__name__") == "torch.fx._symbolic_trace"


def called(owner: nn.Module) -> nn.Module:
    """The module whose call runs the function that asks, which hangs on ``owner`` as its ``forward``.

    Another one where ``__dict__`` was copied: ``copy.copy``, the replicas of ``nn.DataParallel``. What hangs on an
    instance is not bound to it, so the frame of ``nn.Module.__call__`` is what knows; ``owner`` where another calls.
    """
    frame = sys._getframe(2)
    return frame.f_locals.get("self", owner) if frame.f_code in _CALLS else owner


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of ``module`` itself."""
    held = module.__dict__
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
    )


def runs(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling ``module`` comes down to ``forward(module, ...)``, hooks apart."""
    held, cls = module.__dict__, type(module)
    return not (
        "forward" in held
        or "_call_impl" in held
        or held.get("_compiled_call_impl") is not None
        or cls.forward is not forward
        or cls.__call__ is not nn.Module.__call__
        or cls._call_impl is not nn.Module._call_impl
    )


def is_batch_norm(module: Any) -> bool:
    """Whether ``module`` runs exactly the forward of ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``, hooks apart.

    A subclass may.
    """
    if isinstance(module, nn.SyncBatchNorm):
        held, cls = module.__dict__, type(module)
        return (
            runs(module, _SYNC_BATCH_NORM)
            and "_check_input_dim" not in held
            and "_check_non_zero_input_channels" not in held
            and (cls._check_input_dim, cls._check_non_zero_input_channels) == _SYNC_CHECKS
        )
    return (
        isinstance(module, nn.BatchNorm2d)
        and runs(module, _BATCH_NORM)
        and "_check_input_dim" not in module.__dict__
        and type(module)._check_input_dim is _CHECK
    )


def is_convolution(module: Any) -> bool:
    """Whether ``module`` runs exactly ``nn.Conv2d.forward``, with zeros evenly on both sides, hooks apart."""
    return (
        isinstance(module, nn.Conv2d)
        and runs(module, _CONVOLUTION)
        and "_conv_forward" not in module.__dict__
        and type(module)._conv_forward is _CONVOLVE
        and module.padding_mode == "zeros"
        and (module.padding != "same" or even_padding(module))
    )


def runs_batch_norm(module: Any) -> bool:
    """:func:`is_batch_norm`, and nobody listens."""
    return is_batch_norm(module) and not has_hooks(module)


def runs_convolution(module: Any) -> bool:
    """:func:`is_convolution`, and nobody listens."""
    return is_convolution(module) and not has_hooks(module)


def even_padding(module: nn.Conv2d) -> bool:
    """Whether the padding that "same" stands for has the same size on both sides."""
    return not any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
