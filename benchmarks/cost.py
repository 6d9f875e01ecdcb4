"""The cost model's ranking of launch configurations, over cross-compiled code, and how it compares with measurement.

    python -m benchmarks cost --target sm_90 --markdown docs/cost-model.md
    python -m benchmarks cost --trials TABLE.trials.jsonl

The first ranks, for the convolutions of a network's training step that cost most, the configurations that the tuner
would look at first and the heuristic's own, with the registers and instructions of their compiled code; no GPU is
involved. The second reads what ``python -m fused_preact.tune`` timed and says how well the predictions order it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_preact.kernels.triton.choose import Problem, own_config
from fused_preact.kernels.triton.common import Device
from fused_preact.kernels.triton.configs import ConvConfig
from fused_preact.kernels.triton.cost import Prediction, candidates, predict
from fused_preact.kernels.triton.crosscompile import Resources, compile_source, source_of
from fused_preact.tune import problems
from fused_preact.tune.compiling import conv_launch
from fused_preact.tune.loop import name_of

from . import results
from .compile import NETWORKS, TARGETS


class Line(NamedTuple):
    """One configuration of one problem."""

    problem: Problem
    config: ConvConfig
    heuristic: bool
    resources: Resources | None
    """None where the compiler failed."""
    prediction: Prediction | None


def rank(model: str, target: str, most: int, configurations: int, workers: int) -> list[Line]:
    """The ``most`` costliest problems of a network in bf16, each with its first configurations, best first."""
    device = Device(*TARGETS[target][0])
    batch = NETWORKS[model][0]
    found = [p for p in problems.of_network(model, batch, torch.bfloat16, device) if p.op != "apply"][:most]
    pairs = []
    for problem in found:
        own = own_config(problem, device)
        first = candidates(problem, device)[:configurations]
        pairs += [
            (problem, config, config == own) for config in [*first, *([own] if own not in first else [])]
        ]
    with ProcessPoolExecutor(workers) as pool:
        futures = [
            pool.submit(compile_source, source_of(conv_launch(p, c, device)), device.backend, device.arch)
            for p, c, _ in pairs
        ]
        lines = []
        for (problem, config, own), future in zip(pairs, futures, strict=True):
            try:
                resources = future.result()
            except Exception:  # the compiler's own: a row without figures
                lines.append(Line(problem, config, own, None, None))
                continue
            lines.append(Line(problem, config, own, resources, predict(problem, config, device, resources)))
    order = {problem.key: index for index, problem in enumerate(found)}
    lines.sort(key=lambda i: (order[i.problem.key], i.prediction.us if i.prediction else float("inf")))
    return lines


def _cells(line: Line) -> list[str]:
    own = " (heuristic)" if line.heuristic else ""
    head = [line.problem.key, name_of(line.config) + own]
    if line.resources is None or line.prediction is None:
        return [*head, "does not compile", *[""] * 7]
    r, p = line.resources, line.prediction
    return [
        *head,
        f"{p.us:.0f}",
        p.bound,
        str(p.programs),
        str(r.registers),
        str(r.spills),
        f"{r.shared / 1024:.0f}",
        f"{r.tensor_core} {r.instruction}",
        f"{r.async_copies}, {r.wide_loads}",
    ]


COLUMNS = (
    "convolution",
    "configuration",
    "predicted us",
    "bound by",
    "programs per multiprocessor",
    "registers",
    "spills",
    "shared KiB",
    "tensor-core instructions",
    "async copies, 16-byte loads",
)


def markdown(lines: Sequence[Line], model: str, target: str) -> str:
    """The page docs/cost-model.md."""
    head = f"""# Cost model

Written by `python -m benchmarks cost --target {target} --markdown docs/cost-model.md`. **Predicted, not measured**:
the model of `kernels/triton/cost.py` over code cross-compiled for {target}, for the convolutions that cost most in a
training step of {model} (bf16, batch {NETWORKS[model][0]}). The tuner times configurations in this order; it skips
those that spill. The constants are data sheets' and assumed latencies, so only the order within one convolution
means anything, and that too has not been compared with a GPU yet: `python -m benchmarks gpu` records predictions
beside times, and `python -m benchmarks cost --trials FILE` says how well they agree.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""
    return head + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines)


# --- beside measurements ----------------------------------------------------------------------------------


def agreement(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Per problem: rank correlation of prediction and time, and what choosing by the model would have cost."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        if trial["ms"] is not None and trial["predicted_us"] is not None:
            grouped[trial["key"]].append(trial)
    lines, losses, ranks = [], [], []
    for key, found in grouped.items():
        best = min(t["ms"] for t in found)
        loss = min(found, key=lambda t: t["predicted_us"])["ms"] / best
        own = [t["ms"] / best for t in found if t["heuristic"]]
        rank = correlation([t["predicted_us"] for t in found], [t["ms"] for t in found])
        losses.append(loss)
        ranks += [] if rank is None else [rank]
        parts = [f"{len(found)} timed", f"the model's first takes {loss:.2f} of the best"]
        parts += [f"the heuristic's {own[-1]:.2f}"] if own else []
        parts += [f"rank correlation {rank:.2f}"] if rank is not None else []
        lines.append(f"{key}: {', '.join(parts)}")
    if losses:
        middle = f", median rank correlation {statistics.median(ranks):.2f}" if ranks else ""
        lines.append(
            f"all: the model's first takes {statistics.median(losses):.2f} of the best (median){middle}"
        )
    return lines


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where it is not defined."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]

    return statistics.correlation(ranks(a), ranks(b))


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks cost``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="preact_resnet50", choices=list(NETWORKS))
    parser.add_argument("--target", default="sm_90", choices=list(TARGETS))
    parser.add_argument("--problems", type=int, default=18, help="convolutions, the costliest first")
    parser.add_argument("--configurations", type=int, default=4, help="of each, beside the heuristic's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--markdown", type=Path, help="write the table here (docs/cost-model.md)")
    parser.add_argument("--trials", type=Path, help="compare predictions with what the tuner timed, and stop")
    args = parser.parse_args(argv)
    if args.trials:
        lines = args.trials.read_text().splitlines()
        print("\n".join(agreement([json.loads(line) for line in lines])) or "nothing timed")
        return 0
    ranked = rank(args.model, args.target, args.problems, args.configurations, args.workers)
    for line in ranked:
        print("  ".join(_cells(line)), flush=True)
    if args.markdown:
        results.replace(args.markdown, markdown(ranked, args.model, args.target))
    return 0
