"""Write docs/performance.md, its figures and README's figures from the results files, and from nothing else.

``--check`` writes nothing and fails where what is committed differs from what the results say.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import figures, peers, results, tables
from .results import Row

START, END = "<!-- figures -->", "<!-- /figures -->"
HOW = """\
# Performance

Written by `python -m benchmarks report` from `benchmarks/results/*.csv`; edit neither by hand.

## How it is measured, and how to measure it yourself

```
pip install onnxruntime onnx onnxscript openvino       # peers of CPU inference; listed as missing otherwise
python -m benchmarks roofline                          # ceilings of the machine, floors of the networks
python -m benchmarks op && python -m benchmarks unit   # every site and unit of ResNet-164 and ResNet-50
python -m benchmarks step && python -m benchmarks infer
python -m benchmarks memory && python -m benchmarks overhead
python -m benchmarks report                            # this page
python -m benchmarks gpu --minutes 8                   # on a CUDA device: all of it, most valuable first
```

All candidates run in one process, in rounds: every round runs each of them once, in an order drawn anew, after a
warm-up. Times are medians over the rounds with the 20th and 80th percentile; a speed-up is the median of the ratio
*inside a round*, so that a machine which slows down slows all of them. On a GPU the times are CUDA events. Single
sites and units run on inputs rotated past the last-level cache. Threads are fixed; float32 is float32 (no TF32).
In bf16 and fp16 a training step runs under autocast with float32 weights, everything else in the dtype itself.

Before anything is timed it is compared with the plain network in float64: ours may err twice as much as eager PyTorch
in the same dtype, a peer eight times. What is wrong is REFUSED and has no speed; what fails is listed with its error.

- **bare convolutions**: the library's convolutions alone, without BN, ReLU, addition: the floor without fusion.
- **fused**: this library, inside a network: statistics come with the input and are made for the next reader.
  **fused alone**: a single module, which reads its input once more for them.
- **of its floor**: the least time that the candidate's own schedule could take at the measured copy bandwidth and
  GEMM rate, as a share of the measured time. Tensors that stay in the cache can pass 100 %.
"""


def page(rows: list[Row], folder: str = "figures") -> str:
    """The whole of docs/performance.md."""
    rows = [r for r in results.latest(rows) if r.phase != "check"]
    by = {c: [r for r in rows if r.command == c] for c in ("step", "infer", "unit", "op", "memory")}
    lines = [HOW]
    if not rows:
        lines.append("No results are committed yet.")
    drawn = figures.names(rows)

    def section(title: str, prefix: tuple[str, ...], body: list[str]) -> None:
        if body:
            lines.extend([f"## {title}", ""])
            lines.extend(f"![{name}]({folder}/{name})\n" for name in drawn if name.startswith(prefix))
            lines.extend(body)

    timed = [r for r in by["step"] if not r.phase.startswith(("kind:", "peak"))]
    section("Training step", ("kinds-",), tables.networks(timed, "both"))
    peaks = [r for r in by["step"] if r.phase == "peak"]
    section("Peak memory of the same steps (allocator)", ("none",), tables.memory(peaks) if peaks else [])
    section("Inference", ("none",), tables.networks(by["infer"], "forward"))
    section("Residual units", ("unit-",), tables.cases(by["unit"]))
    section("BN → ReLU → convolution sites", ("op-", "roofline-"), tables.cases(by["op"]))
    section("Memory", ("memory-",), tables.memory(by["memory"]))
    section("Host overhead", ("none",), tables.overhead([r for r in rows if r.command == "overhead"]))
    reasons = [f"- {name}: {reason}." for name, reason in peers.NOT_COMPARED.items()]
    section("Not compared", ("none",), reasons)
    section("Roofline", ("none",), tables.roofline([r for r in rows if r.command == "roofline"]))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def readme(text: str, rows: list[Row]) -> str:
    """README with the block between its markers replaced; unchanged where it has no markers."""
    block = "\n".join([START, "", *tables.summary(results.latest(rows)), "", END])
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: block, text)


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks report``; with --check exit status 1 where the committed pages have drifted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--root", type=Path, default=results.ROOT, help="where docs/ and README.md are")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    args = parser.parse_args(argv)
    rows = results.load_all(args.results)
    docs, front = args.root / "docs", args.root / "README.md"
    wanted = {docs / "performance.md": page(rows)}
    if front.exists():
        wanted[front] = readme(front.read_text(), rows)
    pictures = [docs / "figures" / name for name in figures.names(results.latest(rows))]
    if args.check:
        drifted = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
        drifted += [p for p in pictures if not p.exists()]
        for path in drifted:
            print(f"{path}: differs from the results; run python -m benchmarks report")
        return int(bool(drifted))
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path}")
    for path in figures.draw(results.latest(rows), docs / "figures"):
        print(f"wrote {path}")
    return 0
