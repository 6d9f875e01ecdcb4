"""``python -m benchmarks COMMAND``."""

from __future__ import annotations

import importlib
import sys

from . import allocator

COMMANDS = {
    "op": "every BN -> ReLU -> convolution site of a network, forward and backward",
    "unit": "every residual unit of a network, forward and backward",
    "step": "training steps of whole networks",
    "infer": "inference of whole networks",
    "memory": "saved activations, peak memory, largest batch",
    "roofline": "counted bytes and FLOPs, measured ceilings, floors",
    "overhead": "host time per site and unit on a near-empty tensor",
    "report": "write docs/performance.md, its figures and README's block from the results",
    "compare": "regressions beyond noise between two results files or two commits",
    "cpu": "every CPU table of docs/performance.md in one command, resumable",
    "compile": "cross-compile the Triton kernels and read what came out",
    "cost": "the cost model's ranking of launch configurations, beside what was measured",
    "gpu": "everything that needs a GPU, most valuable first, resumable",
}

TIMED = ("op", "unit", "step", "infer", "roofline", "overhead")
"""The commands whose figures depend on how the C library hands out memory."""


def main(argv: list[str] | None = None) -> int:
    """Run the command named first with the arguments after it."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND ... (COMMAND --help says more)", file=sys.stderr)
        for name, does in COMMANDS.items():
            print(f"  {name:10} {does}", file=sys.stderr)
        if arguments and arguments[0] not in ("-h", "--help"):
            print(f"COMMAND: got {arguments[0]!r}, allowed are {', '.join(COMMANDS)}", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    # Imported by name: most commands need none of what the others import.
    module = importlib.import_module(f"{__package__}.{arguments[0]}")
    return module.main(arguments[1:])


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in TIMED:
        allocator.start_again()  # before torch is imported: the C library reads its setting once
    sys.exit(main())
