"""Triton's own CUDA driver and launcher over a libcuda that launches nothing: what a launch hands over.

Our launchers keep compiled kernels and call them directly, by the names that Triton gives to their parts. Here real
kernels are compiled for sm_90, bound by Triton at the first launch and launched by us at the second; the stub notes
the grid and the arguments of both. No GPU is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# What Triton's driver.c asks of the driver API. cuLaunchKernelEx notes the low words of the arguments, whose number
# the process says beforehand.
STUB = r"""
#include <stdint.h>
#include <string.h>
#define OK(name) int name() { return 0; }
int noted_arguments = 0, launches = 0;
uint32_t noted[64][128];
OK(cuInit) OK(cuFuncSetAttribute) OK(cuFuncSetCacheConfig) OK(cuCtxSetCurrent) OK(cuCtxSetLimit) OK(cuModuleUnload)
OK(cuOccupancyMaxActiveClusters) OK(cuTensorMapEncodeTiled) OK(cuTensorMapEncodeIm2col)
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int* v, int attribute, int d) {
  *v = attribute == 97 || attribute == 81 ? 232448 : attribute == 12 || attribute == 82 ? 65536 : 132;
  return 0;
}
int cuFuncGetAttribute(int* v, int attribute, void* f) { *v = attribute == 0 ? 1024 : 0; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)8; return 0; }
int cuCtxGetDevice(int* d) { *d = 0; return 0; }
int cuCtxGetLimit(size_t* v, int l) { *v = 0; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)8; return 0; }
int cuGetErrorString(int e, const char** s) { *s = "stub"; return 0; }
int cuModuleLoadData(void** m, const void* d) { *m = (void*)16; return 0; }
int cuModuleGetFunction(void** f, void* m, const char* n) { *f = (void*)32; return 0; }
int cuPointerGetAttribute(void* out, int a, uint64_t p) { memcpy(out, &p, 8); return 0; }
int cuLaunchKernelEx(const uint32_t* config, void* f, void** arguments, void** extra) {
  if (launches < 64) {
    memcpy(noted[launches], config, 6 * 4);  // grid and block
    for (int i = 0; i < noted_arguments; i++) memcpy(&noted[launches][6 + i], arguments[i], 4);
  }
  launches++;
  return 0;
}
"""

PROCESS = r"""
import ctypes, sys
stub = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

class Driver(CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device=0: 0
        self.get_current_device = lambda: -1  # a CPU tensor's
        self.set_current_device = lambda device: None
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
import fused_preact
from fused_preact import autograd, ops
from fused_preact.kernels.triton import common

launches = ctypes.c_int.in_dll(stub, "launches")
noted_arguments = ctypes.c_int.in_dll(stub, "noted_arguments")
noted = (ctypes.c_uint32 * 128 * 64).in_dll(stub, "noted")
first_way = common.Launcher.__call__
kernels = set()

def twice(launcher, *tensors):
    optional = len(tensors) - sum(t is not None for t in tensors)
    constants = sum(p.is_constexpr for p in launcher._kernel.params)
    # Triton makes constants of integers that are 1 too.
    ones = sum(type(v) is int and v == 1 for v in launcher.values[: len(launcher.values) - constants])
    noted_arguments.value = len(tensors) + len(launcher.values) - optional - constants - ones
    launches.value = 0
    first_way(launcher, *tensors)
    assert launcher.ready, "the compiled kernel is kept"
    first_way(launcher, *tensors)
    assert launches.value == 2, launches.value
    one, two = list(noted[0]), list(noted[1])
    assert one == two, (launcher._kernel.__name__, one, two)
    assert one[:3] == list(launcher.grid) and one[3] == 32 * launcher._num_warps
    assert one[6] == tensors[0].data_ptr() & 0xFFFFFFFF
    kernels.add(launcher._kernel.__name__)

common.Launcher.__call__ = twice
ops.table = lambda requested, x: ops._triton_table()
ops.serving_backend = lambda x: "triton"
unit = fused_preact.PreActBottleneck(8, 16, 2)
x = torch.randn(2, 8, 6, 6, requires_grad=True)
unit(x).sum().backward()
assert len(kernels) == 10, kernels
# By heart: each kernel once, through Triton's launcher too.
common.Launcher.__call__ = first_way
unit = unit.to(memory_format=torch.channels_last)
x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
dy = unit(x).detach()
for call in range(4):
    launches.value = 0
    if call == 3:
        autograd._forward = autograd._backward = None
    unit(x).backward(dy)
    assert launches.value == 24, launches.value
print(triton.__version__, *sorted(kernels))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_kept_kernel_gets_what_triton_would_hand_over(tmp_path: Path) -> None:
    (tmp_path / "stub.c").write_text(STUB)
    library = tmp_path / "libcuda.so.1"
    build = ["cc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*build, str(tmp_path / "stub.c")], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    env = {
        **os.environ,
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "FUSED_PREACT_CACHE": str(tmp_path / "tables"),
    }
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", PROCESS, str(library)], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "_conv_fprop_kernel" in run.stdout
    assert "_sum_site_kernel" in run.stdout
