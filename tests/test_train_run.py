"""The training script: recipes, exact resume, checkpoints that survive a kill, the log, the command line."""

from __future__ import annotations

import csv
import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fused_preact import models
from fused_preact.train import checkpoint, cli, run
from fused_preact.train.config import RECIPES, Config
from fused_preact.train.data import DataSet, load
from fused_preact.train.log import COLUMNS, Log, metrics_csv
from fused_preact.train.loop import Trainer, parameter_groups
from fused_preact.train.measure import compare_steps, saved_bytes
from fused_preact.train.report import summary, table

CONFIG = Config("digits", replace(RECIPES["digits"].with_epochs(4), batch_size=32))


def tiny(name: str, *, num_classes: int, fused: bool, in_channels: int) -> nn.Module:
    """BN, dropout (the global random stream) and a conv, in a thousandth of the time of a ResNet."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(36, num_classes),
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and stall on it where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "create", tiny)


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load("digits", limit_train=100, limit_test=50)


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def interrupt_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Log.epoch

    def epoch(self: Log, row: dict[str, float]) -> None:
        plain(self, row)
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "epoch", epoch)


# --- recipes ----------------------------------------------------------------------------------------------


def test_cifar_schedule_is_the_papers() -> None:
    recipe = RECIPES["cifar10"]
    rates = [recipe.learning_rate(epoch) for epoch in (0.001, 80.999, 81.001, 121.999, 122.001, 163.999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.pad) == (128, 0.9, 1e-4, 4)
    assert recipe.with_epochs(82).milestones == (40, 61)


def test_cosine_schedule_warms_up_and_ends_at_zero() -> None:
    recipe = replace(RECIPES["digits"], epochs=30, lr=0.1, warmup_epochs=2.0)
    rates = [recipe.learning_rate(epoch) for epoch in (0.5, 1.0, 2.0, 16.0, 30.0)]
    assert rates == pytest.approx([0.025, 0.05, 0.1, 0.05, 0.0])


def test_decay_norm_switch_spares_the_vectors() -> None:
    model = tiny("", num_classes=10, fused=False, in_channels=1)
    (every,) = parameter_groups(model, RECIPES["cifar10"])
    assert len(every["params"]) == 6
    decayed, spared = parameter_groups(model, replace(RECIPES["cifar10"], decay_norm=False))
    assert decayed["weight_decay"] == 1e-4
    assert sorted(p.ndim for p in decayed["params"]) == [2, 4]
    assert spared["weight_decay"] == 0
    assert sorted(p.ndim for p in spared["params"]) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"warmup_epochs": 99.0}]
)
def test_recipe_refuses_impossible_numbers(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}="):
        replace(RECIPES["digits"], **change)


# --- checkpoints and resume -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resume_gives_the_same_bits(
    dtype: str, data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, dtype=dtype)
    run.fit(config, data, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run.fit(config, data, tmp_path / "broken")
    broken = checkpoint.load(tmp_path / "broken")
    assert broken["epoch"] == 2
    torch.manual_seed(999)  # a new process has another random stream
    run.fit(config, data, tmp_path / "broken", resume=broken)
    a, b = checkpoint.load(tmp_path / "straight"), checkpoint.load(tmp_path / "broken")
    for name in a["state"]:
        assert torch.equal(a["state"][name], b["state"][name]), name
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"]), i
    assert a["scaler"] == b["scaler"]
    assert torch.equal(a["rng"]["data"], b["rng"]["data"])
    for x, y in zip(rows_of(tmp_path / "straight"), rows_of(tmp_path / "broken"), strict=True):
        for column in ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc"):
            assert x[column] == y[column], column


def test_last_and_best_are_kept(data: DataSet, tiny_model: None, tmp_path: Path) -> None:
    result = run.fit(CONFIG, data, tmp_path)
    accuracies = [row["test_acc"] for row in result.rows]
    assert checkpoint.load(tmp_path)["epoch"] == 4
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    assert best["best_accuracy"] == max(accuracies)
    assert Config.from_dict(best["config"]) == CONFIG


@pytest.mark.parametrize(("name", "other"), [("model", "x"), ("num_classes", 7), ("data", "cifar10")])
def test_resume_refuses_another_task(
    name: str, other: object, data: DataSet, tiny_model: None, tmp_path: Path
) -> None:
    payload = checkpoint.pack(Trainer(CONFIG, data, fused=True), 0, [])
    expected = payload[name]
    payload[name] = other
    with pytest.raises(ValueError, match=f"{name}={other!r}.*{name}={expected!r}"):
        run.fit(CONFIG, data, tmp_path, resume=payload)


def test_damaged_checkpoints_are_named(tmp_path: Path, data: DataSet, tiny_model: None) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    file = tmp_path / "last.pt"
    checkpoint.save(file, checkpoint.pack(Trainer(CONFIG, data, fused=True), 0, []))
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 2000, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"last\.pt': {size} bytes that are truncated"):
            checkpoint.load(file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match=r"last\.pt.*lacks config, data"):
        checkpoint.load(file)


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    checkpoint.write_atomically(file, lambda f: f.write(b"old"))

    def dies(f: Any) -> None:
        f.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(file, dies)
    assert file.read_bytes() == b"old"


def test_divergence_keeps_the_last_good_checkpoint(
    data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = type(CONFIG.recipe).learning_rate
    monkeypatch.setattr(
        type(CONFIG.recipe), "learning_rate", lambda self, epoch: rate(self, epoch) if epoch < 1 else 1e30
    )
    with pytest.raises(FloatingPointError, match=r"epoch 2.*--lr"):
        run.fit(CONFIG, data, tmp_path)
    payload = checkpoint.load(tmp_path)
    assert payload["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in payload["state"].values())


def test_sigkill_leaves_a_readable_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--epochs", "2000", "--limit-train", "64", "--limit-test", "20", "--plain", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_preact.train", *flags, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.csv").exists() or len(rows_of(out)) < 2:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    payload = checkpoint.load(out)
    rows = rows_of(out)
    assert payload["epoch"] - len(rows) in (0, 1)  # the checkpoint is written first
    assert [float(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(None not in row and None not in row.values() for row in rows)
    config = Config.from_dict(payload["config"])
    trainer = Trainer(config, load("digits", limit_train=64, limit_test=20), fused=False)
    checkpoint.restore(trainer, payload)
    assert trainer.evaluate().accuracy == payload["last_accuracy"]


# --- CUDA graphs ------------------------------------------------------------------------------------------


def test_graph_needs_a_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="graph=True, device='cpu'"):
        replace(CONFIG, graph=True)
    assert cli.main(["--graph", "--device", "cpu"]) == 2
    assert "CUDA graphs need a CUDA device" in capsys.readouterr().err
    there = replace(CONFIG, device="cuda", graph=True)
    args = cli.parser().parse_args(["--resume", "run", "--device", "cpu"])
    resumed = cli.resumed_config(args, {"config": there.to_dict(), "epoch": 1})
    assert (resumed.device, resumed.graph) == ("cpu", False), "a run can go on on another machine"


def test_graph_records_once_and_leaves_the_statistics(
    data: DataSet, tiny_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the recording: it runs the model a few times, then serves batches of its shape alone."""
    recorded = []

    def record(module: nn.Module, sample: tuple[torch.Tensor]) -> nn.Module:
        recorded.append(sample[0].shape)
        for _ in range(3):
            module(sample[0] + 5)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    weights = []
    for graph in (False, True):
        trainer = Trainer(CONFIG, data, fused=False)
        trainer.config = SimpleNamespace(graph=graph)  # a real one would want a CUDA device
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for count in (32, 32, 20):
            trainer.step(data.train.images[:count].float(), data.train.labels[:count])
        weights.append(trainer.model.state_dict())
    assert recorded == [data.train.images[:32].shape]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graph_trains_as_the_model_itself(data: DataSet, dtype: str) -> None:
    config = replace(CONFIG, device="cuda", dtype=dtype)
    found = []
    for graph in (False, True):
        trainer = Trainer(
            replace(config, graph=graph), load("digits", device="cuda", limit_train=100), fused=True
        )
        trainer.model.train()
        losses = [trainer.step(*batch)[0] for batch in trainer.batches.epoch()]
        found.append((torch.stack(losses), trainer.model.state_dict()))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], msg=name)


# --- measurements -----------------------------------------------------------------------------------------


def test_saved_bytes_counts_each_storage_once(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            return self.fc(x) + self.fc(x)  # keeps x twice, in one storage

    monkeypatch.setattr(models, "create", lambda *args, **kwargs: Twice())
    images, log_softmax, labels, total_weight = 32 * 64 * 4, 32 * 10 * 4, 32 * 8, 4
    assert saved_bytes(Trainer(CONFIG, data, fused=True)) == images + log_softmax + labels + total_weight


def test_fused_keeps_about_half_of_the_plain_activations(data: DataSet) -> None:
    fused, plain = (saved_bytes(Trainer(CONFIG, data, fused=fused)) for fused in (True, False))
    assert fused < 0.6 * plain


def test_compare_steps_measures_both(data: DataSet, tiny_model: None) -> None:
    steps = compare_steps(CONFIG, data, budget_s=0.05)
    assert steps.pairs >= 5
    assert 0 < steps.low <= steps.speedup <= steps.high
    assert min(steps.fused_images_per_s, steps.plain_images_per_s) > 0


def test_recalibration_takes_the_average_over_the_training_images(data: DataSet, tiny_model: None) -> None:
    # One batch: the average is that batch's own statistics, whatever stood there before.
    config = replace(CONFIG, recipe=replace(CONFIG.recipe, batch_size=100))
    trainer = Trainer(config, data, fused=False)
    norm = trainer.model[1]
    norm.running_mean.fill_(77.0)
    seen = []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trainer.recalibrate()
    hook.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen[0].var((0, 2, 3)))
    assert norm.momentum == 0.1


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
