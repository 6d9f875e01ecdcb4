"""Micro-benchmarks for pytest-benchmark: ``python -m pytest benchmarks --benchmark-only``.

A small set whose comparison files and histograms work as people know them (``--benchmark-autosave``,
``--benchmark-compare``, ``--benchmark-histogram``). Each candidate is checked against float64 before it is timed. The
interleaved figures of ``python -m benchmarks op`` are the ones to quote: here candidates run one after the other,
under the memory allocator's setting that pytest was started with (it is in ``extra_info``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fused_preact
from benchmarks import allocator, micro, networks, op
from benchmarks.options import Setting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SITES = {
    "1x1-reduce": networks.SiteCase(64, 16, 32, 1, 1, False),
    "3x3": networks.SiteCase(16, 16, 32, 3, 1, False),
    "1x1-expand-identity": networks.SiteCase(16, 64, 32, 1, 1, True),
}
BATCH = 32


@pytest.fixture
def setting() -> Setting:
    """float32 at the thread count of the process; two candidates, without compiling."""
    return Setting("op", [], BATCH, "fp32", DEVICE, ["fused"], 1, torch.get_num_threads(), folder=Path())


@pytest.mark.parametrize("candidate", ["eager channels_last", "fused"])
@pytest.mark.parametrize("site", SITES)
def test_forward_backward(benchmark: Any, setting: Setting, site: str, candidate: str) -> None:
    """One site in training mode, forward and backward."""
    benchmark.group = site
    case = op.site_case(SITES[site], 1, BATCH, 4)
    wrong = micro.problems(case, setting)
    assert candidate not in wrong, f"REFUSED: {wrong}"
    subject = next(s for s in micro.subjects(setting) if s.name == candidate)
    timed = micro.candidate_of(case, subject, setting)
    turn = iter(range(10**9))

    def once() -> None:
        i = next(turn)
        out = timed.forward(i)
        assert timed.backward is not None
        timed.backward(i, out)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with fused_preact.backend(setting.backend):
        benchmark.extra_info["allocator"] = allocator.name()
        benchmark.extra_info["backend"] = fused_preact.serving_backend(torch.empty(1, device=DEVICE))
        benchmark(once)
