"""Several seeds and the paper's tables as one run: what is trained, what is skipped, what is reported."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from train_helpers import CONFIG, rows_of, stop_at_look, tiny

from fused_preact import models
from fused_preact.train import checkpoint, cli, paper, study
from fused_preact.train.data import DataSet
from fused_preact.train.fit import Options
from fused_preact.train.log import Log
from fused_preact.train.loop import Trainer
from fused_preact.train.study import Study
from fused_preact.train.study_report import markdown
from fused_preact.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

TRIAL = ["--epochs", "2", "--limit-train", "64", "--limit-test", "50", "--device", "cpu"]


# --- the paper's tables -----------------------------------------------------------------------------------


def test_the_papers_figures_stand_beside_its_networks() -> None:
    one = {cell.shortcut: cell for cell in paper.cells(1, [110], "cifar10")}
    assert len(one) == 11
    assert {name: cell.paper for name, cell in one.items()} == {
        "A": "6.61",
        "scaling:0:1": "fail",
        "scaling:0.5:1": "fail",
        "scaling:0.5:0.5": "12.35",
        "exclusive_gating:0": "fail",
        "exclusive_gating:-6": "8.70",
        "exclusive_gating:-7": "9.81",
        "shortcut_gating:0": "12.86",
        "shortcut_gating:-6": "6.91",
        "conv": "12.22",
        "dropout:0.5": "fail",
    }
    two = {(cell.model, cell.order): cell.paper for cell in paper.cells(2, [110, 164], "cifar10")}
    assert two["cifar_resnet110", "preact"], two["cifar_resnet164", "preact"] == ("6.37", "5.46")
    assert two["cifar_resnet164", "bn_after_addition"] == "6.50"
    three = [(c.row, c.column, c.body, c.paper) for c in paper.cells(3, [110, 164, 1001], "cifar10")]
    assert three[:2] == [
        ("ResNet-110 (1 layer a unit)", "original", "single", "9.90"),
        ("ResNet-110 (1 layer a unit)", "pre-activation", "single", "8.91"),
    ]
    assert three[-1] == ("ResNet-1001", "pre-activation", "bottleneck", "4.92")
    assert [c.paper for c in paper.cells(3, [164], "cifar100")] == ["25.16", "24.33"]


def test_nets_of_other_depths_stand_beside_the_papers_of_their_kind() -> None:
    cells = paper.cells(2, [20, 29], "digits")
    assert {(c.model, c.body, c.paper, paper.paper_net(c, 2)) for c in cells if c.order == "preact"} == {
        ("cifar_resnet20", "basic", "6.37", "ResNet-110"),
        ("cifar_resnet29", "bottleneck", "5.46", "ResNet-164"),
    }
    folders = [cell.folder for table in paper.TABLES for cell in paper.cells(table, [20, 29], "digits")]
    for folder in folders:
        assert ":" not in folder
        assert "/" not in folder
    assert len(set(folders)) == len(folders) - 4, "tables 2 and 3 share the original and pre-activation units"


# --- running ----------------------------------------------------------------------------------------------


def test_seeds_are_run_once_and_reported_as_the_paper_does(
    tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seeds"
    flags = [*TRIAL, "--seeds", "3", "--seed", "5", "--out", str(out)]
    assert cli.main(flags) == 0
    shown = capsys.readouterr().out
    errors = [100 - float(rows_of(out / f"seed{seed}")[-1]["test_acc"]) for seed in (5, 6, 7)]
    assert len(set(errors)) > 1, "seeds differ"
    results = json.loads((out / "results.json").read_text())
    (cell,) = results["cells"]
    assert cell["errors"] == pytest.approx(errors, abs=1e-4)
    assert cell["median"] == pytest.approx(statistics.median(errors), abs=1e-4)
    assert cell["std"] == pytest.approx(statistics.stdev(errors), abs=1e-3)
    assert "median of 3" in shown
    assert f"{cell['mean']:.2f} ± {cell['std']:.2f}" in shown
    assert "2 epochs, batch 64, seeds 5 to 7" in shown
    assert (out / "curves-seeds.png").read_bytes().startswith(b"\x89PNG")
    before = (out / "seed6" / "last.pt").stat().st_mtime_ns
    for again in (flags, ["--resume", str(out)]):
        assert cli.main(again) == 0
        assert capsys.readouterr().out.count("done before") == 3
    assert (out / "seed6" / "last.pt").stat().st_mtime_ns == before


def test_a_study_goes_on_where_it_was_interrupted(
    tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "broken"):
        out, flags = tmp_path / name, [*TRIAL, "--seeds", "2", "--out", str(tmp_path / name)]
        if name == "whole":
            assert cli.main(flags) == 0
            continue
        with monkeypatch.context() as patch:
            stop_at_look(5, patch)
            assert cli.main(flags) == 143
        assert f"go on with --resume {out}" in capsys.readouterr().err
        assert cli.main(["--resume", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("done before") == 1
    found = [
        json.loads((tmp_path / name / "results.json").read_text())["cells"][0] for name in ("whole", "broken")
    ]
    assert found[0]["errors"] == found[1]["errors"]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tiny model for every variant; what was asked for."""
    asked: list[dict[str, Any]] = []

    def create(name: str, *, num_classes: int, fused: bool, in_channels: int, **options: Any) -> nn.Module:
        asked.append({"name": name, **options})
        return tiny(name, num_classes=num_classes, fused=fused, in_channels=in_channels)

    monkeypatch.setattr(models, "create", create)
    return asked


def test_a_table_is_run_row_by_row(
    variants: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TRIAL[2:], "--epochs", "1", "--table", "2", "--depth", "20", "29", "--out", str(tmp_path)]
    assert cli.main(flags) == 0
    shown = capsys.readouterr().out
    for order in ("original", "bn_after_addition", "relu_before_addition", "relu_only_preact", "preact"):
        assert {"name": "cifar_resnet20", "order": order, "body": "basic"} in variants
        assert {"name": "cifar_resnet29", "order": order, "body": "bottleneck"} in variants
    assert "| full pre-activation      | ResNet-29 |" in shown
    assert "5.46 | ResNet-164 |" in shown
    assert "10/10 full pre-activation, ResNet-29, seed 0: test error" in shown
    for said in ("the first 64 of the training images", "1 epochs", "A fail is an error above 20 %"):
        assert said in shown, said
    assert (tmp_path / "results.md").read_text().strip() in shown
    for picture in ("results.png", "curves-resnet-20.png", "curves-resnet-29.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG"), picture
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["fail"] for cell in results["cells"]] == [True] * 10, "nobody learns in two steps"


def test_a_run_that_diverges_is_a_fail_and_not_the_end(
    data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Study(replace(CONFIG, recipe=CONFIG.recipe.with_epochs(1)), 2)
    plain = Trainer.step

    def step(self: Trainer, *args: Any) -> Any:
        loss, right = plain(self, *args)
        return loss * float("nan") if self.config.seed == 0 else loss, right

    monkeypatch.setattr(Trainer, "step", step)
    for repeated in (False, True):
        results = study.run(asked, data, tmp_path, Options(), World())
        (cell,) = results["cells"]
        assert cell["errors"][0] is None
        assert cell["errors"][1] is not None
        assert (cell["median"], cell["mean"], cell["fail"]) == (None, None, True)
        assert "fail (diverged)" in markdown(results)
        assert (tmp_path / "seed0" / "diverged.txt").exists()
        if not repeated:
            monkeypatch.setattr(Trainer, "step", lambda *args: pytest.fail("trained again"))


def test_a_fail_is_an_error_above_twenty_percent(data: DataSet) -> None:
    asked = Study(CONFIG, 1, 1, (20,))
    cells = asked.cells[:2]
    found = {
        cell: [study.Outcome(0, error, error, 1.0, 1.0, [])]
        for cell, error in zip(cells, (20.0, 20.2), strict=True)
    }
    results = study.summarise(asked, found)
    assert [cell["fail"] for cell in results["cells"]] == [False, True]
    text = markdown(results)
    assert " 20.00 |" in text
    assert "fail (20.20)" in text


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--table", "4"], ["--table 4", "1, 2, 3"]),
        (["--table", "1", "--depth", "21"], ["--depth 21", "6n+2 and 9n+2"]),
        (["--table", "1", "--model", "x", "--order", "preact"], ["--table 1", "--model, --order"]),
        (["--depth", "20"], ["--depth", "--table"]),
        (["--seeds", "0"], ["--seeds 0", "1 to 1000"]),
        (["--seeds", "2", "--compare"], ["--seeds", "--compare"]),
        (["--resume", "run", "--seeds", "2"], ["--resume run", "study.json"]),
        (["--resume", "study", "--seeds", "3"], ["--seeds 3", "study has 2"]),
        (["--resume", "study", "--lr", "0.7"], ["lr=0.7", "has 0.1"]),
        (["--seeds", "2", "--out", "study"], ["--out study", "epochs=30", "epochs=4"]),
        (["--seeds", "2", "--out", "run"], ["--out run", "holds a run"]),
        (["--out", "study"], ["--out study", "--resume study"]),
        (["--resume", "damaged"], ["study.json", "not written by --seeds"]),
        (["--shortcut", "nonsense"], ["shortcut='nonsense'"]),
        (["--order", "nonsense"], ["order='nonsense'"]),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str],
    parts: list[str],
    data: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(models, "create", tiny)
        checkpoint.save(Path("run/last.pt"), checkpoint.pack(Trainer(CONFIG, data, fused=True), []))
    study.save(Study(CONFIG, 2), Path("study"))
    Path("damaged").mkdir()
    Path("damaged/study.json").write_text('{"table": 1')
    monkeypatch.setattr(Log, "epoch", lambda *args: pytest.fail("trained"))
    assert cli.main([*flags, "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    for part in parts:
        assert part in shown
    assert not Path("runs").exists()
