"""Write docs/performance.md, its figures and README's figures from the results files, and from nothing else.

``--check`` writes nothing and fails where what is committed differs from what the results say.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import allocator, figures, measure, peers, results, tables
from .results import Row

START, END = "<!-- figures -->", "<!-- /figures -->"
HOW = """\
# Performance

Written by `python -m benchmarks report` from `benchmarks/results/*.csv`; edit neither by hand.

## How it is measured, and how to measure it yourself

On a fresh machine, in a clone of this repository, nothing else at work:

```
make tables                            # installs into .venv, measures every CPU table below, writes this page
make bench ARGS="gpu --minutes 8"      # on a CUDA device: all of it, most valuable first
```

`make tables` takes about 35 minutes on two cores, and goes on where it was interrupted when it is run again. It is
`pip install -e '.[peers]'` (ONNX Runtime and OpenVINO; listed as missing otherwise) and `python -m benchmarks cpu`,
which runs these one after the other, each in its own process; `--help` says what they take:

```
python -m benchmarks roofline          # ceilings of the machine, floors of the networks
python -m benchmarks step              # training steps of ResNet-164 and ResNet-50, --dtype bf16 for the others
python -m benchmarks infer
python -m benchmarks op                # every BN -> ReLU -> convolution site; unit: every residual unit
python -m benchmarks memory            # ResNet-50, 200, 164 and 1001
python -m benchmarks overhead
python -m benchmarks report            # this page and README's figures from benchmarks/results/*.csv
```

Two more commands look at changes:

- `python -m benchmarks compare A B` lists regressions beyond noise between two results files (or folders), or builds
  two commits and measures them in turns: `python -m benchmarks compare main HEAD --turns 3 --bench "op --peers fused
  --limit 4 --minutes 1"`. It fails where one of our own rows is slower or broken.
- `python -m pytest benchmarks --benchmark-only` is a small set under pytest-benchmark, with its
  `--benchmark-autosave` and `--benchmark-compare`.

**Expect the ratios, not the milliseconds**: clocks differ. Where a row was measured several times by the same code,
*over runs* gives the least and the greatest median of those runs, each a process of its own. A machine where others
work (*others' load*, in cores, which the commands also warn of) gives other ratios.

**The memory allocator is part of the method.** By default glibc maps and unmaps every large tensor at each use, and
eager PyTorch pays for the kernel's zeroing of the pages: how much depends on the machine's state, and ratios do not
repeat (*Page faults of a step* has the figures). So every candidate, ours too, runs with freed memory kept and huge
pages advised (*allocator kept*), which is eager at its best and what the headlines rest on:

    GLIBC_TUNABLES=@TUNABLES@

Users who set nothing get the system's default. The tables that say so (`--allocator default`) are theirs, and kinder
to us. A setting of your own is respected and recorded.

All candidates run in one process, in rounds: every round runs each of them once, in an order drawn anew, after a
warm-up and an untimed round. Times are medians over the rounds with the 20th and 80th percentile; a speed-up is the
median of the ratio *inside a round*, so that a machine which slows down slows all of them. On a GPU the times are
CUDA events. Single sites and units run on inputs rotated past the last-level cache. Threads are fixed; float32 is
float32 (no TF32). In bf16 and fp16 a training step runs under autocast with float32 weights, everything else in the
dtype itself. A candidate that takes over ten seconds a call stops after two rounds and says so.

Before anything is timed it is compared with the plain network in float64: ours may err twice as much as eager PyTorch
in the same dtype, a peer eight times. What is wrong is REFUSED and has no speed; what fails is listed with its error.

- **bare convolutions**: the library's convolutions alone, without BN, ReLU, addition: the floor without fusion.
- **fused**: this library, inside a network: statistics come with the input and are made for the next reader.
  **fused alone**: a single module, which reads its input once more for them.
- **–**: not measured. Compiling takes its time, so the compiler runs on the sites and units that count most.
- **of its floor**: the least time that the candidate's own schedule could take at the measured copy bandwidth and
  GEMM rate, as a share of the measured time. Tensors that stay in the cache can pass 100 %.
"""


def page(rows: list[Row], folder: str = "figures") -> str:
    """The whole of docs/performance.md."""
    repeats = results.repeats(rows)
    rows = [r for r in results.latest(rows) if r.phase != "check"]
    # Steps are shown under both settings of the allocator, everything else under the fair one.
    steps = [r for r in rows if r.command == "step" and r.phase in measure.PHASES]
    zeroed = [r for r in rows if r.phase in ("faults", "kernel time")]
    rows = results.fair(rows)
    by = {c: [r for r in rows if r.command == c] for c in ("step", "infer", "unit", "op", "memory")}
    lines = [HOW.replace("@TUNABLES@", allocator.TUNABLES)]
    if not rows:
        lines.append("No results are committed yet.")
    drawn = figures.names(rows)

    def section(title: str, prefix: tuple[str, ...], body: list[str]) -> None:
        if body:
            lines.extend([f"## {title}", ""])
            lines.extend(f"![{name}]({folder}/{name})\n" for name in drawn if name.startswith(prefix))
            lines.extend(body)

    section("Training step", ("kinds-",), tables.networks(steps, "both", repeats) + tables.faults(zeroed))
    peaks = [r for r in by["step"] if r.phase == "peak"]
    section("Peak memory of the same steps (allocator)", ("none",), tables.memory(peaks) if peaks else [])
    section("Inference", ("none",), tables.networks(by["infer"], "forward", repeats))
    section("Residual units", ("unit-",), tables.cases(by["unit"], repeats))
    section("BN → ReLU → convolution sites", ("op-", "roofline-"), tables.cases(by["op"], repeats))
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
    shown = results.fair(results.latest(rows))
    pictures = [docs / "figures" / name for name in figures.names(shown)]
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
    for path in figures.draw(shown, docs / "figures"):
        print(f"wrote {path}")
    return 0
