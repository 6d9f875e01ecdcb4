"""The tuner on tiny problems in the interpreter, with a clock that the test brings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fused_preact import reference

pytest.importorskip("triton")
from fused_preact.kernels.triton import choose, cost, tables
from fused_preact.kernels.triton.common import Device
from fused_preact.kernels.triton.configs import ConvConfig, heuristic
from fused_preact.kernels.triton.crosscompile import Resources
from fused_preact.kernels.triton.geometry import Geometry
from fused_preact.tune import cli, problems, trial
from fused_preact.tune.loop import Tuner, name_of, trials_path

H100 = Device("cuda", 90, 132, "NVIDIA H100 80GB HBM3")
INTERPRETER = Device("cuda", 90, 4, "Triton interpreter")
PAIR = ((1, 1), (1, 1), (1, 1))
POINTWISE = Geometry(2, 16, 4, 5, 32, 1, 1, 4, 5, (1, 1), (0, 0), (1, 1), 1)
TINY = Geometry(2, 16, 4, 5, 32, 3, 3, 4, 5, *PAIR, 1)


def problem(
    op: str = "fprop", geometry: Geometry = TINY, dtype: torch.dtype = torch.float32
) -> choose.Problem:
    op, *pending = op.split()
    extras = {"fprop": ("residual", "stats"), "dgrad": ("masked",), "apply": ("weight_grad",), "wgrad": ()}[
        op
    ]
    extras += tuple(pending)
    return choose.Problem(op, geometry, dtype, "ieee" if dtype == torch.float32 else "tf32", extras)


class FakeClock:
    """Runs everything once; the times are given by name, 9 ms where not."""

    def __init__(self, **times: float) -> None:
        self.times, self.seen = times, []

    def copies(self, bytes_of_inputs: int) -> int:
        return 2

    def __call__(self, runners, seconds: float) -> dict[str, float]:
        for runner in runners.values():
            runner(0), runner(1)
        self.seen.append(list(runners))
        return {name: self.times.get(name, 9.0) for name in runners}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FUSED_PREACT_CACHE", str(tmp_path))
    choose.reload()
    yield tables.cache_path(INTERPRETER.name)
    choose.reload()


def tuner(table: Path, clock: FakeClock, said: list[str] | None = None, limit: int = 2) -> Tuner:
    say = (lambda text: None) if said is None else said.append
    return Tuner(INTERPRETER, torch.device("cpu"), table, clock, limit, say)


def test_the_fastest_right_one_is_written_and_then_chosen(table: Path) -> None:
    found = [problem(op) for op in ("fprop", "dgrad", "wgrad")]
    clock = FakeClock(split=1.0, eager=5.0, bn_backward_apply=0.5)
    outcomes = tuner(table, clock).run(found, 60)
    assert [o.wrong for o in outcomes] == [{}, {}, {}]
    assert [(o.entry["path"], o.entry["eager_ms"], o.apply_ms) for o in outcomes] == [
        ("split", 5.0, 0.0),
        ("split", 5.0, 0.5),
        ("split", 5.0, 0.0),
    ]
    assert not any(o.slower for o in outcomes)
    # The heuristic's configuration is among the timed ones, and so are split and eager.
    own = name_of(heuristic("fprop", TINY, torch.float32, "ieee", INTERPRETER))
    assert {own, "split", "eager"} <= set(clock.seen[0])
    for p in found:
        assert choose.chosen(p, INTERPRETER) == ("split", None, "cache")


def test_a_fused_winner_and_a_loss_to_eager(table: Path) -> None:
    own = heuristic("fprop", TINY, torch.float32, "ieee", INTERPRETER)
    said: list[str] = []
    clock = FakeClock(**{name_of(own): 3.0, "split": 4.0, "eager": 2.0})
    (outcome,) = tuner(table, clock, said).run([problem()], 60)
    assert outcome.slower
    assert "SLOWER THAN EAGER" in said[0]
    assert choose.chosen(problem(), INTERPRETER) == ("fused", own, "cache")


def test_how_a_pending_bn_reaches_dgrad_and_wgrad(table: Path) -> None:
    """Both ways are checked and timed after their convolutions, which have entries of their own."""
    found = [problem(op, POINTWISE) for op in ("dgrad pending", "wgrad pending", "dgrad", "apply")]
    said: list[str] = []
    clock = FakeClock(loaded=2.0, stored=1.0)
    outcomes = tuner(table, clock, said).run(found, 60)
    assert [o.wrong for o in outcomes] == [{}] * 4
    assert set(clock.seen[-1]) == {"loaded", "stored"}
    assert len({p.key for p in found}) == 4
    assert choose.chosen(found[-1], INTERPRETER) == ("stored", None, "cache")
    assert "stored, 1.0000 ms" in said[-1]
    assert choose.chosen(found[-1], INTERPRETER._replace(name="")).path == "loaded"


def test_resumes_and_keeps_what_it_has(table: Path) -> None:
    clock = FakeClock()
    first, second = problem(), problem("wgrad")
    tuner(table, clock).run([first], 60)
    tuner(table, clock).run([first, second], 60)
    assert len(clock.seen) == 2, "the first problem is not measured again"
    assert set(tables.read(table, INTERPRETER.name)) == {first.key, second.key}
    said: list[str] = []
    late = tuner(table, clock, said)
    assert late.run([problem("dgrad")], 0) == []
    assert not late.finished
    assert "1 problems left" in said[0]
    assert late.run([first], 0) == []
    assert late.finished, "nothing was left to do"
    tuner(table, clock).run([first], 60, again=True)
    assert len(clock.seen) == 3


def test_every_trial_is_kept_with_its_prediction(table: Path) -> None:
    tuner(table, FakeClock()).run([problem()], 60)
    trials = [json.loads(line) for line in trials_path(table).read_text().splitlines()]
    assert {t["name"] for t in trials} >= {"split", "eager"}
    timed = [t for t in trials if t["predicted_us"]]
    assert len(timed) >= 2
    assert all(t["ms"] == 9.0 and t["predicted_us"] > 0 and t["wrong"] is None for t in timed)
    assert sum(t["heuristic"] for t in trials) == 1


def test_a_wrong_configuration_is_reported_and_not_timed(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = heuristic("fprop", TINY, torch.float32, "ieee", INTERPRETER)
    right = trial.run

    def sabotaged(p, inputs, table=trial.kernels):
        found = right(p, inputs, table)
        if table is trial.kernels and choose._forced.config == own:
            found[0][0, 0, 0, 0] += 0.1
        return found

    monkeypatch.setattr("fused_preact.tune.loop.run", sabotaged)
    said: list[str] = []
    clock = FakeClock(**{name_of(own): 0.1})
    (outcome,) = tuner(table, clock, said).run([problem()], 60)
    assert list(outcome.wrong) == [name_of(own)]
    assert "y: error" in outcome.wrong[name_of(own)]
    assert name_of(own) not in clock.seen[0]
    assert outcome.entry["config"] != [
        own.block_m,
        own.block_n,
        own.block_k,
        own.num_warps,
        own.num_stages,
        0,
    ]
    assert f"excluded {name_of(own)}" in said[0]


def test_a_corrupt_table_is_not_overwritten(table: Path) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        tuner(table, FakeClock()).run([problem()], 60)
    assert table.read_text() == "{"


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad", "dgrad pending", "wgrad pending", "apply"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_check_sees_one_wrong_element(op: str, dtype: torch.dtype) -> None:
    oracle = trial.Oracle(problem(op, dtype=dtype), torch.device("cpu"))
    right = trial.run(oracle.problem, oracle.inputs, reference)
    assert oracle.problem_with(right) is None
    sums = ("g", "sum_g", "sum_gx")
    outputs = {
        "fprop": ("y", "mean", "var"),
        "dgrad": sums,
        "wgrad": ("dweight",),
        "apply": (*sums, "dweight"),
    }
    for index, name in enumerate(outputs[op.split()[0]]):
        # The pending BN's gradients are some times as large, and the sums over pixels more so.
        small = (
            0.2 if name in ("y", "g") and oracle.problem.op in ("fprop", "dgrad") and " " not in op else 4.0
        )
        for error in (small, float("nan")):
            bad = [t.clone() for t in right]
            bad[index][(1,) * bad[index].dim()] += error
            assert str(oracle.problem_with(tuple(bad))).startswith(name)


def test_problems_of_a_network() -> None:
    found = problems.of_network("preact_resnet50", 256, torch.bfloat16, H100)
    keys = [p.key for p in found]
    assert len(keys) == len(set(keys))
    assert {p.op for p in found} == {"fprop", "dgrad", "wgrad", "apply"}
    assert "dgrad pending bfloat16 256->64 1x1 rows 2^20" in keys
    assert keys[-1].startswith("apply"), "timed with the configurations of its dgrad and wgrad"
    assert "fprop bfloat16 64->64 3x3 rows 2^20" in keys
    # conv3 and the projection share a key: the one with identity and statistics stands for it.
    shared = next(p for p in found if p.key == "fprop bfloat16 64->256 1x1 rows 2^20")
    assert shared.extras == ("residual", "stats")
    assert all(p.geometry.n == 256 for p in found)
    assert len(cli.listing(found, H100._replace(name=""))) == len(found)


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert "only a GPU can be tuned" in capsys.readouterr().err


def test_predictions_are_compared_with_times() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.cost import agreement, correlation

    assert correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    rows = [(10.0, 2.0, False), (20.0, 1.0, True), (30.0, 4.0, False), (None, 3.0, False), (5.0, None, False)]
    trials = [{"key": "k", "predicted_us": p, "ms": ms, "heuristic": own} for p, ms, own in rows]
    first, last = agreement(trials)
    assert "3 timed, the model's first takes 2.00 of the best, the heuristic's 1.00" in first
    assert last.startswith("all: the model's first takes 2.00")


# --- the cost model -------------------------------------------------------------------------------------------

RESNET = Geometry(256, 64, 56, 56, 256, 1, 1, 56, 56, (1, 1), (0, 0), (1, 1), 1)


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_candidates_fit_and_hold_the_heuristic(op: str) -> None:
    p = problem(op, RESNET, torch.bfloat16)
    found = cost.candidates(p, H100)
    assert heuristic(op, RESNET, torch.bfloat16, "tf32", H100) in found
    assert len(found) == len(set(found))
    assert all(cost.fits(p, c, H100) for c in found)
    columns = RESNET.k if op == "fprop" else RESNET.c
    assert max(c.block_n for c in found) == columns, (
        "one tile covers the columns: an element is activated once"
    )
    times = [cost.predict(p, c, H100).us for c in found[:-1]]
    assert times == sorted(times)


def test_predictions_follow_the_machine() -> None:
    p, config = problem("fprop", RESNET, torch.bfloat16), ConvConfig(128, 128, 64, 8, 3)
    usual = cost.predict(p, config, H100)
    # 103 MB in, 411 MB identity, 411 MB out, at 3.35 TB/s.
    assert 270 < usual.us < 500
    narrow = cost.predict(p, ConvConfig(128, 32, 64, 4, 3), H100)
    assert narrow.us > usual.us, "x is loaded and activated eight times"
    full = Resources(255, 0, 200 * 1024, 8)
    assert cost.predict(p, config, H100, full).programs == 1
    assert cost.predict(p, config, H100, Resources(128, 512, 64 * 1024, 8)).us > 2 * usual.us
    assert not cost.fits(p, config, H100, Resources(128, 16, 1024, 8)), "a spilling kernel is out"
    assert not cost.fits(p, ConvConfig(256, 256, 64, 4, 4), H100)
    half = cost.predict(p, config, H100._replace(multiprocessors=66))
    assert half.us > 1.7 * usual.us
