"""What a run shows while it goes on: a progress bar or plain lines, and metrics.csv."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

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


class Log:
    """Lines to ``stream``; on a terminal also a bar in the last line, redrawn at most ten times a second."""

    def __init__(self, epochs: int = 1, title: str = "", stream: TextIO | None = None) -> None:
        self.stream: TextIO | None = sys.stdout if stream is None else stream
        self.tty = self.stream is not None and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.epochs, self.title = epochs, title
        self._drawn = self._last = 0.0
        self._begin: tuple[float, float] | None = None  # (time, epochs done) of the first bar, for the ETA

    def due(self) -> bool:
        """Whether a bar should be drawn now; never without a terminal."""
        return self.tty and time.perf_counter() - self._last > 0.1

    def bar(
        self, epoch: int, batch: int, batches: int, loss: float, accuracy: float, images_per_s: float
    ) -> None:
        """Redraw the bar: ``epoch`` counts from 0, ``batch`` of ``batches`` is done."""
        now, done = time.perf_counter(), epoch + batch / batches
        self._begin = self._begin or (now, done)
        speed = (done - self._begin[1]) / max(now - self._begin[0], 1e-9)
        eta = _clock((self.epochs - done) / speed) if speed > 0 else "--:--"
        text = (
            f" {self.title} epoch {epoch + 1}/{self.epochs}  batch {batch}/{batches}  loss {loss:.3f}  "
            f"acc {accuracy:.1f} %  {images_per_s:,.0f} img/s  ETA {eta}"
        )
        columns = shutil.get_terminal_size().columns - 1
        width = max(0, min(24, columns - len(text) - 2))
        filled = round(width * done / self.epochs)
        bar = f"[{'#' * filled}{'.' * (width - filled)}]" if width > 4 else ""
        console.write(self.stream, "\r" + (bar + text)[:columns].ljust(columns))
        self._last, self._drawn = now, columns

    def line(self, text: str = "") -> None:
        """One line for good, above the bar."""
        if self._drawn:
            text = "\r" + " " * int(self._drawn) + "\r" + text
            self._drawn = 0.0
        console.write(self.stream, text + "\n")

    def epoch(self, row: Row) -> None:
        """The line of a finished epoch."""
        self.line(
            f"{self.title} epoch {row['epoch']:>{len(str(self.epochs))}.0f}/{self.epochs}  lr {row['lr']:.4f}  "
            f"train loss {row['train_loss']:.4f} acc {row['train_acc']:6.2f} %  "
            f"test loss {row['test_loss']:.4f} acc {row['test_acc']:6.2f} %  {row['images_per_s']:,.0f} img/s"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def metrics_csv(rows: Sequence[Row]) -> bytes:
    """All epochs as CSV. The file is replaced whole each epoch, so a resumed run can repeat no row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{row[key]:.6g}" for key in COLUMNS})
    return text.getvalue().encode()
