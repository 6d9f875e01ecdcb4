"""The training loop: recipes, exact resume, checkpoints that survive a kill, CUDA graphs, measurements."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO, FileIO
from pathlib import Path
from subprocess import DEVNULL
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_helpers import CONFIG, interrupt_after, rows_of, start, temporaries, tiny

from fused_preact import models
from fused_preact.train import checkpoint, cli, fit, parser
from fused_preact.train.config import Config
from fused_preact.train.data import DataSet, load
from fused_preact.train.loop import Trainer
from fused_preact.train.measure import compare_steps, saved_bytes
from fused_preact.train.networks import parameter_groups
from fused_preact.train.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


# --- recipes ----------------------------------------------------------------------------------------------


def test_cifar_schedule_is_the_papers() -> None:
    recipe = RECIPES["cifar10-resnet20-torch"]
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
    (every,) = parameter_groups(model, RECIPES["cifar10-resnet20-torch"])
    assert len(every["params"]) == 6
    decayed, spared = parameter_groups(model, replace(RECIPES["cifar10-resnet20-torch"], decay_norm=False))
    assert decayed["weight_decay"] == 1e-4
    assert sorted(p.ndim for p in decayed["params"]) == [2, 4]
    assert spared["weight_decay"] == 0
    assert sorted(p.ndim for p in spared["params"]) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"schedule": "x"},
        {"pad": 33},
        {"momentum": 2.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"warmup_epochs": 99.0},
    ],
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
    fit.fit(config, data, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(config, data, tmp_path / "broken")
    broken = checkpoint.load(tmp_path / "broken")
    assert broken["epoch"] == 2
    torch.manual_seed(999)  # a new process has another random stream
    fit.fit(config, data, tmp_path / "broken", resume=broken)
    a, b = checkpoint.load(tmp_path / "straight"), checkpoint.load(tmp_path / "broken")
    for name in a["state"]:
        assert torch.equal(a["state"][name], b["state"][name]), name
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"]), i
    assert a["scaler"] == b["scaler"]
    for x, y in zip(rows_of(tmp_path / "straight"), rows_of(tmp_path / "broken"), strict=True):
        for column in ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc"):
            assert x[column] == y[column], column


def test_last_and_best_are_kept(data: DataSet, tiny_model: None, tmp_path: Path) -> None:
    result = fit.fit(CONFIG, data, tmp_path)
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
    payload = checkpoint.pack(Trainer(CONFIG, data, fused=True), [])
    expected = payload[name]
    payload[name] = other
    with pytest.raises(ValueError, match=f"{name}={other!r}.*{name}={expected!r}"):
        fit.fit(CONFIG, data, tmp_path, resume=payload)


def dealing(plain: Any, accuracies: Iterator[float]) -> Any:
    """``evaluate`` with the next of ``accuracies``; the look at the test images before training gets none."""

    def evaluate(self: Trainer, *args: Any, batches: int | None = None) -> Any:
        stats = plain(self, *args, batches=batches)
        return stats if batches else replace(stats, accuracy=next(accuracies))

    return evaluate


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run catches it."""


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_between_last_and_best_is_mended_on_resume(
    at: int, data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Accuracies are dealt out: the epoch whose best.pt the kill takes away is the best of all.
    accuracies = {1: [90.0, 80.0, 70.0, 60.0], 2: [80.0, 90.0, 70.0, 60.0]}[at]
    plain, save, dealt = Trainer.evaluate, checkpoint.save, iter(accuracies)
    monkeypatch.setattr(Trainer, "evaluate", dealing(plain, dealt))

    def killed(path: Path, payload: dict[str, Any]) -> None:
        if path.name == "best.pt" and payload["epoch"] == at:
            raise Killed
        save(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Killed):
            fit.fit(CONFIG, data, tmp_path)
    assert (tmp_path / "best.pt").exists() == (at > 1)
    last = checkpoint.load(tmp_path)
    fit.fit(CONFIG, data, tmp_path, resume=last)
    best = checkpoint.load(tmp_path / "best.pt")
    assert (best["epoch"], best["last_accuracy"]) == (at, 90.0)
    for name, value in last["state"].items():
        assert torch.equal(best["state"][name], value), name


@pytest.mark.parametrize("state", ["missing", "damaged", "of an abandoned future", "whole"])
def test_resume_looks_at_what_best_holds(
    state: str, data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, dealt = Trainer.evaluate, iter([90.0, 50.0, 95.0, 20.0, 60.0, 20.0])
    monkeypatch.setattr(Trainer, "evaluate", dealing(plain, dealt))
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(CONFIG, data, tmp_path)
    second, best = checkpoint.load(tmp_path), tmp_path / "best.pt"
    kept = best.read_bytes()
    fit.fit(CONFIG, data, tmp_path, resume=second)  # on to 95 % ...
    if state == "missing":
        best.unlink()
    elif state == "damaged":
        best.write_bytes(best.read_bytes()[:1000])
    elif state == "whole":
        best.write_bytes(kept)
    fit.fit(CONFIG, data, tmp_path, resume=second)  # ... and once more from epoch 2, to 60 %
    expected = (1, 90.0) if state == "whole" else (3, 60.0)  # epoch 1 of 90 % is nowhere else to be had
    found = checkpoint.load(best)
    assert (found["epoch"], found["last_accuracy"]) == expected


def test_damaged_checkpoints_are_named(tmp_path: Path, data: DataSet, tiny_model: None) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    file = tmp_path / "last.pt"
    checkpoint.save(file, checkpoint.pack(Trainer(CONFIG, data, fused=True), []))
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 2000, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"last\.pt': {size} bytes that are truncated"):
            checkpoint.load(file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match=r"last\.pt.*lacks config, data"):
        checkpoint.load(file)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts, lists and tuples by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        nested = isinstance(item, dict | list | tuple)
        found |= flat(item, f"{path}/{key}") if nested else {f"{path}/{key}": item}
    return found


def test_no_damage_to_a_checkpoint_goes_unnoticed(tmp_path: Path, data: DataSet, tiny_model: None) -> None:
    """Any bit of the file, the directory's too: refused, or without a consequence."""
    fit.fit(replace(CONFIG, recipe=CONFIG.recipe.with_epochs(1)), data, tmp_path)
    file, chance = tmp_path / "last.pt", random.Random(0)
    whole, good = file.read_bytes(), flat(checkpoint.load(file))
    with zipfile.ZipFile(file) as records:
        directory = records.start_dir
        # The bit that makes a directory of a record to torch's reader, which then gives zeros for it.
        attributes, at = [], directory
        for _ in records.infolist():
            attributes.append((at + 38, 4))
            at += 46 + sum(int.from_bytes(whole[at + i : at + i + 2], "little") for i in (28, 30, 32))
    bits = [(chance.randrange(len(whole)), chance.randrange(8)) for _ in range(250)]
    bits += [(chance.randrange(directory, len(whole)), chance.randrange(8)) for _ in range(250)]
    refused = 0
    for at, bit in bits + attributes:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            found = flat(checkpoint.load(file))
        except ValueError:
            refused += 1
            continue
        assert found.keys() == good.keys()
        for name, value in good.items():
            same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
            assert same, f"byte {at} bit {bit}: {name}"
    assert refused > 200


def test_packed_and_double_records_are_refused(tmp_path: Path, data: DataSet, tiny_model: None) -> None:
    file = tmp_path / "last.pt"
    checkpoint.save(file, checkpoint.pack(Trainer(CONFIG, data, fused=True), []))
    with zipfile.ZipFile(BytesIO(file.read_bytes())) as records, zipfile.ZipFile(file, "w", 8) as packed:
        for name in records.namelist():
            packed.writestr(name, records.read(name))
    with pytest.raises(ValueError, match=r"last\.pt': \d+ bytes that are"):
        checkpoint.load(file)


def changed(payload: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value, or with ``None`` for the whole path's last key none at all."""
    if not path:
        return value
    copy = list(payload) if isinstance(payload, list | tuple) else dict(payload)
    if value is KeyError and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(
            copy[path[0]] if path[0] in copy or isinstance(copy, list) else None, path[1:], value
        )
    return tuple(copy) if isinstance(payload, tuple) else copy


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), 1, "format=1, this version reads 2"),
        (("format",), torch.zeros(9), "format=Tensor"),
        (("model",), torch.zeros(9), "model=Tensor, this run has model='cifar_preact_resnet20'"),
        (("num_classes",), 100, "num_classes=100, this run has num_classes=10"),
        (("config",), None, "config: NoneType found"),
        (("config", "recipe"), KeyError, "config: lacks recipe"),
        (("config", "recipe", "lr"), KeyError, "config recipe: lacks lr"),
        (("config", "recipe", "lr"), "high", "config recipe: lr='high', allowed: float"),
        (("config", "recipe", "schedule"), "line", "schedule='line': allowed: cosine, step"),
        (("config", "recipe", "mean"), (1.0, 2.0), "must have a number for each channel"),
        (("config", "new"), 1, "config: of another version, has unknown new"),
        (("config", "seed"), True, "config: seed=True, allowed: int"),
        (("config", "seed"), 2**64, "seed=18446744073709551616: allowed"),
        (("state",), None, "state=None"),
        (("state", "0.weight"), KeyError, "lacks state 0.weight, which this run's model has"),
        (("state", "stem.weight"), torch.zeros(1), "state 'stem.weight', which this run's model has not"),
        (
            ("state", "0.weight"),
            torch.zeros(4, 1, 5, 5),
            "state 0.weight of torch.float32 [4, 1, 5, 5], this run",
        ),
        (("state", "0.bias"), torch.zeros(4).double(), "state 0.bias of torch.float64 [4], this run"),
        (("state", "0.bias"), torch.zeros(4).to_sparse(), "state 0.bias=Tensor"),
        (("optimizer",), None, "optimizer=None"),
        (("optimizer", "param_groups"), [], "0 optimizer groups, this run has 1"),
        (("optimizer", "param_groups", 0, "momentum"), KeyError, "optimizer momentum=None, this run has 0.9"),
        (("optimizer", "param_groups", 0, "lr"), "x", "optimizer lr='x'"),
        (
            ("optimizer", "state", 0, "momentum_buffer"),
            torch.zeros(3),
            "momentum_buffer 0 of torch.float32 [3]",
        ),
        (("optimizer", "state", 99), {}, "optimizer state 99"),
        (("scaler",), {"scale": 1.0}, "scaler=dict"),
        (("step",), 1, "step=1 in epoch 2 of 1"),
        (("step",), True, "step=True"),
        (("sums",), [{"loss": 1.0}], "sums=list at step 0"),
        (("ema",), {}, "ema, this run has model_ema=False"),
        (("data_card", "class_names"), ["0"], "checkpoint has 1 classes, this run's data has 10"),
        (("data_card", "class_names"), ["zero", *"123456789"], "class 0 'zero', this run's data has '0'"),
        (
            ("data_card", "pixel_mean"),
            torch.zeros(3),
            "pixel_mean that is no float32 tensor of an image's shape",
        ),
        (("data_card", "image_size"), [8], "image_size that is neither None nor two numbers"),
        (("data_card", "white"), 0, "white that is no number from 1 to 255"),
        (("data_card",), None, "no class names and mean image"),
        (("epoch",), 7, "epoch=7"),
        (("metrics", 0, "lr"), KeyError, "metrics dict, allowed: numbers for epoch, lr"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_foreign_checkpoints_are_one_line(
    path: tuple[Any, ...],
    value: Any,
    said: str,
    data: DataSet,
    tiny_model: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(CONFIG, recipe=CONFIG.recipe.with_epochs(1), limit_train=100, limit_test=50)
    fit.fit(config, data, tmp_path)
    file = tmp_path / "last.pt"
    torch.save(changed(checkpoint.load(file), path, value), file)
    capsys.readouterr()
    for flags in (["--eval", str(file)], ["--resume", str(tmp_path)]):
        assert cli.main(flags) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err[:7], shown.err.count("\n")) == ("", "error: ", 1)
        assert said in shown.err


def test_the_plain_checkpoint_is_looked_at_before_training(
    data: DataSet, tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit.fit(replace(CONFIG, limit_train=100, limit_test=50), data, tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "last.pt").write_bytes(b"PK")
    capsys.readouterr()
    assert cli.main(["--resume", str(tmp_path), "--compare"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2 bytes that are truncated" in shown.err


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(
    data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the file that is: torch's own writer to a file would not say so."""
    file, payload = tmp_path / "last.pt", checkpoint.pack(Trainer(CONFIG, data, fused=True), [])
    checkpoint.save(file, payload)
    whole = file.read_bytes()

    class Full(FileIO):
        room = 0

        def write(self, data: Any) -> int:
            if self.tell() + len(data) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(checkpoint, "open", Full, raising=False)
    for Full.room in range(0, len(whole), 499):
        with pytest.raises(OSError, match="No space left on device") as caught:
            checkpoint.save(file, payload)
        assert caught.value.filename == str(file)
        assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
        assert file.read_bytes() == whole
    Full.room = 1 << 20
    checkpoint.save(file, payload)


def test_an_interrupt_anywhere_in_a_save_is_an_interrupt(
    data: DataSet, tiny_model: None, tmp_path: Path
) -> None:
    """Raised at every 13th line that Python runs below ``save``, torch's and the library's own included."""
    file, payload = tmp_path / "last.pt", checkpoint.pack(Trainer(CONFIG, data, fused=True), [])
    checkpoint.save(file, payload)
    kept = checkpoint.load(file)["state"]

    def interrupted_at(line: int) -> bool:
        left = line

        def trace(frame: Any, event: str, argument: object) -> Any:
            nonlocal left
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            checkpoint.save(file, payload)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return left <= 0

    line = 1
    while interrupted_at(line):
        line += 13
        assert temporaries(tmp_path) == [], line
        assert flat(checkpoint.load(file)["state"]).keys() == flat(kept).keys(), line
    assert line > 500


LIMITED = """
import resource, sys
from fused_preact.train import cli
from fused_preact.train.log import Log
plain = Log.epoch
def epoch(self, row):
    plain(self, row)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
Log.epoch = epoch
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_file_size_limit_ends_the_run_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [
        "--epochs",
        "3",
        "--limit-train",
        "64",
        "--limit-test",
        "20",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    process = start("-c", LIMITED, *flags)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 1
    assert shown.startswith(f"error: {out / 'last.pt'}: File too large; ")
    assert shown.endswith(f"go on with --resume {out}\n")
    assert shown.count("\n") == 1
    assert temporaries(out) == []
    assert checkpoint.load(out)["epoch"] == 1


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    checkpoint.write_atomically(file, lambda f: f.write(b"old"))

    def dies(f: Any) -> None:
        f.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(file, dies)
    assert file.read_bytes() == b"old"
    assert temporaries(tmp_path) == []

    def interrupted(f: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(file, interrupted)
    assert temporaries(tmp_path) == []


def test_divergence_keeps_the_last_good_checkpoint(
    data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = type(CONFIG.recipe).learning_rate
    monkeypatch.setattr(
        type(CONFIG.recipe), "learning_rate", lambda self, epoch: rate(self, epoch) if epoch < 1 else 1e30
    )
    with pytest.raises(FloatingPointError, match=r"epoch 2.*--lr"):
        fit.fit(CONFIG, data, tmp_path)
    payload = checkpoint.load(tmp_path)
    assert payload["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in payload["state"].values())


def test_sigkill_leaves_a_readable_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--epochs", "2000", "--limit-train", "64", "--limit-test", "20", "--plain", "--device", "cpu"]
    process = start("-m", "fused_preact.train", *flags, "--out", str(out), cwd=tmp_path, stdout=DEVNULL)
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
    args = parser.parser().parse_args(["--resume", "run", "--device", "cpu"])
    resumed = parser.resumed_config(args, {"config": there.to_dict(), "epoch": 1})
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
        trainer.config = SimpleNamespace(
            **{**vars(CONFIG), "graph": graph}
        )  # a real one would want a CUDA device
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
        losses = [trainer.step(*batch)[0] for batch in trainer.batches.epoch(0)]
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


class Shrinking(nn.Sequential):
    """BN on a map of 1x1, as the last one of an ImageNet model on 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))


def test_an_image_left_over_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "create", lambda *args, **kwargs: Shrinking())
    flags = ["--batch-size", "8", "--limit-train", "17", "--limit-test", "9", "--epochs", "2"]
    assert cli.main([*flags, "--bn-recalibrate", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "2 epochs of 16 images (of 17: one would be left over), batch 8" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 2
    # The recalibrated statistics are those of the two batches of eight.
    data = load("digits", limit_train=17, limit_test=9)
    trainer = Trainer(Config.from_dict(checkpoint.load(tmp_path)["config"]), data, fused=True)
    checkpoint.restore(trainer, checkpoint.load(tmp_path / "recalibrated.pt"))
    assert trainer.model[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("flags", "said"), [(["--limit-train", "1"], "limit_train=1"), (["--batch-size", "1"], "batch_size=1")]
)
def test_one_image_is_refused_up_front(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*flags, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {said}: must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
