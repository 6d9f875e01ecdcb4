"""Compile candidates ahead, in other processes: what the cost model reads registers and spills from.

On the device being tuned this also fills Triton's cache, so that the launches that follow need not compile.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor

from triton.runtime import JITFunction

from ..kernels.triton.choose import Problem, forced
from ..kernels.triton.common import Device, Launch, recording
from ..kernels.triton.configs import ConvConfig
from ..kernels.triton.crosscompile import Resources, compile_source, source_of
from .trial import make_inputs, run

__all__ = ["Compiler", "conv_launch"]


def conv_launch(problem: Problem, config: ConvConfig, device: Device) -> Launch:
    """The launch that the configuration leads to, recorded on meta tensors."""
    with recording(device) as launches, forced("fused", config):
        run(problem, make_inputs(problem, "meta"))
    return next(found for found in launches if found.kernel.__name__ == f"_conv_{problem.op}_kernel")


class Compiler:
    """Compiles in a pool of processes; the results come when asked for."""

    def __init__(self, device: Device, workers: int | None = None) -> None:
        self.device = device
        # Spawned: a process with a CUDA context must not be forked.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers or max(1, (os.cpu_count() or 2) - 1), mp_context=context)

    def submit(self, problem: Problem, config: ConvConfig) -> Future[Resources] | None:
        """Start compiling; None in the interpreter, where nothing can be compiled."""
        launch = conv_launch(problem, config, self.device)
        if not isinstance(launch.kernel, JITFunction):
            return None
        job = functools.partial(compile_source, source_of(launch), self.device.backend, self.device.arch)
        return self.pool.submit(job)

    def close(self) -> None:
        """Forget what has not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)
