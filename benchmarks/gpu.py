"""Everything that needs a GPU, in one command: the most valuable figures first, each kept as soon as it is there.

Run the command again and it goes on with the stages that this commit has not finished on this hardware, and the tuner
with the convolutions that its table does not have. Tables and every trial with its prediction go to the folder
``tuned`` of the results; the stages after the tuning read them.
"""

from __future__ import annotations

import importlib
import json

from . import options
from . import stages as running
from .options import Setting
from .stages import Stage

IMAGENET, CIFAR, SMALL = "preact_resnet50", "cifar_preact_resnet164", "cifar_preact_resnet20"


def stages() -> list[Stage]:
    """In order of value; the seconds are for an H100 with 16 cores and add up to about 8 minutes."""

    def check(model: str, dtype: str, seconds: float) -> Stage:
        # 16 images: a multiple of 16 as the real batch is, so that the same specialisation of the kernels is checked.
        arguments = ("op", "--check", "16", "--model", model, "--dtype", dtype, "--peers", "fused")
        return Stage(f"correct {model} {dtype}", seconds, arguments, parallel=8)

    def step(name: str, model: str, seconds: float, *peers: str) -> Stage:
        arguments = ("step", "--model", model, "--peers", "fused", *peers)
        return Stage(name, seconds, (*arguments, "--minutes", f"{seconds / 120:.2f}"))

    def tune(name: str, model: str, batch: int, seconds: float) -> Stage:
        # The process starts and compiles before it measures; it stops by itself. About 800 kernels at 8 candidates.
        arguments = ("--model", model, "--batch", str(batch), "--dtype", "bf16", "--candidates", "8")
        minutes = f"{seconds / 80:.2f}"
        return Stage(name, seconds, (*arguments, "--minutes", minutes), module="fused_preact.tune")

    return [
        check(IMAGENET, "bf16", 75),
        step("step 50", IMAGENET, 40, "bare"),
        tune("tune 50", IMAGENET, 256, 120),
        step("step 50 compile", IMAGENET, 110, "compile"),
        Stage("op 50", 60, ("op", "--model", IMAGENET, "--peers", "fused", "--minutes", "0.5")),
        Stage("infer 50", 60, ("infer", "--model", IMAGENET, "--minutes", "0.3")),
        check(CIFAR, "bf16", 60),
        tune("tune 164", CIFAR, 128, 75),
        step("step 164", CIFAR, 60, "bare", "eager graph"),
        check(IMAGENET, "fp32", 60),
        check(CIFAR, "fp32", 60),
        Stage("op 164", 60, ("op", "--model", CIFAR, "--peers", "fused", "--minutes", "0.5")),
        Stage("overhead", 30, ("overhead", "--peers", "fused", "--minutes", "0.2")),
        Stage("memory 50", 60, ("memory", "--model", IMAGENET, "--peers", "eager", "--budget", "80")),
        step("step 164 compile", CIFAR, 240, "compile"),
        step("step 50 max-autotune", IMAGENET, 300, "compile", "max-autotune"),
    ]


def quick(stage: Stage) -> Stage:
    """The same stage at a size that a CPU runs in seconds, without compilers."""
    if stage.module != "benchmarks":
        return stage._replace(arguments=("--model", SMALL, "--batch", "2", "--list"))
    arguments = [
        SMALL if a in (IMAGENET, CIFAR) else a for a in stage.arguments if a not in ("compile", "16")
    ]
    if "--check" in arguments:
        arguments.insert(arguments.index("--check") + 1, "2")
    if stage.arguments[0] != "overhead":
        arguments += ["--batch", "2"]
    if stage.arguments[0] == "infer":
        arguments += ["--peers", "fused"]
    if stage.arguments[0] == "op":
        arguments += ["--limit", "2"]
    return Stage(stage.name, 120, (*arguments, "--minutes", "0.01"), min(stage.parallel, 2))


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks gpu``; exit status 1 where a stage failed, 0 also where the time ran out."""
    parser = options.parser("gpu", __doc__, models=(), minutes=8)
    parser.set_defaults(device="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows on a CPU that the command works"
    )
    running.add_options(parser)
    setting = options.parse(parser, argv)
    wanted = running.chosen(stages(), setting)
    if setting.extra.quick:
        wanted = [quick(stage) for stage in wanted]
    status = running.run(wanted, setting)
    _compare_predictions(setting)
    setting.say("python -m benchmarks report writes docs/performance.md from these results")
    return status


def _compare_predictions(setting: Setting) -> None:
    """How well the cost model ordered what the tuner timed."""
    for path in sorted(running.tables(setting).glob("*.trials.jsonl")):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        # Imported here: it needs Triton, and only a tuned GPU has trials.
        lines = importlib.import_module(f"{__package__}.cost").agreement(found)
        setting.say("\n".join([f"predicted and measured, {path.name}:", *lines]))
