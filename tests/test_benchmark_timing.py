"""How the benchmark suite times: percentiles, rounds, the load of others, the allocator's setting."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is part of the checkout, not of the package

from benchmarks import allocator, measure, micro, networks, peers
from benchmarks.options import Setting
from benchmarks.results import Row


def test_percentiles_and_paired_ratios() -> None:
    assert measure.spread([5, 1, 2, 3, 4]) == pytest.approx((1.8, 3, 4.2))
    # Both sides slow down by ten in the last round: the ratio does not see it.
    assert measure.speedup([2, 2, 20], [1, 1, 10]) == (2, 2, 2)
    with pytest.raises(ValueError, match="got none"):
        measure.spread([])


def test_failing_candidate_is_left_out() -> None:
    def fail(i: int) -> None:
        raise RuntimeError("no kernel for this")

    candidates = [measure.Candidate("good", lambda i: i), measure.Candidate("bad", fail)]
    measured = measure.interleave(candidates, torch.device("cpu"), 0, min_rounds=3)
    assert measured.errors == {"bad": "RuntimeError: no kernel for this"}
    assert len(measured.samples["good"].forward) == 3


def test_a_slow_candidate_stops_and_says_so() -> None:
    """Its ratio is that of the rounds it ran in, beside the base's same rounds."""
    candidates = [
        measure.Candidate("base", lambda i: None),
        measure.Candidate("slow", lambda i: time.sleep(0.02)),
    ]
    measured = measure.interleave(candidates, torch.device("cpu"), 0, min_rounds=4, slow_s=0.01)
    assert [len(measured.samples[n].forward) for n in ("base", "slow")] == [4, measure.SLOW_ROUNDS]
    row = Row(candidate="slow")
    micro.fill(row, measured, "forward", "base")
    assert row.note == "stopped: over 0.01 s a call, 2 rounds"
    assert float(row.speedup_p50) < 1
    assert measure.speedup([1, 3, 100], [1, 1]) == measure.spread([1, 3]), "the third round has no pair"


def test_own_work_is_no_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 4 s two cores are busy for 6 s, 0.5 s of it stolen; this process and its children account for 5 s."""
    tick = os.sysconf("SC_CLK_TCK")

    def machine(clock: float, user: float, idle: float, steal: float, own: float, children: float) -> None:
        # user, nice, system, idle, iowait, irq, softirq, steal, guest: a guest's time is in user already.
        fields = (user, 0, 0, idle, idle / 2, 0, 0, steal, user)
        line = " ".join(str(round(f * tick)) for f in fields)
        monkeypatch.setattr(
            measure, "Path", lambda _: SimpleNamespace(read_text=lambda: f"cpu  {line}\ncpu0 1")
        )
        monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: clock))
        monkeypatch.setattr(measure.os, "times", lambda: os.times_result((own, 0, children, 0, clock)))

    machine(10, user=100, idle=50, steal=1, own=20, children=3)
    others = measure.Others()
    machine(14, user=105.5, idle=52, steal=1.5, own=23, children=5)
    assert others.cores() == pytest.approx(0.25)


# --- the allocator's setting ------------------------------------------------------------------------------


def test_allocator_setting_is_applied_once_and_respects_the_user() -> None:
    environment: dict[str, str] = {"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=on"}
    linux = platform.libc_ver()[0] == "glibc"
    assert allocator.prepare(["op"], environment) == linux
    if linux:
        assert environment["GLIBC_TUNABLES"] == f"glibc.cpu.x86_shstk=on:{allocator.TUNABLES}"
    assert not allocator.prepare(["op"], environment), "the second process does not start a third"
    for own in (
        {"MALLOC_ARENA_MAX": "1"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"},
        {"LD_PRELOAD": "jemalloc.so"},
    ):
        kept = dict(own)
        assert not allocator.prepare(["op"], kept)
        assert kept == own
    for arguments in (["op", "--allocator", "default"], ["op", "--allocator=default"]):
        assert not allocator.prepare(arguments, {})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_stays_with_the_process() -> None:
    """The setting does what the pages say: 64 MB used again and again are not mapped again and again."""
    script = "import ctypes, resource\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
    script += "def use():\n    p = libc.malloc(1 << 26)\n    ctypes.memset(p, 1, 1 << 26)\n"
    script += "    libc.free(ctypes.c_void_p(p))\n"
    script += (
        "use(); a = resource.getrusage(0).ru_minflt\nuse(); use(); print(resource.getrusage(0).ru_minflt - a)"
    )

    def faults(environment: dict[str, str]) -> int:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    plain = {"PATH": os.environ["PATH"]}
    assert faults(plain) > 1000
    assert allocator.prepare(["op"], plain)
    assert faults(plain) < 100


# --- peers ------------------------------------------------------------------------------------------------


def test_a_peer_replaces_operators_only_inside_its_blocks() -> None:
    state = []

    @contextlib.contextmanager
    def entered():
        state.append("in")
        yield
        state.append("out")

    candidate = measure.Candidate("peer", lambda i: state.append("run"), None, entered)
    measured = measure.interleave([candidate], torch.device("cpu"), 0, min_rounds=1, max_rounds=1, block_ms=0)
    assert measured.errors == {}
    assert state == ["in", "run", "out"] * 4, "a warm-up, the calibration, a round untimed, a round"
    assert [p.name for p in peers.training(Setting("step", [], 2, "bf16", "cuda", ["FlagGems"], 1, 1))] == [
        peers.BASE,
        "FlagGems",
    ]
    ours = peers.training(Setting("step", [], 2, "bf16", "cuda", ["fused"], 1, 1))
    assert [(p.name, p.ours) for p in ours] == [
        (peers.BASE, False),
        *((name, True) for name in ("fused", "fused by conversion", "fused graph")),
    ]


def test_frozen_peer_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's cache belongs to the class's code: what the compiled peer left there is not the frozen network."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(torch._inductor.config.freezing)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model=None, **_: compiler(model, backend=backend, dynamic=False)
    )
    torch._dynamo.reset()
    setting = Setting("infer", [], 2, "fp32", "cpu", ["compile", "inductor"], 1, 1)
    x = torch.randn(2, 3, 32, 32)
    net = networks.create("cifar_preact_resnet20").eval()
    with torch.no_grad():
        outs = [p.prepare(copy.deepcopy(net), x, setting)(x) for p in peers.inference(setting)]
    assert graphs == [False, True]
    torch.testing.assert_close(outs[0], outs[2])
    torch._dynamo.reset()


def test_graph_peers_record_the_network_and_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's streams and graphs: a replay computes again from the buffer that the images go to."""
    replays = []

    class Graph:
        def replay(self) -> None:
            replays.append(seen[-1].clone())

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    def inside(*args: Any) -> Any:
        return contextlib.nullcontext()

    for name, stand_in in (("Stream", Stream), ("CUDAGraph", Graph), ("stream", inside), ("graph", inside)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda net, sample: net if sample else None)
    seen: list[torch.Tensor] = []
    net = torch.nn.Linear(3, 2)
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    found = {p.name: p for p in peers.inference(Setting("infer", [], 2, "fp32", "cuda", None, 1, 1))}
    assert found["fused optimized graph"].ours
    assert not found["eager graph"].ours
    run = found["eager graph"].prepare(net, first, Setting("infer", [], 2, "fp32", "cuda", None, 1, 1))
    assert len(seen) == 4, "three to warm up, one recorded"
    assert seen[-1] is not first, "the graph reads a buffer of its own"
    run(second)
    assert torch.equal(replays[0], second)
    training = {p.name: p for p in peers.training(Setting("step", [], 2, "fp32", "cuda", None, 1, 1))}
    assert (
        training["fused graph"].prepare(net, first, Setting("step", [], 2, "fp32", "cuda", None, 1, 1)) is net
    )
