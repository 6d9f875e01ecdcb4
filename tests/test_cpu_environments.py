"""The compiled CPU kernels where a process is not a plain one: other processors, threads, worker processes."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.cpp_extension import include_paths
from torch.utils.data import DataLoader, Dataset

import fused_preact
from fused_preact import ops

pytestmark = pytest.mark.skipif(
    ops._cpu_missing is not None, reason=f"no compiled kernels: {ops._cpu_missing}"
)

# Our loops; PyTorch's follow. The matrix products are oneDNN's for AVX2 (test_without_onednn has the fallback).
PROCESSORS = ["avx2", "default"]


def _supported(isa: str) -> bool:
    if isa == "default":
        return True
    flags = Path("/proc/cpuinfo")
    return flags.exists() and {isa, "fma"} <= set(flags.read_text().split())


@pytest.mark.parametrize("isa", PROCESSORS)
def test_operations_as_on_a_lesser_processor(isa):
    """The kernels' own tests, run by what such a processor would run."""
    if not _supported(isa):
        pytest.skip(f"this processor has no {isa}")
    env = {
        **os.environ,
        "FUSED_PREACT_CPU_ISA": isa,
        "ATEN_CPU_CAPABILITY": isa,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    serving = "import torch, fused_preact; print(torch.ops.fused_preact.cpu_instruction_set())"
    used = subprocess.run(
        [sys.executable, "-c", serving], env=env, capture_output=True, text=True, check=True
    )
    assert used.stdout.strip() == isa
    tests = str(Path(__file__).with_name("test_cpu_ops.py"))
    chosen = "not forked and not number_of_threads"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, tests, "-k", chosen], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def _products(**env: str) -> tuple[bool, str]:
    """Whether a process with ``env`` multiplies bfloat16 as it is, and why."""
    code = "import torch, fused_preact; print(*torch.ops.fused_preact.cpu_products(torch.bfloat16), sep=';')"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    native, _, why = run.stdout.strip().partition(";")
    return native == "True", why or run.stderr


# What other processors multiply 16-bit tensors with, and so which code they run.
PRODUCTS = {
    "fp32": {"FUSED_PREACT_CPU_PRODUCTS": "fp32"},
    "native": {"FUSED_PREACT_CPU_PRODUCTS": "native"},
    "native-without-amx": {
        "FUSED_PREACT_CPU_PRODUCTS": "native",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
}


@pytest.mark.parametrize("products", PRODUCTS)
def test_operations_with_other_products(products):
    """A slice of the kernels' tests and the folded networks, in bfloat16, multiplied as elsewhere."""
    asked = PRODUCTS[products]
    native, why = _products(**asked)
    if products != "fp32" and not native:
        pytest.skip(f"no products of bfloat16 here: {why.splitlines()[-1]}")
    assert native == (products != "fp32")
    if products != "native-without-amx" and native == _products()[0]:
        pytest.skip("what this process has: every other test runs it")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    tests = [
        f"{here / 'test_cpu_ops.py'}",
        "-k",
        "bf16 and (1x1 or band or stride2 or chunks or sixteen_bits) and not forked and not interpreter",
        f"{here / 'test_inference.py'}",
    ]
    run = subprocess.run([*command, *tests], env={**os.environ, **asked}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_unknown_products():
    native, error = _products(FUSED_PREACT_CPU_PRODUCTS="fp64")
    assert not native
    assert "ValueError: FUSED_PREACT_CPU_PRODUCTS: got 'fp64', allowed here" in error
    assert "'fp32'" in error


def test_products_follow_onednn():
    """They are oneDNN's: where it is turned off, floats are multiplied, by networks that were folded before too."""
    torch.manual_seed(3)
    units = fused_preact.PreActSequential(fused_preact.PreActBasicBlock(16, 16)).to(torch.bfloat16).eval()
    x = torch.randn(2, 16, 6, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = units(x).float()
        fused_preact.optimize_for_inference(units)
        on = units(x).float()
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.ops.fused_preact.cpu_products(torch.bfloat16) == (False, "oneDNN is turned off")
            off = units(x).float()
    for y in (on, off):
        torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)


ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")  # Debian: g++-aarch64-linux-gnu
SOURCES = sorted((Path(__file__).parents[1] / "kernels" / "cpu").glob("*.cpp"))


@pytest.mark.skipif(ARM_COMPILER is None, reason="no cross-compiler aarch64-linux-gnu-g++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_arm64(source):
    """Templates and all, but for the code generator: PyTorch's headers are the same on every processor."""
    includes = [f"-isystem{path}" for path in include_paths()]
    command = [str(ARM_COMPILER), "-std=c++20", "-fopenmp", "-fsyntax-only", *includes, str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_unknown_instruction_set():
    code = "import torch, fused_preact; fused_preact.PreActBasicBlock(4, 4)(torch.zeros(1, 4, 2, 2))"
    env = {**os.environ, "FUSED_PREACT_CPU_ISA": "avx1024"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ValueError: FUSED_PREACT_CPU_ISA: got 'avx1024', allowed" in run.stderr
    assert "'default'" in run.stderr


def test_without_onednn():
    torch.manual_seed(1)
    unit, x = fused_preact.PreActBottleneck(16, 32), torch.randn(2, 16, 9, 9)
    plain = copy.deepcopy(unit)
    plain.fused = False
    with torch.backends.mkldnn.flags(enabled=False):
        unit(x).square().sum().backward()
        plain(x).square().sum().backward()
    for (name, p), q in zip(unit.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# --- threads ----------------------------------------------------------------------------------------------


def _small_network() -> torch.nn.Module:
    torch.manual_seed(2)
    net = fused_preact.models.cifar_preact_resnet20()
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32))  # running statistics that are not 0 and 1
    return net


def test_one_module_serves_several_threads():
    """Inference by many threads at once, each with its own images: the bits of one thread alone."""
    net = _small_network().eval()
    batches = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(12)]
    with torch.no_grad():
        alone = [net(x) for x in batches]

    def serve(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return net(x)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(serve, batches))
            for i, (a, b) in enumerate(zip(together, alone, strict=True)):
                assert torch.equal(a, b), f"batch {i}"


def test_training_in_several_threads():
    """One network a thread: gradients and buffers have the bits of a run alone."""
    nets = [_small_network() for _ in range(4)]
    images = [torch.randn(4, 3, 32, 32) for _ in nets]

    def train(net: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        F.cross_entropy(net(x), torch.arange(4)).backward()
        return {**{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())}

    alone = [train(copy.deepcopy(net), x) for net, x in zip(nets, images, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, nets, images))
    for mine, expected in zip(together, alone, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(mine[name], tensor), name


# --- worker processes -------------------------------------------------------------------------------------


class _Embedded(Dataset):
    """A data set whose items are a network's outputs: feature extraction in the loader's workers."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net
        self.images = torch.randn(6, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.net(self.images[i : i + 1])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    """The parent has run kernels (its threads and scratch exist) before the workers start."""
    data = _Embedded(_small_network().eval())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: the results are the same bits
    here = torch.stack([data[i] for i in range(len(data))])
    torch.set_num_threads(threads)
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start)
    there = torch.cat(list(loader))
    assert torch.equal(there, here)
