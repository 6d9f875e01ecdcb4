"""Inference of whole networks in eval mode, weights in the dtype measured; logits are checked first."""

from __future__ import annotations

from . import nets, options


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks infer``; exit status 1 where a result was wrong."""
    setting = options.parse(options.parser("infer", __doc__), argv)
    return nets.run(nets.Inference, setting, profile=False)
