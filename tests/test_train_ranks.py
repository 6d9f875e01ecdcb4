"""Training on several processes: two equal one on the joined batch, any number goes on from another's checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import CONFIG, EXACT, rows_of, start, stop_at_look
from train_ranks import RUNS, TOGETHER

from fused_preact.train import checkpoint, cli, prepare
from fused_preact.train.data import DataSet, load_for
from fused_preact.train.fit import fit
from fused_preact.train.log import TIMINGS
from fused_preact.train.parser import new_config, parser
from fused_preact.train.signals import Interrupted
from fused_preact.train.world import World

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("train_ranks")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs: of one process here, and those of ``train_ranks``."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ranks")
    data = load_for(EXACT)
    fit(EXACT, data, root / "alone")
    in_parts = replace(RUNS["in parts"], grad_accum_steps=4)
    fit(in_parts, load_for(in_parts), root / "alone in parts")
    with pytest.MonkeyPatch.context() as patch:
        stop_at_look(5, patch)
        with pytest.raises(Interrupted):
            fit(TOGETHER, data, root / "begun by one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    here = Path(__file__).parent
    processes = [
        start(
            str(here / "train_ranks.py"),
            str(root),
            first=[str(here)],
            variables=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert ends[1][0] == "", "rank 1 says nothing"
    return root


def numbers(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in checkpoint.load(folder)["metrics"]]


def flat_state(folder: Path) -> dict[str, torch.Tensor]:
    payload = checkpoint.load(folder)
    momenta = {f"momentum {i}": s["momentum_buffer"] for i, s in payload["optimizer"]["state"].items()}
    return payload["state"] | {f"ema {name}": t for name, t in payload["ema"].items()} | momenta


def assert_close(one: Path, other: Path, skip: Callable[[str], bool] = lambda name: False) -> None:
    expected, found = flat_state(one), flat_state(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not skip(name):
            tolerance = 1e-9 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("run", ["together", "sharded", "ended by two", "went on"])
def test_two_processes_are_one_on_the_joined_batch(run: str, root: Path) -> None:
    """Weights, averages, momenta, statistics and metrics, though the last batch's shares are unequal."""
    assert_close(root / "alone", root / run)
    for mine, other in zip(numbers(root / "alone"), numbers(root / run), strict=True):
        assert mine == pytest.approx(other, rel=1e-9)


def of_tests(name: str) -> bool:
    return "running" in name or "num_batches" in name


def test_parts_of_shares_are_parts_of_the_batch(root: Path) -> None:
    """Two processes in two parts have the BN batches of one in four; statistics of tests are the first process's."""
    assert_close(root / "alone in parts", root / "in parts", skip=of_tests)
    mine, other = numbers(root / "alone in parts")[-1], numbers(root / "in parts")[-1]
    assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_inside_the_epoch(root: Path) -> None:
    stopped = checkpoint.load(root / "stopped")
    assert (stopped["epoch"], stopped["step"]) in ((1, 2), (1, 3))  # a vote is answered a step later
    assert [rank["seen"] for rank in stopped["sums"]] == ([32, 32] if stopped["step"] == 2 else [36, 35])
    assert not (root / "stopped" / "epoch-0002.pt").exists()
    assert (root / "stopped" / "epoch-0001.pt").exists()


def test_two_that_were_stopped_end_with_the_bits_of_two_that_were_not(root: Path) -> None:
    one, other = flat_state(root / "together"), flat_state(root / "went on")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name
    assert numbers(root / "together") == numbers(root / "went on")


def test_one_goes_on_where_two_were_stopped(root: Path) -> None:
    fit(TOGETHER, load_for(EXACT), root / "ended by one", resume=checkpoint.load(root / "stopped"))
    assert_close(root / "alone", root / "ended by one")
    for mine, other in zip(numbers(root / "alone"), numbers(root / "ended by one"), strict=True):
        assert mine == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(
    ("ranks", "change", "said"),
    [
        (3, {}, "batch_size=32, world=3"),
        (2, {"grad_accum_steps": 3}, "batch_size=32, grad_accum_steps=3, 2 processes.*multiples of 6"),
        (1, {"grad_accum_steps": 32}, "at least 2; allowed: multiples of 32 from 64"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(
    ranks: int, change: dict[str, Any], said: str, data: DataSet
) -> None:
    with pytest.raises(ValueError, match=said):
        prepare.check_shares(replace(CONFIG, **change), data, World(0, ranks))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compare"], "--compare: of one process, these are 2"),
        (["--plain", "--sync-bn"], "sync_bn=True on a CPU"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(flags: list[str], said: str) -> None:
    args = parser().parse_args([*flags, "--device", "cpu"])
    config = new_config(args)
    with pytest.raises(ValueError, match=said):
        prepare.check_config(args, config, World(0, 2))


def test_fsdp_needs_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--fsdp", "--device", "cpu"]) == 2
    assert "start them with torchrun" in capsys.readouterr().err


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in found.split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds torchrun's processes in /proc")
def test_a_lost_process_ends_the_others_with_what_to_resume_from(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--limit-train", "64", "--limit-test", "20", "--device", "cpu", "--checkpoint-minutes", "0.0001"]
    process = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fused_preact.train",
        *flags, "--epochs", "10000", "--out", str(out),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.csv").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, shown = process.communicate(timeout=60)
    finally:
        process.terminate()
        process.wait()
    assert process.returncode == 1
    ours = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, shown
    assert ours[0].startswith("error: a process of 2 was lost (")
    assert ours[0].endswith(f"go on with --resume {out}")
    done = len(rows_of(out))
    assert checkpoint.load(out)["epoch"] >= done > 0
