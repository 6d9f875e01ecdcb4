"""Ceilings measured on the machine at hand, and each network's floors at them (:mod:`.counting` counts)."""

from __future__ import annotations

import argparse

import torch

from . import measure, options, results
from .counting import SCHEDULES, Ceilings, Kernel, inference_kernels, network_kernels

_known: dict[tuple[str, torch.dtype], Ceilings] = {}


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Ceilings:
    """The machine's copy bandwidth and GEMM rate, best of many runs, measured once per process."""
    key = device.type, dtype
    if key not in _known:
        _known[key] = Ceilings(_bandwidth(device, seconds / 2), _gemm_rate(device, dtype, seconds / 2))
    return _known[key]


def _best_seconds(candidate: measure.Candidate, device: torch.device, seconds: float) -> float:
    measured = measure.interleave([candidate], device, seconds, min_rounds=3, block_ms=2)
    if measured.errors:
        raise RuntimeError(f"{candidate.name}: {measured.errors[candidate.name]}")
    return min(measured.samples[candidate.name].forward) / 1e3


def _bandwidth(device: torch.device, seconds: float) -> float:
    size = max(256 << 20, min(4 * measure.cache_bytes(device), 1 << 30))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    run = measure.Candidate("copy", lambda i: target.copy_(source))
    return 2 * size / _best_seconds(run, device, seconds)


def _gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    run = measure.Candidate("gemm", lambda i: a @ b)
    return 2.0 * size**3 / _best_seconds(run, device, seconds)


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks roofline``: the ceilings, and each network's floors at them."""
    parser = options.parser("roofline", __doc__, batch=None)
    parser.add_argument("--bandwidth", type=float, help="TB/s to count with instead of the measured ceiling")
    parser.add_argument("--rate", type=float, help="TFLOP/s to count with instead of the measured ceiling")
    setting = options.parse(parser, argv)
    top = _top(setting)
    rows = []
    for model in setting.models:
        batch = setting.batch_for(model)
        item = setting.torch_dtype.itemsize
        for schedule in SCHEDULES:
            kernels = network_kernels(model, batch, item, schedule)
            for phase in measure.PHASES:
                chosen = [k for k in kernels if phase in ("both", k.phase)]
                row = setting.row(model, batch, case="network", candidate=schedule, phase=phase)
                rows.append(_filled(row, chosen, top))
            infer = inference_kernels(model, batch, item, schedule)
            row = setting.row(model, batch, case="inference", candidate=schedule, phase="forward")
            rows.append(_filled(row, infer, top))
    for name, value, unit in (("copy", top.bandwidth, "B/s"), ("gemm", top.rate, "FLOP/s")):
        row = setting.row("", 0, case="ceiling", candidate=name)
        row.value, row.unit = results.number(value), unit
        rows.append(row)
    setting.finish(rows, save=setting.save and not (setting.extra.bandwidth or setting.extra.rate))
    return 0


def _filled(row: results.Row, kernels: list[Kernel], top: Ceilings) -> results.Row:
    row.floor_ms = results.number(top.ms(kernels))
    row.bytes = results.number(sum(k.bytes for k in kernels))
    row.flops = results.number(sum(k.flops for k in kernels))
    return row


def _top(setting: options.Setting) -> Ceilings:
    given: argparse.Namespace = setting.extra
    if given.bandwidth and given.rate:
        return Ceilings(given.bandwidth * 1e12, given.rate * 1e12)
    measured = ceilings(setting.torch_device, setting.torch_dtype)
    return Ceilings(
        given.bandwidth * 1e12 if given.bandwidth else measured.bandwidth,
        given.rate * 1e12 if given.rate else measured.rate,
    )
