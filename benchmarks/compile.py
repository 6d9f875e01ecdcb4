"""Compile every kernel a training step would launch, for chips that are not there, and read what came out.

The launches are recorded from real training steps of real networks on meta tensors, so the list is what the code
would choose, not a list somebody keeps. Triton's own ptxas, cuobjdump and nvdisasm (in its package) tell registers,
spills, shared memory and tensor-core instructions; on AMD the assembly says the same of itself.
"""

from __future__ import annotations

import argparse
import collections
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fused_preact

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
TENSOR_CORE = {
    "cuda": r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?((?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\S*)",
    "hip": r"^\s+(v_mfma\S*)",
}


@dataclass(frozen=True)
class Job:
    """One kernel with everything that its machine code depends on."""

    network: str
    dtype: str
    target: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> str:
        """The tile's sizes as in the configuration."""
        blocks = [v for k, v in self.constants if k.startswith("BLOCK")]
        return "x".join(map(str, blocks))


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a job."""

    registers: int
    spills: int
    shared: int
    tensor_core: int
    instruction: str = field(default="")


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
    jobs = (_job(network, dtype, target, launch) for launch in launches)
    return list(dict.fromkeys(jobs))


def _job(network: str, dtype: str, target: str, launch: Any) -> Job:
    kernel = launch.kernel
    annotated = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, aligned = [], [], []
    for name in kernel.arg_names:
        value = launch.arguments[name]
        kind = _kind(value)
        # As Triton's own launcher specialises: None and 1 become constants, alignment to 16 is told.
        if name in annotated or value is None or (kind.startswith("i") and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, kind))
        if kind.startswith("*") or (kind.startswith("i") and value % 16 == 0):
            aligned.append(name)
    return Job(
        network,
        dtype,
        target,
        f"{kernel.__module__}:{kernel.__name__}",
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        launch.num_warps,
        launch.num_stages,
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "constexpr"


def compile_job(job: Job) -> Resources:
    """Compile one job and read its resources; raises where the compiler does."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    position = {n: i for i, n in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature=dict(job.signature),
        constexprs={(position[n],): v for n, v in job.constants},
        attrs={(position[n],): [["tt.divisibility", 16]] for n in job.aligned},
    )
    (backend, arch, _), _ = TARGETS[job.target]
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if backend == "hip":
        return _amd_resources(compiled)
    return _nvidia_resources(compiled)


def _nvidia_resources(compiled: Any) -> Resources:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", cubin.name)
        sass = _run(tools / "nvdisasm", "-c", cubin.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    stack = int(re.findall(r"STACK:(\d+)", usage)[0])
    found = re.findall(TENSOR_CORE["cuda"], sass, re.MULTILINE)
    # Spilled registers live on the stack; a kernel without a stack frame has none.
    spills = stack if re.search(r"\b(STL|LDL)\b", sass) else 0
    return Resources(registers, spills, compiled.metadata.shared, len(found), _commonest(found))


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0])

    found = re.findall(TENSOR_CORE["hip"], assembly, re.MULTILINE)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Resources(number("vgpr_count"), spills, compiled.metadata.shared, len(found), _commonest(found))


def _commonest(instructions: list[str]) -> str:
    names = collections.Counter(i.split(".")[0] for i in instructions)
    return names.most_common(1)[0][0] if names else ""


def _run(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


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
    if ":_conv_" in job.kernel and job.dtype == "bf16":
        wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[job.target]
        if not resources.instruction.startswith(wanted):
            found.append(f"tensor-core instruction is {resources.instruction or 'none'}, wanted {wanted}")
    return found


def all_jobs(targets: Iterable[str], networks: Iterable[str], dtypes: Iterable[str]) -> list[Job]:
    """The distinct jobs of the given networks; a kernel that two networks share is listed once."""
    seen: dict[tuple[Any, ...], Job] = {}
    for target in targets:
        for dtype in dtypes:
            for network in networks:
                for job in record(network, dtype, target):
                    values = tuple(v for k, v in asdict(job).items() if k != "network")
                    seen.setdefault(_frozen(values), job)
    return list(seen.values())


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (tuple, list)) else value


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
        _write(args.csv, _csv(rows))
    if args.markdown:
        _write(args.markdown, _markdown(rows))
    return 1 if bad else 0


Row = tuple[Job, "Resources | str", list[str]]


def _line(job: Job, resources: Resources | str, wrong: list[str]) -> str:
    name = job.kernel.split(":_")[1].removesuffix("_kernel")
    head = f"{job.target:7} {job.dtype:9} {name:22} {job.tile:12} w{job.num_warps} s{job.num_stages}"
    if isinstance(resources, str):
        return f"{head}  FAILED {resources.splitlines()[0]}"
    tail = f"  {resources.registers:3} regs {resources.spills:4} spills {resources.shared:6} shared"
    return f"{head}{tail}  {resources.tensor_core:4} {resources.instruction}  {'; '.join(wrong)}"


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["target", "dtype", "network", "kernel", "tile", "warps", "stages", "constants"]
    writer.writerow([*columns, "registers", "spills", "shared", "tensor_core", "instruction", "problem"])
    for job, resources, wrong in rows:
        name = job.kernel.split(":_")[1].removesuffix("_kernel")
        constants = " ".join(f"{k}={v}" for k, v in job.constants if not k.startswith("BLOCK"))
        row = [job.target, job.dtype, job.network, name, job.tile, job.num_warps, job.num_stages, constants]
        measured = [""] * 5 if isinstance(resources, str) else list(asdict(resources).values())
        writer.writerow([*row, *measured, "; ".join(wrong)])
    return out.getvalue()


def _markdown(rows: list[Row]) -> str:
    import triton

    groups: dict[tuple[str, str, str], list[Resources]] = collections.defaultdict(list)
    for job, resources, _ in rows:
        if not isinstance(resources, str):
            groups[job.target, job.dtype, job.kernel.split(":_")[1].removesuffix("_kernel")].append(resources)
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


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
