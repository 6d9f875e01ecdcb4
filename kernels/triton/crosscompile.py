"""Compile a launch for a chip that need not be there, and read registers, spills and instructions from the result.

With Triton's own ptxas, cuobjdump and nvdisasm; on AMD the assembly says the same of itself. Not in the interpreter:
what it runs cannot be compiled.
"""

from __future__ import annotations

import collections
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .common import Launch

__all__ = ["Resources", "Source", "compile_source", "source_of"]

_TENSOR_CORE = {
    "cuda": r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?((?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\S*)",
    "hip": r"^\s+(v_mfma\S*)",
}
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Source:
    """One kernel with everything that its machine code depends on; can be sent to another process."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a kernel."""

    registers: int
    spills: int
    shared: int
    tensor_core: int
    instruction: str = field(default="")
    async_copies: int = 0
    """Loads that go to shared memory past the registers (LDGSTS, TMA): what a software pipeline keeps in flight."""
    wide_loads: int = 0
    """Loads of 16 bytes a thread, the async ones among them."""


def source_of(launch: Launch) -> Source:
    """The kernel of a recorded launch, specialised as Triton's own launcher would do it."""
    kernel = launch.kernel
    annotated = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, aligned = [], [], []
    for name in kernel.arg_names:
        value = launch.arguments[name]
        kind = _kind(value)
        # None and 1 become constants, alignment to 16 is told.
        if name in annotated or value is None or (kind.startswith("i") and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, kind))
        if kind.startswith("*") or (kind.startswith("i") and value % 16 == 0):
            aligned.append(name)
    return Source(
        f"{kernel.__module__}:{kernel.__name__}",
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        launch.num_warps,
        launch.num_stages,
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "constexpr"


def compile_source(source: Source, backend: str, arch: int | str) -> Resources:
    """Compile for ("cuda", 90) or ("hip", "gfx942") and read the resources; raises where the compiler does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = source.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    position = {n: i for i, n in enumerate(kernel.arg_names)}
    ast = ASTSource(
        kernel,
        signature=dict(source.signature),
        constexprs={(position[n],): v for n, v in source.constants},
        attrs={(position[n],): [["tt.divisibility", 16]] for n in source.aligned},
    )
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    compiled = triton.compile(ast, target=target, options=options)
    return _amd_resources(compiled) if backend == "hip" else _nvidia_resources(compiled)


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
    found = re.findall(_TENSOR_CORE["cuda"], sass, re.MULTILINE)
    # Spilled registers live on the stack; a kernel without a stack frame has none.
    spills = stack if re.search(r"\b(STL|LDL)\b", sass) else 0
    return Resources(
        registers,
        spills,
        compiled.metadata.shared,
        len(found),
        _commonest(found),
        len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", sass)),
        len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*\b128\b", sass)),
    )


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0])

    found = re.findall(_TENSOR_CORE["hip"], assembly, re.MULTILINE)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly))
    return Resources(
        number("vgpr_count"), spills, compiled.metadata.shared, len(found), _commonest(found), 0, wide
    )


def _commonest(instructions: list[str]) -> str:
    names = collections.Counter(i.split(".")[0] for i in instructions)
    return names.most_common(1)[0][0] if names else ""


def _run(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout
