"""Timing runners in turns on a CUDA device, each call on inputs that are not in its cache."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CudaTimer", "Runner", "Timer"]

Runner = Callable[[int], Any]
"""Runs the operation on the i-th set of inputs."""


class Timer(Protocol):
    """What the tuning loop needs of a clock; tests bring their own."""

    def copies(self, bytes_of_inputs: int) -> int:
        """How many sets of inputs to rotate through so that none is in the cache when its turn comes."""

    def __call__(self, runners: dict[str, Runner], seconds: float) -> dict[str, float]:
        """Milliseconds of a call by name; a runner that raises is left out."""


class CudaTimer:
    """CUDA events, medians over rounds; in every round each runner has one block, in an order drawn anew."""

    def __init__(self, device: torch.device) -> None:
        self.cache = int(torch.cuda.get_device_properties(device).L2_cache_size)

    def copies(self, bytes_of_inputs: int) -> int:
        """Enough sets to fill the L2 cache twice."""
        return max(1, min(16, -(-2 * self.cache // max(bytes_of_inputs, 1))))

    def __call__(self, runners: dict[str, Runner], seconds: float) -> dict[str, float]:
        """At least five rounds, then as many as the seconds allow."""
        calls: dict[str, int] = {}
        for name, runner in runners.items():
            try:
                self._block(runner, 0, 3)
                calls[name] = max(1, min(50, round(2.0 / max(self._block(runner, 3, 1), 1e-3))))
            except Exception:  # it cannot be launched here: no time, and so no choice
                torch.cuda.synchronize()
        names, rng = list(calls), random.Random(0)
        samples: dict[str, list[float]] = {name: [] for name in names}
        end = time.monotonic() + seconds
        for turn in range(100):
            if turn >= 5 and time.monotonic() > end:
                break
            rng.shuffle(names)
            for name in names:
                samples[name].append(self._block(runners[name], turn * calls[name], calls[name]))
        return {name: statistics.median(times) for name, times in samples.items()}

    @staticmethod
    def _block(runner: Runner, first: int, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for index in range(first, first + calls):
            runner(index)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls
