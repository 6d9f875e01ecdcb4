"""What a run shows and records: a progress bar or plain lines, metrics.csv, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from . import console

Row = dict[str, float]  # one epoch, by column; accuracies in percent
COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_acc",
    "test_loss",
    "test_acc",
    "images_per_s",
    "train_seconds",
    "peak_memory_mib",
)
OPTIONAL = ("test_top5", "ema_test_loss", "ema_test_acc")  # of more than ten classes, of --model-ema
TIMINGS = (
    "images_per_s",
    "train_seconds",
    "peak_memory_mib",
)  # all else is the same in a run that was resumed


class _Quiet:
    """The stream for tqdm: a reader that has gone is nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        console.write(self.stream, text)

    def flush(self) -> None:
        """``write`` has done it."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError("no stream")
        return self.stream.fileno()  # for the terminal's width


class Log:
    """Lines to ``stream``; on a terminal also a bar in the last line, redrawn at most ten times a second.

    ``quiet`` leaves the lines of epochs out: for a run of many. A rank other than the first says nothing at all.
    """

    def __init__(
        self,
        epochs: int = 1,
        title: str = "",
        stream: TextIO | None = None,
        *,
        speak: bool = True,
        quiet: bool = False,
    ) -> None:
        self.stream: TextIO | None = sys.stdout if stream is None else stream
        self.speak, self.quiet = speak, quiet
        self.tty = self.stream is not None and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.epochs, self.title = epochs, title
        self._bar: Any = None

    def bar(self, epoch: int, batch: int, batches: int) -> bool:
        """Move the bar to ``batch`` of ``batches`` done in ``epoch``, counted from 0; never without a terminal.

        Returns whether it was time to draw it: then ``detail`` may say more.
        """
        if not (self.tty and self.speak):
            return False
        title = f"{self.title} epoch {epoch + 1}/{self.epochs}".strip()
        if self._bar is None:
            try:
                from tqdm import tqdm
            except ImportError:
                self.tty = False
                return False
            tqdm.monitor_interval = 0  # its thread would draw behind our back
            shape = "{desc} {bar:24} {n_fmt}/{total_fmt} steps{postfix}  ETA {remaining}"
            self._bar = tqdm(
                desc=title,
                total=self.epochs * batches,
                initial=epoch * batches + batch - 1,
                file=_Quiet(self.stream),
                bar_format=shape,
                dynamic_ncols=True,
                mininterval=0.1,
                leave=False,
                ascii=" #" if not _speaks_unicode(self.stream) else None,
            )
        self._bar.set_description_str(title, refresh=False)
        return bool(self._bar.update(epoch * batches + batch - self._bar.n))

    def detail(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """What the next drawing of the bar shows beside the time."""
        text = f"loss {loss:.3f}  acc {accuracy:.1f} %  {images_per_s:,.0f} img/s"
        self._bar.set_postfix_str(text, refresh=False)

    def line(self, text: str = "") -> None:
        """One line for good, in the bar's place."""
        if not self.speak:
            return
        self.close()
        console.write(self.stream, text + "\n")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def epoch(self, row: Row) -> None:
        """The line of a finished epoch."""
        if self.quiet:
            return
        ema = f"  averaged {row['ema_test_acc']:6.2f} %" if "ema_test_acc" in row else ""
        self.line(
            f"{self.title} epoch {row['epoch']:>{len(str(self.epochs))}.0f}/{self.epochs}  lr {row['lr']:.4f}  "
            f"train loss {row['train_loss']:.4f} acc {row['train_acc']:6.2f} %  "
            f"test loss {row['test_loss']:.4f} acc {row['test_acc']:6.2f} %{ema}  {row['images_per_s']:,.0f} img/s"
        )


def _speaks_unicode(stream: TextIO | None) -> bool:
    try:
        "█".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns that ``rows`` have."""
    return COLUMNS + tuple(name for name in OPTIONAL if rows and name in rows[0])


def metrics_csv(rows: Sequence[Row]) -> bytes:
    """All epochs as CSV. The file is replaced whole each epoch, so a resumed run can repeat no row."""
    text, names = io.StringIO(), columns(rows)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{row[key]:.6g}" for key in names})
    return text.getvalue().encode()


def metrics_jsonl(rows: Sequence[Row]) -> bytes:
    """All epochs as JSON lines, every digit."""
    return "".join(json.dumps({key: row[key] for key in columns(rows)}) + "\n" for row in rows).encode()


class TensorBoard:
    """Event files of the epochs in ``folder``; a resumed run goes on in a new one and hides what it repeats."""

    def __init__(self, folder: Path, done: int) -> None:
        self._writer = writer()(str(folder), purge_step=done + 1)

    def epoch(self, row: Row) -> None:
        """All columns of ``row`` at its epoch, on disk at once."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def writer() -> Any:
    """TensorBoard's SummaryWriter; raises ModuleNotFoundError with what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "--log-tensorboard: tensorboard is not installed: pip install 'fused_preact[tensorboard]'"
        ) from error
    return SummaryWriter
