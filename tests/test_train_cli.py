"""The training script as its user sees it: the log, the summary, the command line."""

from __future__ import annotations

import csv
import errno
import functools
import io
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from train_helpers import CONFIG, interrupt_after, rows_of, start, temporaries, tiny

from fused_preact import models
from fused_preact.train import checkpoint, cli, console, fit, run
from fused_preact.train.data import DataSet
from fused_preact.train.log import COLUMNS, Log, metrics_csv
from fused_preact.train.loop import Trainer
from fused_preact.train.measure import compare_steps
from fused_preact.train.recipes import RECIPES
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
    assert not log.bar(0, 1, 10)
    log.epoch(ROW)
    assert stream.getvalue().startswith("fused epoch 1/3  lr 1.0000")
    assert stream.getvalue().count("\n") == 1
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_terminal_bar_is_one_line_that_the_epoch_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    log = Log(3, "fused", stream)
    drawn = []
    for batch in range(1, 11):
        time.sleep(0.03)
        if log.bar(0, batch, 10):
            drawn.append(batch)
            log.detail(1.25, 50.0, 1000.0)
    assert 1 < len(drawn) < 8, "at most ten times a second"
    bars = stream.getvalue()
    assert "\n" not in bars
    for part in ("fused epoch 1/3", f"{drawn[1]}/30", "loss 1.250", "acc 50.0 %", "1,000 img/s", "ETA 00:0"):
        assert part in bars, part
    assert all(len(bar) < 120 for bar in bars.split("\r"))
    log.epoch(ROW)
    after = stream.getvalue().removeprefix(bars)
    assert after.split("\r")[1].strip() == "", "the bar is wiped off"
    assert after.split("\r")[-1].startswith("fused epoch 1/3  lr")
    monkeypatch.setenv("TERM", "dumb")
    assert not Log(3, "fused", stream).bar(0, 1, 10)


def test_a_run_of_many_and_other_ranks_say_nothing_of_epochs() -> None:
    stream = io.StringIO()
    Log(3, "fused", stream, quiet=True).epoch(ROW)
    other = Log(3, "fused", stream, speak=False)
    other.epoch(ROW)
    other.line("unheard")
    assert stream.getvalue() == ""


class Reader(io.StringIO):
    """A stream whose reader does ``error``."""

    encoding = "ascii"

    def __init__(self, error: OSError | None = None) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        text.encode(self.encoding)  # as a real stream
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), ConnectionResetError(), OSError(errno.EIO, "hung up")])
def test_a_reader_that_is_gone_is_nothing(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Reader(error)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    log = Log(3, "fused", stream)
    log.epoch(ROW)
    for batch in (1, 2):
        log.bar(0, batch, 10)
        time.sleep(0.11)
    log.epoch(ROW)


def test_a_log_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        Log(3, "fused", Reader(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))).epoch(ROW)


def test_a_log_without_a_stream_or_without_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Reader()
    Log(1, "fused", stream).line("files in größe")
    assert stream.getvalue() == "files in gr\\xf6\\xdfe\n"
    monkeypatch.setattr("sys.stdout", None)  # as after >&-
    log = Log()
    log.line("unheard")
    assert not log.bar(0, 1, 10)


def test_an_error_is_one_line() -> None:
    assert console.one_line(ValueError("a\n  b")) == "a b"
    assert console.one_line(ValueError()) == "ValueError"
    assert console.one_line(OSError(errno.EACCES, "Permission denied", "x/y")) == "x/y: Permission denied"
    assert console.one_line(FileNotFoundError("none there")) == "none there"


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
    result = fit.fit(CONFIG, data, tmp_path)
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
        (["--model", "resnet51"], ["model='resnet51'", "cifar_preact_resnet20"]),
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
        checkpoint.save(Path("run/last.pt"), checkpoint.pack(Trainer(config, data, fused=True), []))
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


# --- files, readers and signals ----------------------------------------------------------------------------


TRIAL = ["-m", "fused_preact.train", "--limit-train", "64", "--limit-test", "20", "--device", "cpu"]


@pytest.mark.parametrize(
    "where", ["a file", "below a file", "a dead link", "no folder of files", "read-only", "plain"]
)
def test_out_that_takes_no_files_is_refused_before_training(
    where: str,
    tiny_model: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    out = {
        "below a file": file / "run",
        "a dead link": tmp_path / "link",
        "no folder of files": Path("/proc/run"),
    }
    out = out.get(where, file if where == "a file" else tmp_path / "run")
    said = {
        "below a file": "Not a directory",
        "no folder of files": "No such file",
        "read-only": "Read-only file",
    }
    if where == "read-only":  # root, as tests are in a container, may write anywhere
        error = OSError(errno.EROFS, os.strerror(errno.EROFS))
        monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(_raise, error))
    if where == "plain":
        out.mkdir()
        (out / "plain").touch()
    monkeypatch.setattr(run, "run", functools.partial(_raise, AssertionError("training began")))
    compare = ["--compare"] if where == "plain" else []
    assert cli.main(["--out", str(out), "--device", "cpu", *compare]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: --out {out}")
    assert said.get(where, "File exists") in shown.err
    assert shown.err.count("\n") == 1


def _raise(error: BaseException, *args: object, **kwargs: object) -> None:
    raise error


def test_a_reader_that_closes_the_pipe_stops_no_run(tmp_path: Path) -> None:
    process = start(*TRIAL, "--epochs", "2", "--out", str(tmp_path / "run"))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert checkpoint.load(tmp_path / "run")["epoch"] == len(rows_of(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "learning_curve.png").is_file()


@pytest.mark.parametrize(
    ("flags", "status"), [(["--help"], 0), (["--data", "mnist"], 2), (["--resume", "nowhere"], 2)]
)
def test_nobody_reads_at_all(flags: list[str], status: int) -> None:
    """Both streams a pipe without a reader, as after ``2>&1 | true``: only the status tells."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("-m", "fused_preact.train", *flags, stdout=writer, stderr=writer)
    os.close(writer)
    assert process.wait(60) == status


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "flags", [["--help"], [*TRIAL[2:], "--epochs", "1", "--out", "run"]], ids=["help", "run"]
)
def test_a_full_disk_behind_stdout_is_one_line(flags: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start("-m", "fused_preact.train", *flags, stdout=full, cwd=tmp_path)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 1
    assert shown.startswith("error: <stdout>: No space left on device; ")
    assert shown.count("\n") == 1
    assert temporaries(tmp_path) == []


SLOW_TORCH = """
import time
print("loading", flush=True)
try:
    time.sleep(60)
except BaseException as error:  # as numpy's C API does it
    raise ImportError("numpy._core.multiarray failed to import") from error
"""


def test_interrupt_while_torch_loads(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    process = start("-m", "fused_preact.train", "--help", first=[str(tmp_path)])
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert (process.returncode, shown) == (130, "\ninterrupted\n")


def test_importing_the_package_takes_no_signal() -> None:
    code = "import signal as s, fused_preact; assert s.getsignal(s.SIGINT) is s.default_int_handler"
    process = start("-c", code, "fused_preact.train")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_a_signal_in_an_epoch_writes_a_checkpoint_first(
    number: int, word: str, status: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(*TRIAL, "--limit-train", "1000", "--epochs", "2000", "--plain", "--out", str(out))
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == status
    assert shown == f"\n{word}; the last checkpoint is {out / 'last.pt'}, go on with --resume {out}\n"
    assert temporaries(out) == []
    payload = checkpoint.load(out)
    assert (payload["epoch"], payload["step"]) != (0, 0)
    assert payload["sums"][0]["seen"] == payload["step"] * 64


EXECUTED = """
exec("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
"""


def test_interrupt_in_executed_text_has_the_same_status(tmp_path: Path) -> None:
    """Dataclasses are such text; a KeyboardInterrupt in it makes Python kill itself at exit, caught or not."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").touch()
    (tmp_path / "matplotlib" / "figure.py").write_text(EXECUTED)
    out = tmp_path / "run"
    process = start(*TRIAL, "--epochs", "1", "--out", str(out), first=[str(tmp_path)])
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown.startswith("\ninterrupted; the last checkpoint is ")
    assert shown.count("\n") == 2


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """As in ``sh -c 'python -m fused_preact.train &'``."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    process = start("-c", code, *TRIAL, "--epochs", "1", "--out", str(tmp_path / "run"))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert (process.returncode, shown) == (0, "")
