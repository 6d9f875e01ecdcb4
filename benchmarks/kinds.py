"""Where the time of a step goes, by kind of work, from PyTorch's profiler."""

from __future__ import annotations

import re

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import Candidate

# First match wins. Names are those of CPU operators and of CUDA kernels.
_PATTERNS = (
    ("fused", r"fused_preact|_conv_(fprop|dgrad|wgrad)_kernel|_bn_(stats|backward|relu)\w*_kernel|_finalize"),
    (
        "convolution",
        r"conv|mkldnn|onednn|cudnn.*(fprop|dgrad|wgrad)|implicit|xmma|cutlass|wgrad|dgrad|nchwToNhwc",
    ),
    ("optimiser", r"_foreach|multi_tensor|sgd"),
    ("batch norm", r"batch_norm|batchnorm|\bbn_"),
    ("relu", r"relu|threshold|clamp"),
    ("addition", r"aten::add_?$|CUDAFunctor_add"),
    ("compiled pointwise", r"triton_|cpp_fused|inductor|CompiledFunction"),
    ("matrix multiply", r"addmm|aten::mm$|gemm|gemv"),
)


def kind_of(name: str) -> str:
    """The kind of work of an operator or kernel."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def call(candidate: Candidate) -> None:
    """One call, forward and backward."""
    with candidate.context():
        out = candidate.forward(0)
        if candidate.backward is not None:
            candidate.backward(0, out)


def by_kind(candidate: Candidate, device: torch.device) -> dict[str, float]:
    """Milliseconds of one call by kind, largest first."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        call(candidate)
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        if cuda:
            # Kernels alone: operators repeat the time of the kernels below them.
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            ms = event.self_device_time_total / 1e3
        else:
            ms = event.self_cpu_time_total / 1e3
        if ms > 0:
            kind = kind_of(event.key)
            found[kind] = found.get(kind, 0.0) + ms
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))
