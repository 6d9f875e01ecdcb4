"""Every CPU table of docs/performance.md in one command, about 35 minutes on two cores, then the page itself.

Run it again and it goes on with the stages that this commit has not finished on this hardware. Steps run several
times, in processes of their own: the page then says how far the medians of separate runs lie apart.
"""

from __future__ import annotations

from . import options, report
from . import stages as running
from .stages import Stage

IMAGENET, CIFAR, SMALL = "preact_resnet50", "cifar_preact_resnet164", "cifar_preact_resnet20"


def _stage(name: str, minutes: float, *arguments: str) -> Stage:
    """``minutes``: for measuring; a quarter of one more goes into the start and the extras, a whole one may."""
    return Stage(name, 60 * minutes + 60, (*arguments, "--minutes", f"{minutes:g}"))


def stages() -> list[Stage]:
    """In the order of the page's needs: first what the headlines rest on."""

    def step(name: str, model: str, minutes: float, *arguments: str) -> Stage:
        return _stage(f"step {name}", minutes, "step", "--model", model, *arguments)

    ours = "--peers", "fused"
    both = "--model", CIFAR, IMAGENET
    found = [_stage(f"roofline {dtype}", 0.1, "roofline", "--dtype", dtype) for dtype in ("fp32", "bf16")]
    # The last run of each is the one with all peers: tables show a candidate's latest run.
    found += [
        step("50 fp32, first run", IMAGENET, 0.7, *ours),
        step("164 fp32, first run", CIFAR, 0.4, *ours),
        step("50 fp32, second run", IMAGENET, 0.7, *ours),
        step("50 fp32", IMAGENET, 2.5, "--dtype", "fp32"),
        step("164 fp32", CIFAR, 3.2, "--dtype", "fp32"),
        step("50 bf16", IMAGENET, 0.8, *ours, "--dtype", "bf16"),
        step("164 bf16", CIFAR, 0.4, *ours, "--dtype", "bf16"),
        step("50 fp32, default allocator", IMAGENET, 0.8, *ours, "--allocator", "default"),
        step("164 fp32, default allocator", CIFAR, 0.4, *ours, "--allocator", "default"),
        _stage("infer 164 fp32", 1.8, "infer", "--model", CIFAR),
        _stage("infer 50 fp32", 1.9, "infer", "--model", IMAGENET),
        _stage("infer 164 bf16", 1.8, "infer", "--model", CIFAR, "--dtype", "bf16"),
        _stage("infer 50 bf16", 1.9, "infer", "--model", IMAGENET, "--dtype", "bf16"),
        _stage("op fp32", 1.5, "op", *both, "--peers", "fused", "eager"),
        _stage("op bf16", 1.5, "op", *both, *ours, "--dtype", "bf16"),
        _stage("unit fp32", 1, "unit", *both, "--peers", "fused", "eager"),
        _stage("unit bf16", 1, "unit", *both, *ours, "--dtype", "bf16"),
        _stage("memory", 2.5, "memory", "--peers", "eager"),
        _stage("overhead", 0.4, "overhead"),
        # Compiling a site takes ten seconds, a unit twice that: those that count most.
        _stage("op compile", 1.6, "op", *both, "--peers", "fused", "compile", "--limit", "5"),
        _stage("unit compile", 2, "unit", *both, "--peers", "fused", "compile", "--limit", "3"),
    ]
    return found


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks cpu``; exit status 1 where a stage failed, 0 also where the time ran out."""
    parser = options.parser("cpu", __doc__, models=(), minutes=35)
    parser.set_defaults(device="cpu")
    running.add_options(parser)
    parser.add_argument(
        "--no-report", action="store_true", help="leave docs/performance.md and README as they are"
    )
    setting = options.parse(parser, argv)
    status = running.run(running.chosen(stages(), setting), setting)
    if not setting.extra.no_report:
        report.main(["--results", str(setting.folder)])
    return status
