"""``fuse`` on the real timm, pytorchcv and torchvision, where they are installed; see ``real_models``."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from convert_helpers import assert_same_step, pair, seeded, watching
from definitions_base import disturb
from definitions_oracle import record
from real_models import PYTORCHCV, TIMM, import_real, pytorchcv_model, timm_model
from torch import Tensor, nn

from fused_preact import fuse, unfuse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*found nothing to fuse"),
]

# Of each the sites, additions and heads that are not fused.
POOL = "a pool reads the activation of a downsampling unit too, so it is stored anyway"
UNFUSED: dict[str, tuple[tuple[int, int, int], str]] = {
    "timm resnetv2_18d": ((3, 0, 0), POOL),
    "timm resnetv2_50d": ((3, 0, 0), POOL),
}
MODELS = [f"timm {name}" for name in TIMM] + [f"pytorchcv {name}" for name in PYTORCHCV]
MODELS += ["torchvision densenet121"]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """In float64, and an input as small as the model takes."""
    package, name = name.split()
    seeded()
    if package == "torchvision":
        model = import_real("torchvision.models").densenet121(num_classes=10)
    else:
        model = timm_model(name) if package == "timm" else pytorchcv_model(name)
    size = 64
    if package == "pytorchcv":
        size = 32 if "cifar" in name else 224
    return disturb(model).double(), torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_sites(name: str) -> None:
    model, x = build(name)
    for training in (True, False):
        model.train(training)
        seeded()
        with torch.no_grad():
            seen = record(unfuse(copy.deepcopy(model)), x)
            fuse(model)
            seeded()
            with watching(model) as ran:
                model(x)
        missing = Counter((s.bn, s.conv) for s in seen.sites)
        missing.subtract(Counter(ran.sites))
        assert min(missing.values(), default=0) >= 0
        less = tuple(a - b for a, b in zip(seen.counts, ran.counts, strict=True))
        assert less == UNFUSED.get(name, ((0, 0, 0), ""))[0]
        assert ran.composites == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_is_plain(name: str, training: bool) -> None:
    model, x = build(name)
    plain, fused = pair(model.train(training))
    assert_same_step(plain, fused, x)
