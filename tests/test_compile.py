"""A slice of ``python -m benchmarks compile``: what the compiler makes of the kernels, without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("compile")  # one worker compiles for all of them
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """About 60 kernels over all targets, dtypes and networks; a process of its own, without the interpreter."""
    out = tmp_path_factory.mktemp("compile") / "kernels.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "compile",
        "--limit",
        "64",
        "--workers",
        "2",
        "--csv",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    with out.open() as file:
        return list(csv.DictReader(file))


def test_slice_is_wide(compiled: list[dict[str, str]]) -> None:
    assert len(compiled) >= 55
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in compiled} == {"bf16", "fp32", "fp32-ieee"}
    assert {"conv_fprop", "conv_dgrad", "conv_wgrad"} <= {row["kernel"] for row in compiled}


def test_no_problem(compiled: list[dict[str, str]]) -> None:
    """No compiler error, no spills on sm_80 and sm_90, shared memory within the chip's, tensor cores in bf16."""
    bad = [
        f"{r['target']} {r['dtype']} {r['kernel']} {r['tile']}: {r['problem']}"
        for r in compiled
        if r["problem"]
    ]
    assert not bad, "\n".join(bad)


def test_wgmma_on_hopper(compiled: list[dict[str, str]]) -> None:
    rows = [
        r
        for r in compiled
        if r["target"] == "sm_90" and r["dtype"] == "bf16" and r["kernel"].startswith("conv")
    ]
    assert rows
    assert all(r["instruction"] == "HGMMA" and int(r["tensor_core"]) > 0 for r in rows)


def test_problems_are_found() -> None:
    """The check itself: spills, too much shared memory and a missing instruction are reported."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.compile import Job, Resources, Source, problems

    job = Job("n", "bf16", "sm_90", Source("m:_conv_fprop_kernel", (), (), (), 8, 3))
    assert problems(job, Resources(128, 0, 1024, 4, "HGMMA")) == []
    assert problems(job, Resources(255, 16, 1024, 4, "HGMMA"))
    assert problems(job, Resources(128, 0, 300 * 1024, 4, "HGMMA"))
    assert problems(job, Resources(128, 0, 1024, 4, "HMMA"))
    assert problems(job, "CompilationError: x")
