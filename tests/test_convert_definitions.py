"""``fuse`` on every definition of a third-party structure: the plain model's numbers, and which sites run fused."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from convert_helpers import Ran, assert_same_step, pair, seeded, watching
from definitions import DEFINITIONS, Definition
from definitions_oracle import record
from helpers import COMPILED, assert_within_policy
from torch import Tensor, nn

from fused_preact import fuse, ops

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*found nothing to fuse"),
]

EACH = pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
RESIDUAL = pytest.mark.parametrize("name", [name for name, d in DEFINITIONS.items() if d.residual])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

POOL = "a pool or a blur reads the activation too, so it is stored anyway"
NORM = "another norm reads the activation too, so it is stored anyway"
IMAGE = "the norm of an image, whose convolution has too few channels to gain"
SUMMED = "a sum reads the normalised tensor too, behind a norm of its own, so it is stored anyway"
BEHIND = "a norm stands between the last convolution and the sum"
DATA = "its unit's control flow depends on the data"
DRAWN = "its unit draws in Python whether it runs"
V1 = "a sum adds the activation behind another norm, so it is stored anyway"

# The convolutions of sites that run as they were written, and why.
UNFUSED: dict[str, dict[str, str]] = {
    "timm_resnetv2_18d": {"stages.1.blocks.0.conv1": POOL},
    "weiaicunzai_50": {"1.0.shortcut": NORM},
    "hysts_flags": {"stage1.block1.conv1": SUMMED},
    "gluon_resnet50_v2": {"1": IMAGE},
    "skipped_units": dict.fromkeys([f"body.{i}.conv{j}" for i in (2, 3) for j in (1, 2)], DRAWN),
    "blurred_downsampling": {"layer2.0.conv1": POOL, "layer3.0.conv1": POOL},
    "gated_unit": {"body.2.conv1": DATA, "body.2.conv2": DATA},
    "post_activation": {"body.3.conv1": V1},
}
# Of the additions and heads that the oracle counts, those that no fused call makes.
ADDITIONS = {"gated_unit": DATA, "skipped_units": DRAWN}
HEADS = {"dual_path": "its norm asks whether it is given a tuple, and an FX graph cannot answer for it"}

# Residual nets with less than 90 % of their sites fused.
FEW = {"blurred_downsampling": 6 / 8, "gated_unit": 8 / 10}
FEW_IN_TRAINING = {"skipped_units": 6 / 10}

# What is saved of what the plain model saves, in per cent, where it is more than 60. Of a unit of two sites PyTorch
# keeps four maps (the inputs of two norms and of two convolutions), a fused one two.
SAVED = {
    "hysts_flags": (63, f"{BEHIND}: its input is a third map"),
    "wide_resnet_dropout": (
        82,
        "a dropout in front of the second convolution: ReLU's output, the mask and the dropped map stay",
    ),
    "wide_resnet_older": (
        61,
        "a dropout's mask is a third map (on a GPU, where it is of bytes, a quarter of one)",
    ),
    "skipped_units": (68, DRAWN),
    "squeeze_excitation": (61, "what is scaled is saved for the scale: a third map"),
    "blurred_downsampling": (67, f"{POOL}, padded once more by the blur"),
    "gated_unit": (66, DATA),
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


@pytest.mark.parametrize("served", [pytest.param("cpu", marks=COMPILED)])
@MODES
@EACH
def test_kernels_are_within_policy(definition: Definition, training: bool, served: str) -> None:
    """float32 on the compiled kernels against the same definition in float64."""
    model, x = make(definition, training, torch.float32)
    assert ops.serving_backend(x) == served
    exact = copy.deepcopy(model).double()
    plain, fused = pair(model)
    outputs = []
    for network in (fused, plain, exact):
        seeded()
        outputs.append(network(x.to(next(network.parameters()).dtype)))
    assert_within_policy("output", *outputs, compiled=True)


@MODES
@EACH
def test_sites_are_those_that_the_oracle_sees(definition: Definition, training: bool) -> None:
    model, x = make(definition, training, torch.float64)
    seeded()
    seen = record(copy.deepcopy(model), x)
    ran = run(fuse(model), x)
    assert ran.composites == 0
    unfused = UNFUSED.get(definition.name, {}) if training or not definition.drawn else {}
    assert Counter(ran.sites) == Counter((s.bn, s.conv) for s in seen.sites if s.conv not in unfused)
    if definition.residual:
        share = len(ran.sites) / (definition.sites if training else definition.eval_sites)
        few = FEW | (FEW_IN_TRAINING if training else {})
        assert share == few[definition.name] if definition.name in few else share >= 0.9
    hosted = [a for a in seen.additions if not unfused or any(h not in unfused for h in a.hosts)]
    assert ran.additions == len(hosted)
    assert ran.additions == len(seen.additions) or definition.name in ADDITIONS
    assert ran.heads == ([] if definition.name in HEADS else seen.heads)


@RESIDUAL
def test_saves_less(name: str) -> None:
    """Activations saved for backward, in the memory format that the kernels work in."""
    model = DEFINITIONS[name].large().train().to(memory_format=torch.channels_last)
    x = torch.randn(8, *DEFINITIONS[name].shape[1:]).contiguous(memory_format=torch.channels_last)
    plain, fused = pair(model)
    share = saved_bytes(fused, x) / saved_bytes(plain, x)
    limit = SAVED[name][0] if name in SAVED else 60
    assert share <= limit / 100
    assert name not in SAVED or share > 0.6, "an exception that is none"


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of each storage that autograd keeps, once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)  # alive, so that no other gets its address
        return t

    seeded()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
