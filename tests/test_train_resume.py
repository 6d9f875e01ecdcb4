"""A run that is stopped anywhere ends as one that was left alone; what else a run writes and keeps on its way."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import CONFIG, rows_of, start, stop_at_look

from fused_preact.train import checkpoint, cli, log
from fused_preact.train.config import Config
from fused_preact.train.data import DataSet
from fused_preact.train.ema import EMA
from fused_preact.train.fit import Options, fit
from fused_preact.train.log import COLUMNS, TIMINGS
from fused_preact.train.loop import Sums, Trainer
from fused_preact.train.measure import saved_bytes
from fused_preact.train.networks import checkpoint_units
from fused_preact.train.signals import Interrupted, deferred, handled
from fused_preact.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = replace(CONFIG, recipe=CONFIG.recipe.with_epochs(3), model_ema=True)


# --- stopped and resumed ----------------------------------------------------------------------------------


def assert_same_run(one: Path, other: Path) -> None:
    """Every bit of both checkpoints, and every figure but the timings."""
    for file in ("last.pt", "best.pt"):
        a, b = checkpoint.load(one / file), checkpoint.load(other / file)
        for part in ("state", "ema"):
            for name, value in (a[part] or {}).items():
                assert torch.equal(value, b[part][name]), f"{file} {part} {name}"
        for number, entry in a["optimizer"]["state"].items():
            other_entry = b["optimizer"]["state"][number]
            assert torch.equal(entry["momentum_buffer"], other_entry["momentum_buffer"]), number
        assert (a["epoch"], a["step"], a["scaler"]) == (b["epoch"], b["step"], b["scaler"])
    tables = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (one, other)]
    for mine, yours in zip(*tables, strict=True):
        assert {k: v for k, v in mine.items() if k not in TIMINGS} == {
            k: v for k, v in yours.items() if k not in TIMINGS
        }
    csvs = [
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows_of(run)] for run in (one, other)
    ]
    assert csvs[0] == csvs[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_stopped_inside_epochs_and_tests_ends_with_the_same_bits(
    dtype: str, data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, dtype=dtype)
    fit(config, data, tmp_path / "alone")
    for at in (1, 3, 4, 8):  # an epoch has looks 0 to 3 after its steps, 4 and 5 in its test
        out = tmp_path / f"stopped-{at}"
        payload = None
        for _ in range(2):  # and once more at the same distance
            with monkeypatch.context() as patch:
                stop_at_look(at, patch)
                with pytest.raises(Interrupted) as caught:
                    fit(config, data, out, resume=payload)
            assert caught.value.number == signal.SIGTERM
            torch.manual_seed(999)  # a new process has another random stream
            payload = checkpoint.load(out)
        assert payload is not None
        assert (payload["epoch"], payload["step"]) != (0, 0)
        fit(config, data, out, resume=payload)
        assert_same_run(tmp_path / "alone", out)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """ResNet-20 with kill -9 and SIGTERM; ``python tests/kill_and_resume.py`` does it for longer."""
    script = Path(__file__).with_name("kill_and_resume.py")
    process = start(str(script), "--trials", "1", "--kills", "6", "--", "--model-ema", cwd=tmp_path)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    places = re.findall(r"\((\d), (\d)\)", shown)
    assert any(step != "0" for _, step in places), f"no kill inside an epoch: {shown}"


@pytest.mark.parametrize(("minutes", "inside"), [(None, False), (0.0, True)])
def test_checkpoints_inside_an_epoch(
    minutes: float | None,
    inside: bool,
    data: DataSet,
    tiny_model: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places, save = [], checkpoint.save

    def noted(path: Path, payload: dict[str, Any]) -> None:
        if path.name == "last.pt":
            places.append((payload["epoch"], payload["step"]))
        save(path, payload)

    monkeypatch.setattr(checkpoint, "save", noted)
    fit(replace(SHORT, recipe=SHORT.recipe.with_epochs(1)), data, tmp_path, options=Options(minutes))
    assert ((0, 3) in places) == inside
    assert places[-1] == (1, 0)


def test_sums_go_on_with_their_own_rank_or_all_with_the_first() -> None:
    states = []
    for rank in range(2):
        sums = Sums(torch.device("cpu"))
        sums.add(torch.tensor(0.5 + rank), torch.tensor(3 + rank), 10, timed=True)
        states.append(sums.state())
    for world, seen in ((World(1, 2), [10]), (World(0, 1), [20]), (World(2, 3), [0]), (World(0, 3), [20])):
        sums = Sums(torch.device("cpu"))
        sums.load(states, world)
        assert [sums.seen] == seen
    assert Sums.of(states).loss == pytest.approx(1.0)
    assert Sums.of(states).accuracy == pytest.approx(35.0)


def signalled(times: int) -> None:
    """Send signals to this process inside a run; ``seen`` are those that it went on after."""
    with deferred() as asked:
        for number in range(times):
            assert asked() == (signal.SIGTERM if number else 0)
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(number)


seen: list[int] = []


@pytest.mark.parametrize(("times", "lived"), [(1, [0]), (2, [0])])
def test_the_first_signal_waits_and_the_second_does_not(times: int, lived: list[int]) -> None:
    """One that comes after the last look ends the run too."""
    seen.clear()
    with pytest.raises(Interrupted) as caught, handled():
        signalled(times)
    assert caught.value.number == signal.SIGTERM
    assert seen == lived


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--order", "original"), ("--shortcut", "B"), ("--body", "bottleneck"), ("--lr", "0.3")],
)
def test_a_checkpoint_of_another_variant_is_refused(
    flag: str, value: str, data: DataSet, tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, limit_train=100, limit_test=50)
    checkpoint.save(tmp_path / "last.pt", checkpoint.pack(Trainer(config, data, fused=True), []))
    sources = ["--resume"] if flag == "--lr" else ["--resume", "--eval"]
    for source in sources:
        assert cli.main([source, str(tmp_path), flag, value]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {flag[2:]}=")
        assert "the checkpoint has" in shown
        assert shown.count("\n") == 1


# --- what is kept and written -----------------------------------------------------------------------------


def test_the_last_few_checkpoints_are_kept(data: DataSet, tiny_model: None, tmp_path: Path) -> None:
    fit(CONFIG, data, tmp_path, options=Options(keep=2))
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "best.pt",
        "epoch-0003.pt",
        "epoch-0004.pt",
        "last.pt",
    ]
    third = checkpoint.load(tmp_path / "epoch-0003.pt")
    assert third["epoch"] == 3
    fit(CONFIG, data, tmp_path, resume=third, options=Options(keep=2))
    assert checkpoint.load(tmp_path)["epoch"] == 4


def test_metrics_are_written_as_csv_and_as_json_lines(
    data: DataSet, tiny_model: None, tmp_path: Path
) -> None:
    result = fit(SHORT, data, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines == result.rows
    assert set(lines[0]) == {*COLUMNS, "ema_test_loss", "ema_test_acc"}
    assert [float(row["ema_test_acc"]) for row in rows_of(tmp_path)] == [row["ema_test_acc"] for row in lines]


def test_tensorboard_has_every_epoch_once(
    data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch:
        stop_at_look(9, patch)
        with pytest.raises(Interrupted):
            fit(SHORT, data, tmp_path, options=Options(tensorboard=True))
    resumed = checkpoint.load(tmp_path)
    rows = fit(SHORT, data, tmp_path, resume=resumed, options=Options(tensorboard=True)).rows
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("test/acc")]
    assert found == [(row["epoch"], pytest.approx(row["test_acc"])) for row in rows]


def test_without_tensorboard_the_flag_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fused_preact\[tensorboard\]'"):
        log.writer()
    assert cli.main(["--log-tensorboard", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: --log-tensorboard: tensorboard is not installed")


def test_test_images_that_cannot_be_read_are_found_before_training(
    data: DataSet, tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(self: object, recipe: object, parts: object) -> Any:
        raise OSError("val/cat/7.jpeg: cannot identify image file")

    monkeypatch.setattr(type(data.test), "plain", plain)
    monkeypatch.setattr(Trainer, "step", lambda *args: pytest.fail("trained first"))
    with pytest.raises(OSError, match=r"7\.jpeg"):
        fit(CONFIG, data, tmp_path)


# --- how steps are made -----------------------------------------------------------------------------------


def test_ema_is_the_average_of_the_weights_so_far() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.9)
    expected = model[0].weight.detach().clone().double()
    for step in range(40):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
    torch.testing.assert_close(ema.averages["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    last = model[0].weight.detach().clone()
    with ema.in_place():
        assert torch.equal(model[0].weight, ema.averages["0.weight"])
    assert torch.equal(model[0].weight, last)


def test_the_best_epoch_is_that_of_the_averaged_weights(
    data: DataSet, tiny_model: None, tmp_path: Path
) -> None:
    rows = fit(SHORT, data, tmp_path).rows
    averaged = [row["ema_test_acc"] for row in rows]
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["epoch"] == 1 + averaged.index(max(averaged))
    assert best["best_accuracy"] == max(averaged)


def gradients(trainer: Trainer) -> list[Tensor]:
    trainer.model.train()
    torch.manual_seed(0)
    trainer.step(*next(trainer.batches.epoch(0)))
    return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("fused", [False, True])
def test_grad_checkpointing_keeps_less_and_changes_nothing(fused: bool, data: DataSet) -> None:
    recipe = replace(CONFIG.recipe, model="cifar_preact_resnet56", batch_size=16)
    config = Config("digits", recipe, dtype="float64")
    ordinary, sparing = (
        Trainer(replace(config, grad_checkpointing=on), data, fused=fused) for on in (False, True)
    )
    for one, other in zip(gradients(ordinary), gradients(sparing), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for (name, one), other in zip(ordinary.model.named_buffers(), sparing.model.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-12, atol=1e-14), name
    assert saved_bytes(sparing) < 0.4 * saved_bytes(ordinary)


def test_grad_checkpointing_updates_the_statistics_of_any_bn_once() -> None:
    """PyTorch's own BN would take the recomputation for another batch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            units = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(5)]
            self.stages = nn.ModuleList([nn.Sequential(*units)])

        def forward(self, x: Tensor) -> Tensor:
            return self.stages[0](x)

    ordinary = Net()
    sparing = Net()
    sparing.load_state_dict(ordinary.state_dict())
    checkpoint_units(sparing)
    for net in (ordinary, sparing):
        torch.manual_seed(1)
        net(torch.randn(8, 4)).square().sum().backward()
    for (name, one), other in zip(ordinary.named_buffers(), sparing.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert all(m.momentum == 0.1 for m in sparing.modules() if isinstance(m, nn.BatchNorm1d))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(
    dtype: str, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without BN and dropout a step in parts is the step; its loss and right answers are the batch's."""
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(
        "fused_preact.models.create", lambda *args, **kwargs: __import__("copy").deepcopy(made)
    )
    found = []
    for parts in (1, 3):  # of 32 images: 11, 11 and 10
        trainer = Trainer(replace(CONFIG, grad_accum_steps=parts, dtype=dtype), data, fused=False)
        loss, right = trainer.step(*next(trainer.batches.epoch(0)))
        found.append((loss.float(), right, *(p.detach() for p in trainer.model.parameters())))
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_compile_and_memory_format_reach_the_model(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    trainer = Trainer(replace(CONFIG, compile=True, channels_last=False), data, fused=True)
    assert compiled == [type(trainer.model).__name__]
    assert all(p.is_contiguous() for p in trainer.model.parameters())
    images, _ = next(trainer.batches.epoch(0))
    assert trainer.as_wanted(images).is_contiguous()
    assert not Trainer(CONFIG, data, fused=True).model.stages[0][0].conv1.weight.is_contiguous()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compile": True, "grad_checkpointing": True}, "compile=True, grad_checkpointing=True"),
        ({"fsdp": True, "dtype": "float16"}, "fsdp=True, dtype='float16'"),
        ({"grad_accum_steps": 0}, "grad_accum_steps=0"),
        ({"model_ema_decay": 1.0}, "model_ema_decay=1.0"),
    ],
)
def test_config_refuses_what_does_not_go_together(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--keep", "0"], "keep=0"), (["--checkpoint-minutes", "-1"], "checkpoint_minutes=-1.0")],
)
def test_options_refuse_impossible_numbers(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*flags, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
