"""What the host pays per site and per unit, by a tensor so small that nothing else costs anything.

Times are wall-clock microseconds of a call, enqueueing on a GPU included; the difference to eager's is the overhead.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_preact

from . import counting, foreign, measure, micro, networks, options, results
from .measure import Candidate, Samples
from .options import Setting
from .results import Row

CHANNELS, SIZE = 8, 2


def _cases() -> list[micro.Case]:
    shape = (1, CHANNELS, SIZE, SIZE)
    site = fused_preact.PreActConv2d(CHANNELS, CHANNELS, 1, bias=False, fused=False)
    unit = fused_preact.PreActBottleneck(CHANNELS, CHANNELS, fused=False)
    none: list[counting.Kernel] = []
    return [
        micro.Case(name, 1, module, shape, shape, False, [], lambda _: none)
        for name, module in (("site", site), ("unit", unit))
    ]


CONVERTED = "fused by conversion"


def _converted(module: nn.Module) -> Callable[[micro.Input], Tensor]:
    """The site or unit as somebody else's module, converted."""
    if isinstance(module, fused_preact.PreActConv2d):
        written: nn.Module = nn.Sequential(module.bn, nn.ReLU(), module.conv)
    else:
        written = foreign.block(module)
    converted = fused_preact.fuse(written.train(module.training))
    return lambda i: converted(i.x)


def _calls(candidates: list[Candidate], setting: Setting, seconds: float) -> dict[str, Samples]:
    """Microseconds per call, host's clock, in turns; forward and backward by difference would double the noise."""
    samples = {c.name: Samples() for c in candidates}
    end = time.monotonic() + seconds
    for turn in range(200):
        if turn >= 5 and time.monotonic() > end:
            break
        for candidate in candidates if turn % 2 else candidates[::-1]:
            forward, backward = _host_block(candidate, 20, setting)
            samples[candidate.name].forward.append(forward)
            samples[candidate.name].backward.append(backward)
    return samples


def _host_block(candidate: Candidate, calls: int, setting: Setting) -> tuple[float, float]:
    forward = backward = 0.0
    for i in range(calls):
        if setting.device == "cuda" and i % 10 == 0:
            torch.cuda.synchronize()  # a full queue would make the host wait for the device
        start = time.perf_counter_ns()
        out = candidate.forward(i)
        middle = time.perf_counter_ns()
        assert candidate.backward is not None
        candidate.backward(i, out)
        forward += middle - start
        backward += time.perf_counter_ns() - middle
    return forward / calls / 1e3, backward / calls / 1e3


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks overhead``; exit status 1 where a result was wrong."""
    setting = options.parse(options.parser("overhead", __doc__, models=(), minutes=0.5), argv)
    rows: list[Row] = []
    for done, case in enumerate(_cases()):
        wrong = micro.problems(case, setting)
        candidates = []
        subjects = micro.subjects(setting)
        if setting.wants(CONVERTED):
            subjects.append(micro.Subject(CONVERTED, _converted, networks.CHANNELS_LAST, "c1"))
        for subject in subjects:
            if subject.name in wrong:
                row = setting.row("", 1, case=case.name, candidate=subject.name, phase="both")
                row.status = wrong[subject.name]
                rows.append(row)
                continue
            candidates.append(micro.candidate_of(case, subject, setting))
        with fused_preact.backend(setting.backend):
            for candidate in candidates:
                _host_block(candidate, 50, setting)
            samples = _calls(candidates, setting, setting.share(done, 2))
            serving = fused_preact.serving_backend(torch.empty(1, device=setting.torch_device))
        for name, sample in samples.items():
            for phase in measure.PHASES:
                times, base = sample.phase(phase), samples[micro.BASE].phase(phase)
                row = setting.row("", 1, case=case.name, candidate=name, phase=phase)
                row.backend = serving if name in (*micro.OURS, CONVERTED) else ""
                row.rounds, row.base, row.unit = str(len(times)), micro.BASE, "us beyond eager"
                row.p20, row.p50, row.p80 = (results.number(v / 1e3) for v in measure.spread(times))
                row.samples = " ".join(f"{t / 1e3:.4g}" for t in times)
                beyond = [t - b for t, b in zip(times, base, strict=True)]
                row.value = results.number(measure.spread(beyond).p50)
                rows.append(row)
    setting.finish(rows)
    return micro.failed(rows)
