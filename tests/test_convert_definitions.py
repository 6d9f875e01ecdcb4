"""``fuse`` on every definition of a third-party structure: the numbers of the plain model, and which sites run fused."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter

import pytest
import torch
from convert_helpers import Ran, assert_same_step, pair, seeded, watching
from definitions import DEFINITIONS, Definition
from definitions_oracle import record
from helpers import COMPILED, assert_within_policy
from torch import Tensor, nn

from fused_preact.convert import fuse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*found nothing to fuse")]

EACH = pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
RESIDUAL = pytest.mark.parametrize("name", [name for name, d in DEFINITIONS.items() if d.residual])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

POOL = "a pool (or a blur) reads the activation too, so it is stored"
NORM = "another norm reads the activation too, so it is stored"
BARE = "no ReLU between norm and convolution"
OPAQUE = "in a unit that cannot be traced: it draws in Python, or its control flow depends on the data"
V1 = "the block's sum reads the activation, and two convolutions or a second sum"

# The convolutions of sites that run as they were written.
UNFUSED: dict[str, dict[str, str]] = {
}
# Additions that the oracle counts and no fused call makes, and heads.
ADDITIONS: dict[str, tuple[int, str]] = {
}
HEADS: dict[str, tuple[int, str]] = {
    "dual_path": (1, "the head's norm asks whether it is given a tuple, which tracing cannot answer"),
}


def make(definition: Definition, training: bool, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    seeded(7)
    x = torch.randn(definition.shape, dtype=dtype)
    return definition.build().to(dtype).train(training), x


def run(model: nn.Module, x: Tensor) -> Ran:
    with watching(model) as ran:
        seeded()
        model(x)
    return ran


@MODES
@EACH
def test_fused_is_plain(definition: Definition, training: bool) -> None:
    """Two steps in float64: outputs, gradients, buffers."""
    plain, fused = pair(make(definition, training, torch.float64)[0])
    assert_same_step(plain, fused, make(definition, training, torch.float64)[1], steps=2, lr=0.01)


@MODES
@EACH
def test_sites_are_those_that_the_oracle_sees(definition: Definition, training: bool) -> None:
    model, x = make(definition, training, torch.float64)
    seeded()
    seen = record(copy.deepcopy(model), x)
    ran = run(fuse(model), x)
    assert ran.composites == 0
    unfused = UNFUSED.get(definition.name, {})
    expected = Counter((s.bn, s.conv) for s in seen.sites if s.conv not in unfused)
    assert Counter(ran.sites) == expected
    assert {s.conv for s in seen.sites} >= set(unfused) or definition.drawn, "exceptions that are none"


if __name__ == "__main__":
    for d in DEFINITIONS.values():
        for training in (True, False):
            model, x = make(d, training, torch.float64)
            seeded()
            seen = record(copy.deepcopy(model), x)
            warnings.simplefilter("ignore")
            ran = run(fuse(model), x)
            a = Counter((s.bn, s.conv) for s in seen.sites)
            b = Counter(ran.sites)
            if a != b or ran.counts != seen.counts:
                print(d.name, training, a - b, b - a, ran.counts, seen.counts)
