"""Compile every kernel a training step would launch, for chips that are not there, and read what came out.

The launches are recorded from real training steps of real networks on meta tensors, so the list is what the code
would choose, not a list somebody keeps. Registers, spills, shared memory and instructions are read from the compiled
code (``fused_preact.kernels.triton.crosscompile``).
"""

from __future__ import annotations

import argparse
import collections
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import fused_preact
from fused_preact.kernels.triton.crosscompile import Resources, Source, compile_source, source_of

from . import results

# Architecture -> (device as the launchers see it, bytes of shared memory a program may have).
TARGETS: dict[str, tuple[tuple[str, int | str, int], int]] = {
    "sm_80": (("cuda", 80, 108), 163 * 1024),
    "sm_90": (("cuda", 90, 132), 227 * 1024),
    "sm_100": (("cuda", 100, 148), 227 * 1024),
    "gfx942": (("hip", "gfx942", 304), 64 * 1024),
}
NETWORKS = {
    "preact_resnet50": (256, 3, 224, 224),
    "cifar_preact_resnet164": (128, 3, 32, 32),
}
# float32 twice: with TF32, PyTorch's default for convolutions, and without.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp32-ieee": torch.float32}


@dataclass(frozen=True)
class Job:
    """One kernel of a network's step, for one chip."""

    network: str
    dtype: str
    target: str
    source: Source

    @property
    def name(self) -> str:
        """Such as "conv_fprop"."""
        return self.source.kernel.split(":_")[1].removesuffix("_kernel")

    @property
    def tile(self) -> str:
        """The tile's sizes as in the configuration."""
        blocks = [v for k, v in self.source.constants if k.startswith("BLOCK")]
        return "x".join(map(str, blocks))


def record(network: str, dtype: str, target: str) -> list[Job]:
    """The distinct jobs of one training step of ``network``."""
    from fused_preact.kernels.triton.common import Device, recording

    device, _ = TARGETS[target]
    with torch.device("meta"):
        model = fused_preact.models.create(network, num_classes=1000)
        x = torch.empty(NETWORKS[network], dtype=DTYPES[dtype])
    model = model.to(DTYPES[dtype], memory_format=torch.channels_last)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype == "fp32"
    try:
        with fused_preact.backend("triton"), recording(Device(*device)) as launches:
            model(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    jobs = (Job(network, dtype, target, source_of(launch)) for launch in launches)
    return list(dict.fromkeys(jobs))


def compile_job(job: Job) -> Resources:
    """Compile one job and read its resources; raises where the compiler does."""
    (backend, arch, _), _ = TARGETS[job.target]
    return compile_source(job.source, backend, arch)


def compile_jobs(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Resources | str]]:
    """Each job with its resources, or with the compiler's error, in order."""
    jobs = list(jobs)
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(compile_job, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield job, future.result()
            except Exception as error:  # the compiler's own: it is the result
                yield job, f"{type(error).__name__}: {error}"


def problems(job: Job, resources: Resources | str) -> list[str]:
    """What is wrong with a compiled kernel: an error, spills, too much shared memory, no tensor cores."""
    if isinstance(resources, str):
        return [resources]
    (backend, arch, _), limit = TARGETS[job.target]
    found = []
    if resources.spills and backend == "cuda" and arch in (80, 90):
        found.append(f"{resources.spills} bytes of spills")
    if resources.shared > limit:
        found.append(f"{resources.shared} bytes of shared memory, the chip has {limit}")
    if job.name.startswith("conv_") and job.dtype == "bf16":
        wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[job.target]
        if not resources.instruction.startswith(wanted):
            found.append(f"tensor-core instruction is {resources.instruction or 'none'}, wanted {wanted}")
    return found


def all_jobs(targets: Iterable[str], networks: Iterable[str], dtypes: Iterable[str]) -> list[Job]:
    """The distinct jobs of the given networks; a kernel that two networks share is listed once."""
    seen: dict[tuple[str, str, Source], Job] = {}
    for target in targets:
        for dtype in dtypes:
            for network in networks:
                for job in record(network, dtype, target):
                    seen.setdefault((target, dtype, job.source), job)
    return list(seen.values())


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks compile``: the table, and exit status 1 where a kernel has a problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compile", description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--model", action="append", choices=list(NETWORKS), help="default: all")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: all")
    parser.add_argument("--limit", type=int, default=0, help="an evenly spread slice of this many kernels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--csv", type=Path, help="write every kernel's row here")
    parser.add_argument("--markdown", type=Path, help="write the summary here (docs/compiled-kernels.md)")
    args = parser.parse_args(argv)
    jobs = all_jobs(args.target or TARGETS, args.model or NETWORKS, args.dtype or DTYPES)
    if args.limit:
        jobs = jobs[:: max(1, len(jobs) // args.limit)][: args.limit]
    rows = []
    bad = 0
    for job, resources in compile_jobs(jobs, args.workers):
        wrong = problems(job, resources)
        bad += bool(wrong)
        rows.append((job, resources, wrong))
        print(_line(job, resources, wrong), flush=True)
    print(f"{len(rows)} kernels compiled, {bad} with a problem")
    if args.csv:
        results.replace(args.csv, _csv(rows))
    if args.markdown:
        results.replace(args.markdown, _markdown(rows))
    return 1 if bad else 0


Row = tuple[Job, "Resources | str", list[str]]


def _line(job: Job, resources: Resources | str, wrong: list[str]) -> str:
    warps, stages = job.source.num_warps, job.source.num_stages
    head = f"{job.target:7} {job.dtype:9} {job.name:22} {job.tile:12} w{warps} s{stages}"
    if isinstance(resources, str):
        return f"{head}  FAILED {resources.splitlines()[0]}"
    tail = f"  {resources.registers:3} regs {resources.spills:4} spills {resources.shared:6} shared"
    return f"{head}{tail}  {resources.tensor_core:4} {resources.instruction}  {'; '.join(wrong)}"


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["target", "dtype", "network", "kernel", "tile", "warps", "stages", "constants"]
    found = [f.name for f in fields(Resources)]
    writer.writerow([*columns, *found, "problem"])
    for job, resources, wrong in rows:
        source = job.source
        constants = " ".join(f"{k}={v}" for k, v in source.constants if not k.startswith("BLOCK"))
        row = [job.target, job.dtype, job.network, job.name, job.tile]
        row += [source.num_warps, source.num_stages, constants]
        measured = [""] * len(found) if isinstance(resources, str) else list(asdict(resources).values())
        writer.writerow([*row, *measured, "; ".join(wrong)])
    return out.getvalue()


def _markdown(rows: list[Row]) -> str:
    import triton

    groups: dict[tuple[str, str, str], list[Resources]] = collections.defaultdict(list)
    for job, resources, _ in rows:
        if not isinstance(resources, str):
            groups[job.target, job.dtype, job.name].append(resources)
    bad = sum(bool(wrong) for _, _, wrong in rows)
    lines = [
        "# Compiled kernels",
        "",
        "Written by `python -m benchmarks compile --markdown docs/compiled-kernels.md`: every kernel that one",
        f"training step of {' and '.join(NETWORKS)} launches, cross-compiled with Triton",
        f"{triton.__version__}. No GPU is involved: this says what the compiler made, not how fast it runs.",
        "",
        f"{len(rows)} kernels, {bad} with a problem (an error, spills on sm_80 or sm_90, more shared memory than the",
        "chip has, a convolution in bf16 without its chip's tensor-core instruction).",
        "",
        "| target | dtype | kernel | variants | registers | spills (bytes) | shared memory (bytes) | tensor cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (target, dtype, kernel), found in groups.items():
        lines.append(
            f"| {target} | {dtype} | {kernel} | {len(found)} | {_range(r.registers for r in found)} |"
            f" {_range(r.spills for r in found)} | {_range(r.shared for r in found)} |"
            f" {_cores(found)} |"
        )
    return "\n".join(lines) + "\n"


def _cores(found: list[Resources]) -> str:
    names = sorted({r.instruction for r in found if r.instruction})
    return f"{_range(r.tensor_core for r in found)} {', '.join(names)}" if names else "–"


def _range(values: Iterable[int]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


if __name__ == "__main__":
    sys.exit(main())
