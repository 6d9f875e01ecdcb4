"""Training steps of whole networks: forward and loss, backward, SGD with momentum.

"forward" is the network and its loss, "backward" the rest of the step, optimiser included. In bf16 and fp16 the
weights are float32 under autocast. Every candidate's logits in training mode and our gradients, unit by unit, are
checked first.
"""

from __future__ import annotations

from . import nets, options


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks step``; exit status 1 where a result was wrong."""
    setting = options.parse(options.parser("step", __doc__), argv)
    return nets.run(nets.Training, setting, profile=True)
