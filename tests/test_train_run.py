"""The training loop: recipes, exact resume, checkpoints that survive a kill, CUDA graphs, measurements."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_helpers import CONFIG, interrupt_after, rows_of, tiny

from fused_preact import models
from fused_preact.train import checkpoint, cli, run
from fused_preact.train.config import RECIPES, Config
from fused_preact.train.data import DataSet, load
from fused_preact.train.loop import Trainer, parameter_groups
from fused_preact.train.measure import compare_steps, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


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

    def record(module: nn.Module, sample: tuple[torch.Tensor]) -> Any:
        recorded.append(sample[0].shape)
        for _ in range(3):
            module(sample[0] + 5)

        def replay(images: torch.Tensor) -> torch.Tensor:
            assert images.shape == sample[0].shape, "a graph has one shape"
            return module(images)

        return replay

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
