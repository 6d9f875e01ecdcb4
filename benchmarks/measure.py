"""Timing: candidates in turns inside one process, medians with their spread, ratios paired round by round.

Machines drift (clocks, neighbours, temperature), so nothing is measured first and compared with something measured
later: every round runs every candidate once, in an order drawn anew, and a speed-up is the median over the rounds of
the ratio inside one round.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

PHASES = ("forward", "backward", "both")
SLOW_ROUNDS = 2
"""Rounds of a candidate that is too slow to go on with."""


class Candidate(NamedTuple):
    """Something to time. ``forward(i)`` works on the i-th input, ``backward(i, out)`` on what it returned."""

    name: str
    forward: Callable[[int], Any]
    backward: Callable[[int, Any], Any] | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Entered around a block of calls, outside of what is timed: how a peer replaces PyTorch's operators."""


@dataclass
class Samples:
    """Milliseconds per call, one value a round, for each phase that was run."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def phase(self, name: str) -> list[float]:
        """The rounds of one phase; "both" adds forward and backward of the same round."""
        if name == "both":
            return [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return list(getattr(self, name))


class Spread(NamedTuple):
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation; raises ValueError for no values."""
    if not values:
        raise ValueError("values: got none, allowed are one or more")
    ordered = sorted(values)

    def at(q: float) -> float:
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return Spread(at(0.2), at(0.5), at(0.8))


def speedup(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster ``other`` is than ``base``, paired round by round; ``other`` may have stopped early."""
    return spread([b / o for b, o in zip(base[: len(other)], other, strict=True)])


class Clock:
    """Marks on the device's own time line: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A point in time, recorded without waiting for the device."""
        if not self.cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Let the device reach every mark."""
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks."""
        return start.elapsed_time(end) if self.cuda else (end - start) / 1e6


def _block(candidate: Candidate, first: int, calls: int, clock: Clock) -> tuple[float, float]:
    """Forward and backward milliseconds per call over ``calls`` calls."""
    marks = []
    with candidate.context():
        clock.wait()
        for i in range(first, first + calls):
            start = clock.mark()
            out = candidate.forward(i)
            middle = clock.mark()
            if candidate.backward is not None:
                candidate.backward(i, out)
            del out  # freeing the outputs is part of what a user pays
            marks.append((start, middle, clock.mark()))
        clock.wait()
    forward = sum(clock.ms(a, b) for a, b, _ in marks) / calls
    return forward, sum(clock.ms(b, c) for _, b, c in marks) / calls


class Measured(NamedTuple):
    """Samples by candidate, the errors of those that failed, and what cut others short."""

    samples: dict[str, Samples]
    errors: dict[str, str]
    notes: dict[str, str]
    others: float | None
    """Cores that other processes kept busy during the rounds (:class:`Others`)."""


class Others:
    """How much of the machine other processes use, from when this is made: what load averages cannot tell.

    A load average holds the minutes before, among them this process's own compilers. Here the process's own CPU time
    and its finished children's are taken off. Time stolen by a hypervisor's other guests counts as others' too.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Clock and CPU seconds of others so far; None where the system does not tell."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are inside user.
        ticks = [int(field) for field in fields[:8]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy - (own.user + own.system + own.children_user + own.children_system)

    def cores(self) -> float | None:
        """Cores that others kept busy since, on average; None where the system does not tell."""
        now = self._now()
        if now is None or self._start is None:
            return None
        return max(0.0, (now[1] - self._start[1]) / max(now[0] - self._start[0], 1e-9))


def now() -> float:
    """Seconds on the host's clock."""
    return time.monotonic()


def one_line(error: BaseException) -> str:
    """An exception as one short line for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def interleave(
    candidates: Sequence[Candidate],
    device: torch.device,
    seconds: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 200,
    block_ms: float = 5.0,
    warmup: int = 1,
    slow_s: float = math.inf,
) -> Measured:
    """Time all candidates in turns until ``seconds`` are spent, and at least ``min_rounds`` rounds.

    Calls shorter than ``block_ms`` are repeated inside a round, each on the next input. A candidate that raises is
    left out and its error returned; the others go on. One whose call takes more than ``slow_s`` seconds stops after
    ``SLOW_ROUNDS`` rounds, with a note: it would leave the others few.
    """
    clock = Clock(device)
    calls: dict[str, int] = {}
    errors: dict[str, str] = {}
    notes: dict[str, str] = {}
    for candidate in candidates:
        try:
            per_call = 0.0
            for i in range(warmup + 1):
                per_call = sum(_block(candidate, i, 1, clock))
                # The first call may compile.
                if i and per_call > 1e3 * slow_s:
                    notes[candidate.name] = f"stopped: over {slow_s:g} s a call, {SLOW_ROUNDS} rounds"
                    break
            calls[candidate.name] = max(1, min(200, round(block_ms / max(per_call, 1e-3))))
        except Exception as error:  # a peer's own: it becomes its row
            errors[candidate.name] = one_line(error)
    running = [c for c in candidates if c.name in calls]
    samples = {c.name: Samples() for c in running}
    rng = random.Random(0)
    gc.collect()
    # A whole round untimed: the memory that one candidate leaves behind is laid out anew for the next.
    for candidate in running:
        if candidate.name not in notes:
            _block(candidate, warmup + 1, calls[candidate.name], clock)
    end = time.monotonic() + seconds
    others = Others()
    gc.disable()  # a collection inside one candidate's block would be charged to it
    try:
        for turn in range(max_rounds):
            if turn >= min_rounds and time.monotonic() > end:
                break
            rng.shuffle(running)
            if turn == SLOW_ROUNDS:
                running = [c for c in running if c.name not in notes]
            for candidate in running:
                if not clock.cuda:
                    # Another runtime's threads spin for a while after their work; let them go to sleep.
                    time.sleep(0.002)
                repeat = calls[candidate.name]
                forward, backward = _block(candidate, turn * repeat, repeat, clock)
                samples[candidate.name].forward.append(forward)
                if candidate.backward is not None:
                    samples[candidate.name].backward.append(backward)
    finally:
        gc.enable()
    return Measured(samples, errors, notes, others.cores())


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache, 64 MiB where the machine does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [int(s[:-1]) * units[s[-1]] for s in (p.read_text().strip() for p in sizes) if s[-1:] in units]
    return max(found, default=64 << 20)


def copies_past_cache(set_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many input sets to rotate through so that each is out of the cache when its turn comes again."""
    return max(1, min(most, -(-2 * cache_bytes(device) // max(set_bytes, 1))))


def pin_threads(threads: int | None) -> int:
    """Fix PyTorch's thread count (default: the cores this process may use) and return it."""
    wanted = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(wanted)
    return wanted
