"""The command line that the commands share, and the run that it sets up."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fused_preact

from . import allocator, measure, results
from .results import Row

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PACKAGES = ("triton", "onnxruntime", "openvino", "nvidia-cudnn-frontend")
BUSY = 0.15
"""The share of the machine that others may use before a run warns."""
MODELS = ("cifar_preact_resnet164", "preact_resnet50")


@dataclass
class Setting:
    """One run of one command: what was asked for, and how its rows are kept."""

    command: str
    models: list[str]
    batch: int | None
    dtype: str
    device: str
    peers: list[str] | None
    minutes: float
    threads: int
    backend: str = "auto"
    json: bool = False
    save: bool = True
    folder: Path = results.FOLDER
    limit: int = 0
    slow: float = 10
    extra: argparse.Namespace = field(default_factory=argparse.Namespace)
    started: float = field(default_factory=time.monotonic)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations and weights."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device measured on."""
        return torch.device(self.device)

    def batch_for(self, model: str) -> int:
        """The batch asked for, else one that suits the network and the device."""
        if self.batch:
            return self.batch
        if self.device == "cuda":
            return 128 if model.startswith("cifar") else 256
        return 64 if model.startswith("cifar") else 16

    def share(self, done: int, total: int) -> float:
        """Seconds for the next of ``total`` cases, of which ``done`` are behind us."""
        left = self.minutes * 60 - (time.monotonic() - self.started)
        return max(0.0, left / max(total - done, 1))

    def wants(self, peer: str) -> bool:
        """Whether a candidate was asked for; without --peers all are."""
        return self.peers is None or any(peer.startswith(name) for name in self.peers)

    def row(self, model: str, batch: int, **columns: str) -> Row:
        """A row with the columns that the setting knows."""
        return Row(
            command=self.command,
            model=model,
            batch=str(batch) if batch else "",
            dtype=self.dtype,
            **columns,
        )

    def say(self, text: str) -> None:
        """Progress; on the error stream where the rows go out as JSON."""
        print(text, file=sys.stderr if self.json else sys.stdout, flush=True)

    def finish(self, rows: Iterable[Row], save: bool | None = None) -> list[Row]:
        """Stamp, print and keep rows."""
        stamped = results.stamp(rows, self.device, self.threads, PACKAGES)
        if self.json:
            print(results.to_json(stamped), flush=True)
        else:
            for row in stamped:
                print(line(row), flush=True)
        self.warn(max((float(row.others) for row in stamped if row.others), default=None))
        if self.save if save is None else save:
            results.append(self.folder / f"{self.command}.csv", stamped)
        return stamped

    def announce(self) -> None:
        """What is measured on what; threads are part of every CPU figure."""
        others = measure.Others()
        self.say(
            f"{self.command}: {self.dtype} on {self.device} ({results.hardware(self.device)}), "
            f"{self.threads} threads, allocator {allocator.name()}, {results.versions(PACKAGES)}, "
            f"commit {results.commit()}"
        )
        time.sleep(0.1)
        self.warn(others.cores())

    def warn(self, others: float | None) -> None:
        """Say so where other processes use the machine: ``others`` of its cores (:class:`.measure.Others`)."""
        if others is not None and others > BUSY * (os.cpu_count() or 1):
            self.say(
                f"WARNING: other processes keep {others:.1f} of {os.cpu_count()} cores busy: expect noise"
            )


def line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row.model:24.24} {row.case:34.34} {row.candidate:22.22} {row.phase:8}"
    if row.status != "ok":
        return f"{head} {row.status}"
    parts = ["right"] if row.phase == "check" else []
    if row.p50:
        parts.append(f"{float(row.p50):10.3f} ms [{float(row.p20):.3f}, {float(row.p80):.3f}] n={row.rounds}")
    if row.speedup_p50:
        low, middle, high = (float(v) for v in (row.speedup_p20, row.speedup_p50, row.speedup_p80))
        loss = " (loss)" if middle < 1 else ""
        parts.append(f"{middle:5.2f}x [{low:.2f}, {high:.2f}]{loss}")
    if row.floor_ms:
        share = f" = {100 * float(row.floor_ms) / float(row.p50):.0f} % of its floor" if row.p50 else ""
        parts.append(f"floor {float(row.floor_ms):.3f} ms{share}")
    if row.bytes and not row.p50:
        parts.append(f"{float(row.bytes) / 1e9:.3f} GB")
    if row.flops and not row.p50:
        parts.append(f"{float(row.flops) / 1e9:.1f} GFLOP")
    if row.value:
        parts.append(f"{float(row.value):.5g} {row.unit}")
    if row.backend:
        parts.append(f"by {row.backend}")
    if row.note:
        parts.append(f"({row.note})")
    return f"{head} {'  '.join(parts)}"


def parser(
    command: str,
    doc: str | None,
    *,
    batch: int | None = None,
    models: Iterable[str] = MODELS,
    minutes: float = 10,
) -> argparse.ArgumentParser:
    """A parser with the shared options; the defaults are the command's own."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=command)
    made.add_argument(
        "--model", nargs="+", default=list(models), choices=fused_preact.models.list_models("*preact*")
    )
    made.add_argument("--batch", type=int, default=batch, help="default: by network and device")
    made.add_argument(
        "--dtype", default=None, choices=list(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU"
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", default=default_device, choices=["cpu", "cuda"])
    made.add_argument("--peers", nargs="+", help="candidates by the start of their names; default: all")
    made.add_argument(
        "--minutes", type=float, default=minutes, help=f"time for measuring (default {minutes:g})"
    )
    made.add_argument("--threads", type=int, help="PyTorch threads; default: all cores of this process")
    made.add_argument("--backend", default="auto", choices=fused_preact.ops.BACKENDS, help="of our own rows")
    made.add_argument("--limit", type=int, default=0, help="at most this many cases of each network")
    made.add_argument(
        "--slow", type=float, default=10, help="seconds a call above which a candidate gets few rounds"
    )
    made.add_argument(
        "--allocator",
        default=allocator.KEPT,
        choices=[allocator.KEPT, allocator.DEFAULT],
        help="kept: freed memory stays with the process, eager at its best; default: the system's own setting",
    )
    made.add_argument("--json", action="store_true", help="rows as JSON on the output")
    made.add_argument("--no-save", action="store_true", help="do not append to the results")
    made.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the results files")
    return made


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, quiet: bool = False) -> Setting:
    """Parse, pin the threads, fix the seed and say what runs."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    setting = Setting(
        args.command,
        args.model,
        args.batch,
        args.dtype or ("bf16" if args.device == "cuda" else "fp32"),
        args.device,
        args.peers,
        args.minutes,
        measure.pin_threads(args.threads),
        args.backend,
        args.json,
        not args.no_save,
        args.results,
        args.limit,
        args.slow,
        args,
    )
    torch.manual_seed(0)
    # float32 means float32: TF32 would give the library's convolutions another precision than they are checked at.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # eager at its best: cuDNN tries its algorithms on the first call
    if not quiet:
        setting.announce()
    return setting
