"""The command line of ``python -m fused_preact.tune``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from .. import models
from ..kernels.triton import tables
from ..kernels.triton.choose import Problem, chosen
from ..kernels.triton.common import Device, device_of
from . import problems
from .loop import Tuner, name_of, trials_path
from .timing import CudaTimer

__all__ = ["main"]

UNFINISHED = 3
"""The exit status where the time was up."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_preact.tune",
        description="Measure which path and configuration serves each convolution of a network best on this GPU, "
        "and write it to the table that every later run reads.",
    )
    parser.add_argument("--model", default="preact_resnet50", choices=models.list_models("*preact*"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--dtype", default="bf16", choices=list(_DTYPES), help="fp32 tunes for PyTorch's TF32 switch"
    )
    parser.add_argument("--device", default="cuda", help='"cuda", "cuda:1", "xpu"; default: %(default)s')
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s; run again to go on")
    parser.add_argument("--candidates", type=int, default=12, help="configurations timed for one convolution")
    parser.add_argument("--output", type=Path, help="the table; default: the user's, which later runs read")
    parser.add_argument("--again", action="store_true", help="measure also what the table has")
    parser.add_argument(
        "--list", action="store_true", help="print each convolution's present choice and stop"
    )
    return parser


def _available(name: str) -> str | None:
    """Why nothing can be tuned on the device of that name, or None."""
    kind = torch.device(name).type
    if kind not in ("cuda", "xpu") or not torch.get_device_module(kind).is_available():
        return f"--device: got {name!r}, and there is no such GPU here; only a GPU can be tuned"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET: got '1', and times of the interpreter mean nothing; unset it"
    return None


def listing(found: list[Problem], device: Device) -> list[str]:
    """One line a problem: its key, what would run now and who says so."""
    lines = []
    for problem in found:
        choice = chosen(problem, device)
        how = choice.path if choice.config is None else name_of(choice.config)
        lines.append(f"{problem.key:48} {how:24} {choice.source}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Tune; exit status 1 where nothing right could be timed for a convolution, 2 for bad arguments, 3 where the time
    was up before all was tuned. A wrong configuration is reported and left out, which is no failure of the command.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    missing = None if args.list else _available(args.device)
    if missing:
        parser.error(missing)
    where = torch.device(args.device)
    device = device_of(torch.empty(0, device=where))
    found = problems.of_network(args.model, args.batch, _DTYPES[args.dtype], device)
    if args.list:
        print("\n".join(listing(found, device)))
        return 0
    table = args.output or tables.cache_path(device.name)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    tuner = Tuner(device, where, table, CudaTimer(where), args.candidates, say)
    say(
        f"{device.name}: {len(found)} convolutions of {args.model}, writing {table} and {trials_path(table).name}"
    )
    try:
        outcomes = tuner.run(found, args.minutes * 60, args.again)
    except ValueError as error:
        parser.error(f"{error}; move it away, or name another with --output")
    slower = [o.key for o in outcomes if o.slower]
    say(
        f"{len(outcomes)} tuned, {len(slower)} slower than eager PyTorch{': ' if slower else ''}{', '.join(slower)}"
    )
    if any(o.entry is None for o in outcomes):
        return 1
    return 0 if tuner.finished else UNFINISHED
