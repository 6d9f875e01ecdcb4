"""Memory of a training step: saved activations, peak, and the largest batch that fits.

Saved activations are counted exactly, on meta tensors: every storage that autograd keeps for backward, once, without
parameters and buffers. The peak is measured, in a process of its own: on a CPU as the growth of the peak resident
memory over one step, on a GPU as the allocator's peak, both at two batches, whose difference gives the bytes of an
image. The largest batch is what a budget leaves after weights, gradients, momentum and the fixed part.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_preact

from . import measure, nets, networks, options, results
from .networks import CHANNELS_LAST
from .options import Setting
from .results import Row

MODELS = ("preact_resnet50", "preact_resnet200", "cifar_preact_resnet164", "cifar_preact_resnet1001")
LEAST_SECONDS = 45.0
"""What a process gets however little time is left: a step of ResNet-1001 on two cores, imports included."""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed memory back at once: what is resident is what is in use."""
CANDIDATES = ("eager channels_last", "compile", "fused")


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that ``net(x)`` keeps for backward beside its parameters, its buffers and nothing twice."""
    own = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x).float().sum()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def saved_on_meta(model: str, batch: int, dtype: torch.dtype, fused: bool) -> int:
    """:func:`saved_bytes` of a network in training, without memory or time: nothing is computed."""
    with torch.device("meta"):
        net = fused_preact.models.create(model, num_classes=networks.classes(model), fused=fused)
    size = networks.image_size(model)
    x = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
    net = net.to(dtype, memory_format=CHANNELS_LAST).train()
    return saved_bytes(net, x.contiguous(memory_format=CHANNELS_LAST))


def step_once(model: str, candidate: str, batch: int, setting: Setting) -> int:
    """Growth of the peak over one training step, in bytes, in this process."""
    device = setting.torch_device
    net = networks.create(model).to(device, memory_format=CHANNELS_LAST).train()
    nets.fuse(net, candidate == "fused")
    function: Any = torch.compile(net, dynamic=False) if candidate == "compile" else net
    size = networks.image_size(model)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=CHANNELS_LAST)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    if candidate == "compile":
        # Compilers run inside the process and are no part of the step: they come first, on the least batch. The
        # graph of another batch would be another compilation, so here the batch itself has to do.
        _one_step(function, x, labels, setting)
    else:
        _one_step(function, x[:2], labels[:2], setting)  # threads, workspaces, gradients
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _one_step(function, x, labels, setting)
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed is no part of what the step may reuse
    # Linux keeps the process's high-water mark; writing 5 sets it back to what is resident now.
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        _one_step(function, x, labels, setting)
        return _status("VmHWM") - before
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _one_step(function, x, labels, setting)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _one_step(function: Any, x: Tensor, labels: Tensor, setting: Setting) -> None:
    with nets.autocast(setting), fused_preact.backend(setting.backend):
        F.cross_entropy(function(x), labels).backward()


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak(model: str, candidate: str, batch: int, setting: Setting, seconds: float) -> int:
    """:func:`step_once` in a process of its own: an allocator that has seen other networks tells nothing.

    Raises subprocess.TimeoutExpired after ``seconds``.
    """
    command = [sys.executable, "-m", "benchmarks", "memory", "--model", model, "--batch", str(batch)]
    command += ["--dtype", setting.dtype, "--device", setting.device, "--threads", str(setting.threads)]
    command += ["--backend", setting.backend, "--child", candidate]
    # glibc else keeps freed blocks of up to 32 MB: resident memory would follow its habits, not the step's needs.
    env = {**os.environ, **RETURNED}
    # A process over the machine's memory is killed; the row says so.
    done = subprocess.run(command, cwd=results.ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(last)
    return int(done.stdout.split()[-1])


def _row(setting: Setting, model: str, batch: int, name: str, phase: str, value: float) -> Row:
    row = setting.row(model, batch, case="network", candidate=name, phase=phase)
    row.value, row.unit = results.number(value), "images" if phase.startswith("fits") else "B"
    row.allocator = "returned"
    return row


def _saved_rows(model: str, batch: int, setting: Setting) -> list[Row]:
    rows = []
    for name, fused in (("eager channels_last", False), ("fused", True)):
        if name == "fused" or setting.wants(name):
            total = saved_on_meta(model, batch, setting.torch_dtype, fused)
            rows.append(_row(setting, model, batch, name, "saved", total))
    return rows


def _peak_rows(model: str, batch: int, setting: Setting, budget: float) -> list[Row]:
    rows: list[Row] = []
    net = networks.create(model)
    weights = 3 * 4 * sum(p.numel() for p in net.parameters())
    wanted = [name for name in CANDIDATES if name == "fused" or setting.wants(name)]
    total = len(setting.models) * len(wanted)
    for index, name in enumerate(wanted, start=setting.models.index(model) * len(wanted)):
        # Two processes; what quick ones leave over serves the deep ones and the compilers.
        seconds = max(LEAST_SECONDS, setting.share(index, total) / 2)
        setting.say(f"{model}: peak of {name}")
        try:
            half, full = (_peak(model, name, b, setting, seconds) for b in (max(batch // 2, 2), batch))
        except subprocess.TimeoutExpired:
            row = _row(setting, model, batch, name, "peak", 0)
            row.status, row.value = f"stopped: no peak after {seconds:.0f} s", ""
            rows.append(row)
            continue
        except Exception as error:  # out of memory, a peer's own error: a row
            row = _row(setting, model, batch, name, "peak", 0)
            row.status, row.value = f"ERROR {measure.one_line(error)}", ""
            rows.append(row)
            continue
        rows.append(_row(setting, model, batch, name, "peak", full))
        per_image = (full - half) / (batch - max(batch // 2, 2)) if batch > 2 else 0.0
        if per_image > 0:
            fixed = max(0.0, full - per_image * batch)
            rows.append(_row(setting, model, batch, name, "per image", per_image))
            fits = max(0, int((budget * 2**30 - weights - fixed) // per_image))
            rows.append(_row(setting, model, batch, name, f"fits {budget:g} GiB", fits))
    return rows


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks memory``."""
    parser = options.parser("memory", __doc__, models=MODELS)
    parser.add_argument("--budget", type=float, default=16.0, help="GiB that the largest batch has to fit")
    parser.add_argument("--no-peak", action="store_true", help="count the saved activations only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    quiet = argv is not None and "--child" in argv
    setting = options.parse(parser, argv, quiet=quiet)
    if setting.extra.child:
        print(step_once(setting.models[0], setting.extra.child, setting.batch or 2, setting))
        return 0
    status = 0
    for model in setting.models:
        batch = setting.batch_for(model)
        if setting.device == "cpu" and not setting.batch:
            # Deep networks in a laptop's memory and a bearable time.
            batch = {"preact_resnet200": 4, "cifar_preact_resnet1001": 16}.get(model, batch)
        setting.finish(_saved_rows(model, batch, setting))
        if not setting.extra.no_peak:
            rows = _peak_rows(model, batch, setting, setting.extra.budget)
            setting.finish(rows)
            status |= int(any(r.candidate == "fused" and r.status != "ok" for r in rows))
    return status
