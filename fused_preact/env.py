"""``python -m fused_preact.env``: versions, and which backend serves what, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__, ops

__all__ = ["report"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    if torch.xpu.is_available():
        devices.append(torch.device("xpu"))
    return devices


def _serves(device: torch.device) -> str:
    """One line of dtype -> backend; ``device`` is asked with empty tensors."""
    served = []
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            served.append(f"{name} {ops.serving_backend(torch.empty(0, dtype=dtype, device=device))}")
        except RuntimeError as error:
            return str(error)
    return ", ".join(served)


def _products() -> list[str]:
    """What the CPU kernels' matrix products of 16-bit tensors multiply, and why."""
    lines = []
    for dtype in (torch.bfloat16, torch.float16):
        native, why = torch.ops.fused_preact.cpu_products(dtype)
        name = str(dtype).removeprefix("torch.")
        lines.append(f"  products     of {name} in {name if native else 'float32'} ({why})")
    return lines


def _tables() -> list[str]:
    """Which tuned tables the Triton kernels go by on each GPU here, and how to make one."""
    if ops._unavailable("triton", None) is not None:
        return []
    kernels = "fused_preact.kernels.triton"
    tables = importlib.import_module(f"{kernels}.tables")
    device_of = importlib.import_module(f"{kernels}.common").device_of
    lines = [f"tuned tables   {tables.cache_folder()}"]
    for device in _devices()[1:]:
        name = device_of(torch.empty(0, device=device)).name
        sources = [entry["source"] for entry in tables.entries(name).values()]
        found = ", ".join(f"{sources.count(s)} {s}" for s in ("cache", "shipped") if s in sources)
        lines += [
            f"  {name}: {found or 'no'} entries, the heuristic serves the rest",
            f"    table {tables.cache_path(name)}",
            "    tune with python -m fused_preact.tune --model preact_resnet50 --batch 256 --dtype bf16",
        ]
    if len(lines) == 1:
        lines.append("  no GPU here; on one, python -m fused_preact.tune writes its table there")
    return lines


def report() -> str:
    """The report that the command prints, as text."""
    asked = ops.requested_backend()
    where = "FUSED_PREACT_BACKEND" if "FUSED_PREACT_BACKEND" in os.environ else "the default"
    lines = [
        f"fused_preact   {__version__}",
        f"python         {sys.version.split()[0]} on {platform.platform()}",
        f"torch          {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton         {_version('triton')}",
        f"backend        {asked} ({where})",
    ]
    for name in ("triton", "cpu"):
        reason = ops._unavailable(name, None)
        state = "available" if reason is None else f"not available: {reason}"
        if name == "cpu" and reason is None:
            state += f", instruction set {torch.ops.fused_preact.cpu_instruction_set()}, {ops._cpu_library}"
        lines.append(f"  {name:<12} {state}")
        if name == "cpu" and reason is None:
            lines += _products()
    lines.append(
        "  reference    available: plain PyTorch, serves float64 everywhere and whatever no kernel serves"
    )
    lines += [f"serving {device.type:<6} {_serves(device)}" for device in _devices()]
    lines += _tables()
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
