"""explain(model): one row a site, with the truth in it, and the model as it was."""

from __future__ import annotations

import copy
import json
import random
import types
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import DEFINITIONS, Definition
from definitions_base import conv1x1, conv3x3, norm_relu
from definitions_oracle import record
from definitions_residual import KuangliuBasic
from definitions_variants import GatedUnit
from torch import Tensor, nn

from fused_preact import models
from fused_preact.convert import explain, fuse, runtime, unfuse
from fused_preact.convert.report import Explanation, Row
from fused_preact.modules import PreActBasicBlock, PreActConv2d

EACH = pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def small() -> nn.Module:
    return nn.Sequential(conv3x3(3, 8), KuangliuBasic(8, 8), KuangliuBasic(8, 12, 2)).double()


def left(explanation: Explanation, kind: str | None = None) -> dict[str, str]:
    """The reasons of what runs as written, by site."""
    return {
        row.site: row.reason
        for row in explanation.rows
        if row.path == "as written" and kind in (None, row.kind)
    }


def row_of(explanation: Explanation, site: str) -> Row:
    (row,) = [row for row in explanation.rows if row.site == site]
    return row


# --- what it counts -----------------------------------------------------------------------------------------------


@MODES
@EACH
def test_every_site_that_runs_has_a_row(definition: Definition, training: bool) -> None:
    """The oracle, which watches a pass, finds the same sites and heads."""
    model = definition.build().double().train(training)
    explanation = explain(model)
    x = torch.randn(definition.shape, dtype=torch.float64)
    seen = record(copy.deepcopy(model), x)
    rows = [row for row in explanation.rows if row.kind == "site"]
    if not (definition.drawn and training):
        # A unit that runs twice has the names of its first run.
        assert Counter(row.site.split(" -> ")[1] for row in rows) == Counter(site.conv for site in seen.sites)
    if definition.name != "dual_path":  # its head lies behind a norm that cannot be traced
        assert sum(row.kind == "head" for row in explanation.rows) == len(seen.heads)
    assert all(bool(row.reason) == (row.path == "as written") for row in explanation.rows)
    assert all((row.call is None) == (row.path == "as written") for row in explanation.rows)


@EACH
def test_sites_named_as_fused_are_those_that_run_fused(
    definition: Definition, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = definition.build().double().train()
    before = explain(model)
    assert not before.fused
    assert not any(row.fused for row in before.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models without a site
        fuse(model)
    after = explain(model)
    assert [(row.site, row.path, row.reason) for row in after.rows] == [
        (row.site, row.path, row.reason) for row in before.rows
    ]
    assert all(row.fused == (row.path != "as written") for row in after.rows)
    ran: list[tuple[str, int]] = []
    chain, head = runtime.ChainCall.__call__, runtime.HeadCall.__call__

    def counted(call: Any, *args: Any) -> Tensor:
        whole = call.shortcut in ("identity", "activation", "projection")
        path = "unit" if whole else "chain" if len(call.sites) > 1 else "site"
        ran.append((path, len(call.sites) + (call.projection is not None)))
        return chain(call, *args)

    def counted_head(call: Any, *args: Any) -> Tensor:
        ran.append(("head", 1))
        return head(call, *args)

    monkeypatch.setattr(runtime.ChainCall, "__call__", counted)
    monkeypatch.setattr(runtime.HeadCall, "__call__", counted_head)
    model(torch.randn(definition.shape, dtype=torch.float64))
    calls = Counter((row.path, row.call) for row in after.rows if row.call is not None)
    assert Counter((path, count) for (path, _), count in calls.items()) == Counter(ran)
    unfuse(model)
    assert explain(model) == before


@MODES
@EACH
def test_model_and_random_streams_are_as_before(definition: Definition, training: bool) -> None:
    model = definition.build().train(training)
    held = [(m, dict(m.__dict__), dict(m._buffers), dict(m._modules)) for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn, drawn_python = torch.get_rng_state(), random.getstate()
    explain(model)
    for module, own, buffers, children in held:
        assert module.__dict__ == own
        assert module._buffers == buffers
        assert module._modules == children
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(drawn, torch.get_rng_state())
    assert drawn_python == random.getstate()


# --- reasons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("silu", "body.1.bn1 -> body.1.conv1", "body.1.act is a SiLU, not a ReLU"),
        ("gelu", "body.2.bn2 -> body.2.conv2", "body.1.act is a GELU, not a ReLU"),
        ("leaky_relu", "body.1.bn2 -> body.1.conv2", "body.1.act is a LeakyReLU, not a ReLU"),
        ("relu6", "body.1.bn2 -> body.1.conv2", "body.1.act is a ReLU6, not a ReLU"),
        ("regnetv", "body.1.norm1 -> body.1.conv1", "the activation is silu, not a ReLU"),
        ("instance_norm", "body.1.bn1 -> body.1.conv1", "body.1.bn1 is an InstanceNorm2d, not a BatchNorm2d"),
        ("bit_resnetv2", "body.1.gn2 -> body.1.conv2", "body.1.gn2 is a GroupNorm, not a BatchNorm2d"),
        ("reflected_padding", "body.1.bn1 -> body.1.conv1", "body.1.conv1 has padding_mode='reflect'"),
        ("decoder", "body.1 -> body.3", "body.3 is a ConvTranspose2d, not a Conv2d"),
        ("decoder", "body.4 -> body.7", "ReflectionPad2d body.6 stands in front of it"),
        ("decoder", "body.8 -> body.11", "ConstantPad2d body.10 stands in front of it"),
        ("decoder", "body.12 -> body.15", "ZeroPad2d body.14 stands in front of it"),
        ("decoder", "body.16 -> body.19", "Upsample body.18 stands in front of it"),
        ("decoder", "body.20 -> body.22", "body.22 has padding_mode='circular'"),
        ("gated_unit", "? -> body.2.conv1", "its control flow depends on the data"),
        ("skipped_units", "? -> body.3.conv2", "it draws random numbers in Python"),
        (
            "timm_resnetv2_18d",
            "stages.1.blocks.0.norm1 -> stages.1.blocks.0.conv1",
            "the activation is needed by AvgPool2d stages.1.blocks.0.downsample.pool too",
        ),
        (
            "blurred_downsampling",
            "layer2.0.bn1 -> layer2.0.conv1",
            "the activation is needed by ReflectionPad2d layer2.0.shortcut.0.pad too",
        ),
        (
            "wide_resnet_dropout",
            "block1.layer.0.bn2 -> block1.layer.0.conv2",
            "dropout stands in front of it",
        ),
        (
            "squeeze_excitation",
            "relu -> layer1.0.fc2",
            "its activation reads no norm but Conv2d layer1.0.fc1",
        ),
        (
            "squeeze_excitation",
            "mul + conv1",
            "no operand comes straight from a fused convolution: mul and Conv2d conv1",
        ),
        ("spellings", "add + blocks.7.convs.1", "it scales an operand"),
        ("post_activation", "body.1 -> body.3.conv1", "the activation is needed by iadd too"),
        ("dual_path", "features.conv5_bn_ac.bn -> ?", "it asks for the type of a tensor"),
        ("video_preact", "? -> 1.conv1", "1.conv1 is a Conv3d, not a Conv2d"),
    ],
)
def test_reasons(name: str, site: str, reason: str) -> None:
    explanation = explain(DEFINITIONS[name].build().train())
    assert left(explanation)[site] == reason


def test_what_reads_no_activation_has_no_row() -> None:
    """Stems and projections of the raw tensor are no candidates."""
    explanation = explain(DEFINITIONS["bearpaw_preresnet"].build())
    assert left(explanation) == {}
    convolutions = {row.site.split(" -> ")[1] for row in explanation.rows if row.kind == "site"}
    assert convolutions.isdisjoint({"conv1", "layer1.0.downsample.0", "layer2.0.downsample.0"})


def test_sums_of_sizes_are_no_additions() -> None:
    """A dropped path's mask has the shape ``(x.shape[0],) + (1,) * 3``, which a trace holds as a sum too."""
    explanation = explain(DEFINITIONS["drop_path_resnet"].build().train())
    assert explanation.additions == 5
    assert [row.kind for row in explanation.rows].count("addition") == 3


def test_functional_code_is_named_by_its_parameters() -> None:
    explanation = explain(DEFINITIONS["functional_wide_resnet"].build())
    assert explanation.rows[0].site == "params.g0_b0_bn0_weight -> params.g0_b0_conv0"
    assert explanation.rows[-1].site == "params.bn_weight -> avg_pool2d"


def test_a_computed_weight_has_no_name() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(8)
            self.w = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.relu(self.bn(x)), self.w * 2)

    assert [row.site for row in explain(Computed()).rows] == ["bn -> ?"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_it_explains_the_mode_that_the_model_is_in(mode: str) -> None:
    model = DEFINITIONS["wide_resnet_dropout"].build().train(mode == "train")
    explanation = explain(model)
    assert explanation.mode == ("training" if mode == "train" else "evaluation")
    assert len(left(explanation, "convolution")) == (6 if mode == "train" else 0)
    model.block1.layer[0].bn1.train(mode != "train")
    assert explain(model).mode == "mixed"
    assert " in more than one mode: " in str(explain(model))


# --- changes after fuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bn1", "conv2"])
def test_a_hook_on_a_child_is_told_and_goes_again(name: str) -> None:
    model = fuse(small())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x)
    before = explain(model)
    assert before.fused
    assert left(before) == {}
    heard: list[int] = []
    hook = model[1].get_submodule(name).register_forward_hook(lambda *_: heard.append(1))
    for _ in range(2):
        explanation = explain(model)
        site = {"bn1": "1.bn1 -> 1.conv1", "conv2": "1.bn2 -> 1.conv2"}[name]
        assert left(explanation, "site") == {site: f"hooks on 1.{name}"}
        assert row_of(explanation, "2.bn1 -> 2.conv1").fused
        model(x)
    assert len(heard) == 2
    hook.remove()
    assert explain(model) == before


def test_a_hook_on_a_module_between_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(conv3x3(3, 8), *norm_relu(8), nn.Dropout(0.0), conv3x3(8, 8))
    assert left(explain(model)) == {}
    model[2].register_forward_pre_hook(lambda *_: None)
    assert left(explain(model)) == {"1 -> 4": "hooks on 2"}
    model[3].register_forward_hook(lambda *_: None)
    assert left(explain(model)) == {"1 -> 4": "hooks on 3"}


def test_a_global_hook_keeps_everything_as_written() -> None:
    model = fuse(small())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        explanation = explain(model)
        own = explain(PreActBasicBlock(4, 4))
    finally:
        handle.remove()
    for found in (explanation, own):
        assert not found.fused
        assert set(left(found, "site").values()) == {"hooks on the calls of all modules, or a tracer"}
    assert explain(model).fused


def test_replaced_forwards() -> None:
    model = small()
    model[1].forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, model[1])
    model[2].bn1.forward = types.MethodType(lambda self, x: x, model[2].bn1)
    for _ in range(2):
        reasons = left(explain(model))
        assert reasons["? -> 1.conv1"] == "its forward was replaced on the instance"
        assert reasons["2.bn1 -> 2.conv1"] == "the forward of 2.bn1 was replaced"
        fuse(model)
    assert not getattr(model[1].forward, "is_fused", False)


def test_a_part_that_was_replaced_after_fuse_is_not_fused_yet() -> None:
    model = fuse(small())
    model[2] = KuangliuBasic(8, 8).double()
    explanation = explain(model)
    assert not explanation.fused
    assert row_of(explanation, "1.bn1 -> 1.conv1").fused
    assert not row_of(explanation, "2.bn1 -> 2.conv1").fused
    assert explanation.summary == (
        "2 of 4 sites fused in 1 unit, 2 more would be by fuse(model); 2 of 2 additions"
    )
    assert "unit (not yet)" in str(explanation)
    assert explain(fuse(model)).fused
    # A copy hangs on its own modules.
    twin = copy.deepcopy(model)
    assert explain(twin).fused
    twin[1] = copy.copy(model[1])
    assert not row_of(explain(twin), "1.bn1 -> 1.conv1").fused


# --- models of this package ---------------------------------------------------------------------------------------


def test_own_networks_are_fused_by_themselves() -> None:
    model = models.cifar_preact_resnet20()
    explanation = explain(model)
    assert explanation.summary == "21 of 21 sites fused in 9 units; 9 of 9 additions; 1 of 1 head"
    assert {row.path for row in explanation.rows} == {"own unit", "own head"}
    assert explanation.fused
    nested = explain(nn.Sequential(model, nn.Linear(10, 2)))
    assert nested.summary == explanation.summary
    assert nested.rows[0].site == "0.stages.0.0.bn1 -> 0.stages.0.0.conv1"


def test_a_hook_keeps_an_own_unit_from_it() -> None:
    model = models.cifar_preact_resnet20()
    before = explain(model)
    hooks = [m.register_forward_hook(lambda *_: None) for m in (model.stages[0][1].bn2, model.bn)]
    assert left(explain(model)) == {
        "stages.0.1.bn1 -> stages.0.1.conv1": "hooks on stages.0.1.bn2",
        "stages.0.1.bn2 -> stages.0.1.conv2": "hooks on stages.0.1.bn2",
        "stages.0.1.conv2 + its input": "hooks on stages.0.1.bn2",
        "bn -> mean": "hooks on bn",
    }
    assert [row.kind for row in explain(model).rows].count("head") == 1
    for hook in hooks:
        hook.remove()
    assert explain(model) == before
    model.stages[1][0].conv1 = nn.Conv2d(16, 32, 3, 2, 1, padding_mode="reflect", bias=False)
    assert left(explain(model), "site")["stages.1.0.bn2 -> stages.1.0.conv2"] == (
        "stages.1.0.conv1 has padding_mode='reflect'"
    )


def test_fused_false_is_told() -> None:
    model = nn.Sequential(conv3x3(3, 8), PreActConv2d(8, 8, 3), PreActConv2d(8, 8, 3, fused=False))
    explanation = explain(model)
    first, second = row_of(explanation, "1.bn -> 1.conv"), row_of(explanation, "2.bn -> 2.conv")
    assert (first.path, first.fused, first.reason) == ("own site", True, "")
    assert (second.path, second.fused, second.reason) == ("site", False, "fused=False")
    assert explain(fuse(model)).fused


# --- the table ----------------------------------------------------------------------------------------------------

GOLDEN = """\
Sequential in training mode: 3 of 6 sites would be fused by fuse(model) in 1 unit and 1 single call; \
1 of 1 addition; 1 of 1 head; 1 other convolution as written
where    site            path        reason
-------  --------------  ----------  ------------------------------------
1        .bn1 -> .conv1  unit
1        .bn2 -> .conv2  unit
2        ? -> .conv1     as written  its control flow depends on the data
2        ? -> .conv2     as written  its control flow depends on the data
(model)  3 -> 5          as written  hooks on 5
(model)  6 -> 8          site
(model)  9 -> 11         as written  10 is a SiLU, not a ReLU
(model)  12 -> 14        head"""


def golden() -> nn.Module:
    model = nn.Sequential(
        conv3x3(3, 8),
        KuangliuBasic(8, 8),
        GatedUnit(8, 8),
        *norm_relu(8),
        conv1x1(8, 8),
        *norm_relu(8),
        conv3x3(8, 8),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        conv1x1(8, 8),
        *norm_relu(8),
        nn.AdaptiveAvgPool2d(1),
    )
    model[5].register_forward_hook(lambda *_: None)
    return model


def test_the_table() -> None:
    assert str(explain(golden())) == GOLDEN


def test_to_dict_is_json_and_rows_are_frozen() -> None:
    explanation = explain(golden())
    again = json.loads(json.dumps(explanation.to_dict()))
    assert again == explanation.to_dict()
    assert [Row(**row) for row in again["rows"]] == list(explanation.rows)
    assert again["summary"] in str(explanation)
    with pytest.raises(AttributeError):
        explanation.rows[0].path = "unit"  # type: ignore[misc]


def test_models_without_a_site() -> None:
    assert str(explain(nn.Linear(3, 3))) == "Linear in training mode: no BN -> ReLU -> convolution site"
    assert explain(nn.Conv2d(3, 3, 1)).rows == ()
    assert not explain(nn.Linear(3, 3)).fused


@pytest.mark.parametrize(
    "model", [None, "resnet", torch.nn.Linear, torch.ones(1)], ids=lambda m: type(m).__name__
)
def test_something_that_is_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"^model: got .*, allowed is a torch\.nn\.Module"):
        explain(model)


def test_a_scripted_module() -> None:
    with pytest.raises(TypeError, match=r"^model: got a scripted module"):
        explain(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1))))
