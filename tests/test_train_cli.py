"""The training script as its user sees it: the log, the summary, the command line."""

from __future__ import annotations

import csv
import functools
import io
from dataclasses import replace
from pathlib import Path

import pytest
from train_helpers import CONFIG, interrupt_after, rows_of, tiny

from fused_preact import models
from fused_preact.train import checkpoint, cli, run
from fused_preact.train.config import RECIPES
from fused_preact.train.data import DataSet
from fused_preact.train.log import COLUMNS, Log, metrics_csv
from fused_preact.train.loop import Trainer
from fused_preact.train.measure import compare_steps
from fused_preact.train.report import summary, table

pytestmark = pytest.mark.usefixtures("one_thread")


# --- log --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = dict.fromkeys(COLUMNS, 1.0)


def test_piped_log_is_plain_lines() -> None:
    stream = io.StringIO()
    log = Log(3, "fused", stream)
    assert not log.due()
    log.epoch(ROW)
    assert stream.getvalue().startswith("fused epoch 1/3  lr 1.0000")
    assert stream.getvalue().count("\n") == 1
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_terminal_bar_is_one_line_that_the_epoch_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    log = Log(3, "fused", stream)
    assert log.due()
    log.bar(0, 5, 10, 1.25, 50.0, 1000.0)
    assert not log.due()  # drawn just now
    log.bar(0, 10, 10, 1.25, 50.0, 1000.0)
    bars = stream.getvalue()
    assert "\n" not in bars
    for part in ("epoch 1/3", "batch 10/10", "loss 1.250", "acc 50.0 %", "1,000 img/s", "ETA 00:0"):
        assert part in bars
    assert all(len(bar) < 120 for bar in bars.split("\r"))
    log.epoch(ROW)
    assert stream.getvalue().removeprefix(bars).startswith("\r" + " " * 119 + "\rfused epoch")
    monkeypatch.setenv("TERM", "dumb")
    assert not Log(3, "fused", stream).due()


def test_metrics_csv_has_a_row_an_epoch() -> None:
    rows = list(csv.DictReader(io.StringIO(metrics_csv([ROW, {**ROW, "test_acc": 98.765432}]).decode())))
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[1]["test_acc"]) == pytest.approx(98.7654)


def test_table_aligns_its_columns() -> None:
    lines = table(["", "fused", "plain"], [["images/s", "1,000", "9"]]).splitlines()
    assert lines == ["          fused  plain", "----------------------", "images/s  1,000      9"]


def test_summary_without_the_plain_accuracy_shows_a_dash(
    data: DataSet, tiny_model: None, tmp_path: Path
) -> None:
    result = run.fit(CONFIG, data, tmp_path)
    steps = replace(
        compare_steps(CONFIG, data, budget_s=0.0),
        fused_images_per_s=300.0,
        plain_images_per_s=200.0,
        speedup=1.25,
    )
    text = summary([result], {"fused": 2**20, "plain": 2**21}, steps)
    accuracy = next(line for line in text.splitlines() if line.startswith("test accuracy %, last"))
    assert accuracy.split()[-1] == "-"
    assert "300    200        1.25x" in text
    assert "1.00   2.00        0.50x" in text


# --- command line -----------------------------------------------------------------------------------------


def test_cli_trains_compares_resumes_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "compare_steps", functools.partial(compare_steps, budget_s=0.0))
    flags = [
        "--epochs",
        "2",
        "--limit-train",
        "128",
        "--limit-test",
        "100",
        "--device",
        "cpu",
        "--bn-recalibrate",
    ]
    assert cli.main([*flags, "--compare"]) == 0
    out = tmp_path / "runs" / "digits-cifar_preact_resnet20-seed0"
    shown = capsys.readouterr().out
    assert shown.count("fused epoch") == shown.count("plain epoch") == 2
    for part in ("fused:plain", "test accuracy %, BN recalibrated", "images/s, steps in turns", "above 1"):
        assert part in shown
    for file in ("last.pt", "best.pt", "metrics.csv", "config.json", "recalibrated.pt", "plain/last.pt"):
        assert (out / file).is_file(), file
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows_of(out)) == 2

    assert cli.main(["--resume", str(out)]) == 0  # complete: nothing to train, nothing lost
    assert "fused epoch" not in capsys.readouterr().out
    assert len(rows_of(out)) == 2

    assert cli.main(["--eval", str(out), "--plain"]) == 0  # one state dict for both models
    accuracy = checkpoint.load(out)["last_accuracy"]
    assert f"test accuracy {accuracy:.2f} %" in capsys.readouterr().out

    assert cli.main([*flags, "--plain", "--epochs", "1"]) == 0  # the default folder is taken: a new one
    assert (tmp_path / "runs" / "digits-cifar_preact_resnet20-seed0-2" / "last.pt").is_file()


def test_cli_interrupt_says_how_to_go_on(
    tmp_path: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(1, monkeypatch)
    flags = ["--out", str(tmp_path), "--limit-train", "64", "--device", "cpu"]
    assert cli.main(flags) == 130
    assert "--resume" in capsys.readouterr().err
    assert checkpoint.load(tmp_path)["epoch"] == 1


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--data", "mnist"], ["--data", "mnist", "digits", "cifar100"]),
        (["--model", "resnet50"], ["model='resnet50'", "cifar_preact_resnet20"]),
        (["--data", "cifar10"], ["--data-dir", "cifar-10-binary.tar.gz"]),
        (["--data", "cifar10", "--data-dir", "nowhere"], ["nowhere", "cifar-10-binary.tar.gz"]),
        (["--device", "tpu"], ["device='tpu'", "cpu"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--batch-size", "0"], ["batch_size=0"]),
        (["--limit-train", "0"], ["limit_train=0"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--compare", "--plain"], ["--compare", "--plain"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--eval", "nowhere"], ["nowhere"]),
        (["--resume", "run", "--model", "cifar_preact_resnet56"], ["resnet56", "checkpoint has", "resnet20"]),
        (["--resume", "run", "--data", "cifar10"], ["cifar10", "checkpoint has 'digits'"]),
        (["--resume", "run", "--lr", "0.5"], ["lr=0.5", "checkpoint has 0.1"]),
        (["--resume", "run", "--epochs", "9"], ["epochs=9", "cosine"]),
        (["--out", "run"], ["--out run", "--resume run"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_cli_bad_input_is_one_line(
    flags: list[str],
    parts: list[str],
    data: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, recipe=RECIPES["digits"])
    with monkeypatch.context() as patch:
        patch.setattr(models, "create", tiny)
        checkpoint.save(Path("run/last.pt"), checkpoint.pack(Trainer(config, data, fused=True), 0, []))
    try:
        status = cli.main(flags)
    except SystemExit as exit:  # argparse's own refusals
        status = int(exit.code or 0)
    assert status == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    for part in parts:
        assert part in shown
    assert not Path("runs").exists()
