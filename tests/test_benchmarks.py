"""The benchmark suite's arithmetic, its refusals and its files; speed itself is asserted nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is part of the checkout, not of the package

from benchmarks import (  # noqa: E402
    compare,
    correct,
    counting,
    cpu,
    gpu,
    measure,
    memory,
    micro,
    nets,
    networks,
    op,
    options,
    report,
    results,
    stages,
)
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.options import Setting  # noqa: E402
from benchmarks.results import Row  # noqa: E402
from fused_preact import reference  # noqa: E402

SMALL = "cifar_preact_resnet20"
OP = ["op", "--model", SMALL, "--batch", "4", "--limit", "1", "--peers", "fused", "--backend", "reference"]
OP += ["--threads", "1", "--minutes", "0.02"]


# --- counting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "ms"), [("eager", 39.39), ("pointwise", 28.79), ("c1", 20.91), ("c2", 20.09)]
)
def test_floor_of_resnet50(schedule: str, ms: float) -> None:
    """ResNet-50-v2, batch 256, bf16, at 3.0 TB/s and 800 TFLOP/s, as counted independently."""
    kernels = counting.network_kernels("preact_resnet50", 256, 2, schedule)
    assert counting.Ceilings(3e12, 800e12).ms(kernels) == pytest.approx(ms, rel=0.01)


def test_flops_and_bytes_of_resnet50() -> None:
    eager = counting.network_kernels("preact_resnet50", 256, 2, "eager")
    assert sum(k.flops for k in eager) == pytest.approx(6.22e12, rel=0.002)
    assert sum(k.bytes for k in eager) == pytest.approx(111.6e9, rel=0.005)
    assert sum(k.flops for k in eager if k.phase == "forward") / 256 / 2 == pytest.approx(4.09e9, rel=0.002)


@pytest.mark.parametrize(("schedule", "ms"), [("eager", 13.4), ("pointwise", 9.45), ("c1", 5.39)])
def test_inference_floor_of_resnet50(schedule: str, ms: float) -> None:
    kernels = counting.inference_kernels("preact_resnet50", 256, 2, schedule)
    assert counting.Ceilings(3e12, 800e12).ms(kernels) == pytest.approx(ms, rel=0.02)


def test_site_floor_by_hand() -> None:
    """1x1, 4 -> 8 channels at 2x2 with an addition, one image of float32: 64 B in, 128 B out, 128 B of weights."""
    site = networks.SiteCase(4, 8, 2, 1, 1, adds=True)
    forward = [k for k in counting.site_kernels(site, 1, 4, "c1") if k.phase == "forward"]
    assert [(k.bytes, k.flops) for k in forward] == [(64 + 128 + 128 + 128, 2 * 4 * 4 * 8)]


def test_convolutions_of_a_network() -> None:
    convs = networks.network_convs("preact_resnet50")
    assert len(convs) == 1 + 16 * 3 + 4
    assert sum(
        2 * c.c * c.k * c.kernel**2 * ((c.h - 1) // c.stride + 1) ** 2 for c in convs
    ) == pytest.approx(2 * 4.09e9, rel=0.002)


# --- wrong results have no speed --------------------------------------------------------------------------


def test_policy_sees_a_wrong_element() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    eager = exact.float()
    assert correct.error_problem("y", eager.clone(), eager, exact, factor=2) is None
    wrong = eager.clone()
    wrong[17] += 1e-4
    assert "at" not in (correct.error_problem("y", eager, eager, exact, factor=2) or "")
    assert "y: error" in (correct.error_problem("y", wrong, eager, exact, factor=2) or "")
    wrong[17] = float("nan")
    assert "not finite" in (correct.error_problem("y", wrong, eager, exact, factor=2) or "")


def _planted(monkeypatch: pytest.MonkeyPatch, spoil: Any, passes: int = 0) -> None:
    original = reference.conv_fprop

    def planted(x: torch.Tensor, *args: Any) -> Any:
        for _ in range(passes):
            x = (x * 2).mul_(0.5)
        y, mean, var = original(x, *args)
        return spoil(y), mean, var

    monkeypatch.setattr(reference, "conv_fprop", planted)


@pytest.mark.parametrize("command", ["op", "unit", "step", "infer"])
def test_wrong_kernel_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that is wrong by 1 % in one channel has no speed, and the command fails."""

    def spoil(y: torch.Tensor) -> torch.Tensor:
        y[:, 1] *= 1.01
        return y

    _planted(monkeypatch, spoil)
    assert main([command, *OP[1:], "--results", str(tmp_path)]) == 1
    assert "REFUSED" in capsys.readouterr().out
    rows = [r for r in results.load(tmp_path / f"{command}.csv") if r.candidate == "fused"]
    assert rows
    assert all(r.status.startswith("REFUSED") and not r.p50 and not r.samples for r in rows)


def test_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Logits cannot show it; the step's unit by unit check does."""
    original = reference.conv_wgrad
    monkeypatch.setattr(reference, "conv_wgrad", lambda *args: original(*args) * 1.01)
    assert main(["step", *OP[1:], "--results", str(tmp_path)]) == 1
    refused = [r for r in results.load(tmp_path / "step.csv") if r.status.startswith("REFUSED")]
    assert [r.candidate for r in refused] == ["fused"]
    assert "dconv1.weight" in refused[0].status or "dconv2.weight" in refused[0].status


# --- comparing --------------------------------------------------------------------------------------------


def test_planted_slowdown_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extra passes over the input inside a kernel show as slower; the same code measured twice does not."""
    before, after = tmp_path / "before", tmp_path / "after"
    assert main([*OP, "--results", str(before)]) == 0
    _planted(monkeypatch, lambda y: y, passes=200)
    assert main([*OP, "--results", str(after)]) == 0
    capsys.readouterr()
    assert main(["compare", str(before / "op.csv"), str(after / "op.csv")]) == 1
    slower = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slower")]
    assert any(" fused forward" in line for line in slower), slower
    assert main(["compare", str(before), str(before)]) == 0


def _timed(samples: list[float], base: list[float], **columns: str) -> Row:
    row = Row(command="op", case="3x3", candidate="fused", phase="forward", **columns)
    found = {"fused": measure.Samples(samples), micro.BASE: measure.Samples(base)}
    micro.fill(row, measure.Measured(found, {}, {}, None), "forward", micro.BASE)
    return row


def test_noise_is_no_regression() -> None:
    noisy = [1.0, 1.3, 0.8, 1.1, 0.9]
    calm = [1.0, 1.01, 0.99, 1.0, 1.0]
    base = [2.0] * 5

    def verdict(before: list[float], after: list[float]) -> str:
        return compare.changes([_timed(before, base)], [_timed(after, base)])[0].verdict

    assert verdict(calm, [1.1 * t for t in calm]) == "slower"
    assert verdict(calm, [0.9 * t for t in calm]) == "faster"
    assert verdict(noisy, [1.1 * t for t in noisy]) == "same"
    # A machine that is slower altogether is no regression.
    slower_machine = _timed([2 * t for t in calm], [4.0] * 5)
    assert compare.changes([_timed(calm, base)], [slower_machine])[0].verdict == "same"
    # Nor is a base that happened to be faster.
    assert compare.changes([_timed(calm, base)], [_timed(calm, [1.0] * 5)])[0].verdict == "same"
    other = compare.changes([_timed(calm, base, backend="cpu")], [_timed(calm, base, backend="reference")])[0]
    assert other.reason == "served by cpu, then by reference"
    broken = Row(command="op", case="3x3", candidate="fused", status="REFUSED y: error")
    assert compare.changes([_timed(calm, base)], [broken])[0].verdict == "broken"


def test_runs_of_the_same_code_count_together(tmp_path: Path) -> None:
    """One run that happened to be slow is no regression where another of the same commit was not."""

    def row(commit: str, ms: float) -> Row:
        made = _timed([ms] * 5, [2.0] * 5, commit=commit)
        return made

    results.append(tmp_path / "op.csv", [row("old", 9.0), row("new", 1.0), row("new", 1.2)])
    found = compare.read(str(tmp_path))
    assert found is not None
    assert [float(r.p50) for r in found] == [1.0, 1.2], "both runs of the newest commit, none of another"
    results.append(tmp_path / "op.csv", [Row(**{**vars(row("new", 1.0)), "status": "REFUSED", "p50": ""})])
    assert [r.status for r in compare.read(str(tmp_path)) or []] == ["REFUSED"]


def test_commits_are_measured_back_and_forth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything of the comparison of two commits but the builds and the runs themselves."""
    measured = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        commit = env["FUSED_PREACT_BENCH_COMMIT"]
        measured.append(commit)
        assert env["PYTHONPATH"].startswith(f"site-{commit}")
        folder = Path(command[command.index("--results") + 1])
        results.append(
            folder / "op.csv", [_timed([1.0 if commit == "a" else 1.3] * 5, [2.0] * 5, commit=commit)]
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compare, "resolve", lambda name: None if name == "nothing" else name)
    monkeypatch.setattr(compare, "install", lambda commit, folder: Path(f"site-{commit}"))
    monkeypatch.setattr(compare.subprocess, "run", run)
    assert main(["compare", "a", "b", "--turns", "3"]) == 1
    assert measured == ["a", "b", "b", "a", "a", "b"]
    assert "slower    +30.0 %" in capsys.readouterr().out
    for arguments in (["a", "nothing"], ["a", "b", "--turns", "0"]):
        with pytest.raises(SystemExit):
            main(["compare", *arguments])


# --- memory -----------------------------------------------------------------------------------------------


def test_saved_bytes_by_hand() -> None:
    """A convolution keeps its input, ReLU its output: the same tensor, so once; weights do not count."""
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(3, 4, 1, bias=False))
    x = torch.randn(2, 3, 5, 5)
    assert memory.saved_bytes(net, x) == 2 * 3 * 25 * 4


@pytest.mark.parametrize("model", ["preact_resnet50", "cifar_preact_resnet164"])
def test_fused_saves_half(model: str) -> None:
    plain, fused = (memory.saved_on_meta(model, 2, torch.bfloat16, f) for f in (False, True))
    assert 0.45 < fused / plain < 0.55


def test_saved_on_meta_is_what_a_real_step_saves() -> None:
    for fused in (False, True):
        net = networks.create(SMALL, fused=fused).train().to(memory_format=torch.channels_last)
        real = memory.saved_bytes(
            net, torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        )
        assert memory.saved_on_meta(SMALL, 2, torch.float32, fused) == pytest.approx(real, rel=0.01)


def test_peak_grows_with_the_batch() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "memory",
        "--model",
        SMALL,
        "--child",
        "fused",
        "--threads",
        "1",
    ]

    def peak(batch: int) -> int:
        done = subprocess.run(
            [*command, "--batch", str(batch)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    saved = memory.saved_on_meta(SMALL, 64, torch.float32, True)
    assert 0.5 * saved < peak(64) < 4 * saved


def test_a_peak_that_takes_too_long_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def peak(model: str, candidate: str, batch: int, setting: Setting, seconds: float) -> int:
        if candidate == "compile":
            raise subprocess.TimeoutExpired("memory", seconds)
        return batch * 1000 + 50

    monkeypatch.setattr(memory, "_peak", peak)
    arguments = ["memory", "--model", SMALL, "--batch", "8", "--minutes", "0", "--budget", "1"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    rows = {(r.candidate, r.phase): r for r in results.load(tmp_path / "memory.csv")}
    assert rows["compile", "peak"].status == "stopped: no peak after 45 s"
    assert float(rows["fused", "per image"].value) == 1000
    weights = 3 * 4 * sum(p.numel() for p in networks.create(SMALL).parameters())
    assert float(rows["fused", "fits 1 GiB"].value) == pytest.approx((2**30 - weights - 50) // 1000, rel=1e-4)


# --- files and pages --------------------------------------------------------------------------------------


def _some_rows() -> list[Row]:
    rows = []
    for command, case in (("op", "3x3 16->16 @32"), ("unit", "basic 16->16 @32 id"), ("step", "network")):
        for name, time in ((micro.BASE, 2.0), ("compile", 1.5), ("fused", 3.0), (nets.BARE, 1.0)):
            for phase in measure.PHASES:
                row = Row(command=command, model=SMALL, case=case, count="9", candidate=name, phase=phase)
                row.batch, row.dtype, row.device, row.hardware, row.threads = "4", "fp32", "cpu", "a CPU", "2"
                row.date, row.floor_ms, row.bytes, row.flops = "2026-01-01T00:00Z", "0.5", "1e6", "1e7"
                samples = {name: measure.Samples([time] * 5, [time] * 5)}
                samples[micro.BASE] = measure.Samples([2.0] * 5, [2.0] * 5)
                micro.fill(row, measure.Measured(samples, {}, {}, 0.0), phase, micro.BASE)
                rows.append(row)
    for name, value in ((micro.BASE, "2e6"), ("fused", "1e6")):
        row = Row(command="memory", model=SMALL, case="network", candidate=name, phase="saved", value=value)
        row.batch, row.device, row.unit = "4", "cpu", "B"
        rows.append(row)
    missing = Row(command="infer", model=SMALL, case="network", candidate="openvino", phase="forward")
    missing.batch, missing.status = "4", "missing: openvino is not installed"
    return [*rows, missing]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "op.csv"
    rows = _some_rows()
    results.append(path, rows[:3])
    results.append(path, rows[3:])
    assert results.load(path) == rows
    assert list(tmp_path.iterdir()) == [path]
    newer = Row(**{**vars(rows[0]), "date": "2027", "p50": "1"})
    assert results.latest([*rows, newer])[0] == newer
    assert len(results.latest([*rows, newer])) == len(rows)


def test_report_writes_pages_and_figures_from_the_files(tmp_path: Path) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.START}\nold\n{report.END}\n\nThe end.\n")
    results.append(folder / "all.csv", _some_rows())
    arguments = ["report", "--results", str(folder), "--root", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "0.67× (loss)" in text, "a loss is printed as one"
    assert "openvino: missing: openvino is not installed" in text
    for name in ("op-", "unit-", "roofline-", "memory-depth"):
        assert list((tmp_path / "docs" / "figures").glob(f"{name}*.svg")), name
    assert "0.67× (loss)" in readme.read_text()
    assert readme.read_text().endswith("The end.\n")
    readme.write_text(readme.read_text().replace("0.67", "1.67"))
    assert main([*arguments, "--check"]) == 1, "a figure changed by hand is found"


def test_report_shows_runs_dtypes_and_allocators() -> None:
    """Runs of a row give a range; fp32 and bf16 of a case are neighbours; the front page takes the fair allocator."""
    rows = [Row(**{**vars(r), "commit": "c", "allocator": "kept"}) for r in _some_rows()]

    def again(r: Row, speedup: str, **columns: str) -> Row:
        return Row(**{**vars(r), "speedup_p50": speedup, **columns})

    fused = [r for r in rows if r.candidate == "fused" and r.phase == "both"]
    step = next(r for r in fused if r.command == "step")
    rows += [
        again(step, "9.99", commit="older"),
        again(step, "1.20"),
        again(step, "1.30", note="stopped: k rounds"),
    ]
    rows += [again(r, "1.50", dtype="bf16") for r in rows if r.command == "op"]
    rows.append(again(step, "7.77", allocator=""))
    text = report.page(rows)
    assert "| 0.67–1.30 (3) |" in text
    assert "- fused: stopped: k rounds" in text
    table = [line for line in text.splitlines() if line.startswith("| 3x3 16->16 @32 |")]
    assert [line.split("|")[3].strip() for line in table] == ["fp32", "bf16"]
    assert f"### {SMALL}, fp32, batch 4, the system's default allocator" in text
    assert "7.77×" in text
    front = report.readme(f"{report.START}{report.END}", rows)
    assert "1.30×" in front
    assert "7.77×" not in front


def test_committed_pages_follow_from_the_committed_results() -> None:
    assert main(["report", "--check"]) == 0


# --- the GPU command --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpu_command_runs_keeps_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpu", "--device", "cpu", "--quick", "--threads", "1", "--results", str(tmp_path)]
    arguments += ["--only", f"correct {gpu.IMAGENET} bf16", "tune 50", "step 50 compile"]
    assert main(arguments) == 0
    stages = results.load(tmp_path / "gpu.csv")
    assert [r.case for r in stages] == [f"correct {gpu.IMAGENET} bf16", "tune 50", "step 50 compile"]
    assert all(r.status == "ok" for r in stages)
    checked = results.load(tmp_path / "op.csv")
    assert {r.status for r in checked if r.candidate == "fused"} == {"ok"}
    assert not list(tmp_path.glob("slice-*"))
    assert [r for r in results.load(tmp_path / "step.csv") if r.candidate == "fused" and r.p50]
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("finished before") == 3


def test_gpu_command_says_what_it_did_not_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpu", "--device", "cpu", "--quick", "--minutes", "0", "--results", str(tmp_path)]
    assert main(arguments) == 0
    assert "not reached, run the command again" in capsys.readouterr().out


def test_stages_of_the_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would see a typing error in their arguments before a GPU is there, or half an hour has passed."""
    pytest.importorskip("triton")
    from fused_preact.tune import cli as tune_cli

    assert stages.UNFINISHED == tune_cli.UNFINISHED
    seen = []

    class Parsed(Exception):
        pass

    def parse(parser: Any, argv: list[str], quiet: bool = False) -> None:
        seen.append(parser.parse_args(argv))
        raise Parsed

    monkeypatch.setattr(options, "parse", parse)
    setting = Setting("gpu", [], None, "bf16", "cuda", None, 8, 1, folder=Path("results"))
    for stage in gpu.stages():
        command = stages._command(stage, 0, setting)
        if stage.module != "benchmarks":
            seen.append(tune_cli._parser().parse_args(command[3:]))
            continue
        with pytest.raises(Parsed):
            main(command[3:])
    assert all(args.device == "cuda" for args in seen)
    seen.clear()
    setting = Setting("cpu", [], None, "fp32", "cpu", None, 35, 2, folder=Path("results"))
    for stage in cpu.stages():
        with pytest.raises(Parsed):
            main(stages._command(stage, 0, setting)[3:])
    assert {args.command for args in seen} == {
        "op", "unit", "step", "infer", "memory", "roofline", "overhead",
    }  # fmt: skip
    assert sum(args.minutes for args in seen) < 29.5, (
        "and a quarter of a minute each for what is not measuring"
    )
    assert len({stage.name for stage in cpu.stages()}) == len(seen), "a finished stage is known by its name"
    # What matters most comes within the promised eight minutes.
    assert sum(s.seconds for s in gpu.stages()[:7]) < 9 * 60


def test_cases_cover_the_networks() -> None:
    sites = {c.name: c.count for c in op.cases("preact_resnet50", 2, 4)}
    assert sum(sites.values()) == 16 * 3 + 4
    assert sites["1x1 64->256 @56+id"] == 3
    assert sites["3x3/2 128->128 @56"] == 1
    setting = Setting("op", [], 2, "fp32", "cpu", None, 1, 1)
    assert [s.name for s in micro.subjects(setting)] == [
        micro.BASE,
        "eager nchw",
        "compile",
        "fused",
        "fused alone",
    ]
