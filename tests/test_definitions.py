"""The definitions run, and hold what they say they hold; the oracle that counts it tells look-alikes apart."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import DEFINITIONS, Definition
from definitions_copies import WideAndOr
from definitions_oracle import Addition, Site, record
from real_models import PYTORCHCV, TIMM, input_size, pytorchcv_model, timm_model
from torch import Tensor, fx, nn

EACH = pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])

# Layers called as functions are seen by the oracle and by no hook.
FUNCTIONAL = {"functional_wide_resnet", "blurred_downsampling"}


def make(
    definition: Definition, training: bool, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    random.seed(7)
    x = torch.randn(definition.shape, dtype=dtype, requires_grad=True)
    return definition.build().to(dtype).train(training), x


@DTYPES
@MODES
@EACH
def test_runs_forward_and_backward(definition: Definition, training: bool, dtype: torch.dtype) -> None:
    model, x = make(definition, training, dtype)
    out = model(x)
    assert out.dim() == 2, tuple(out.shape)
    assert len(out) == definition.shape[0], tuple(out.shape)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert out.std() > 0, "the output does not depend on anything"
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"dx": x.grad}
    for name, grad in grads.items():
        if not (definition.drawn and training):
            assert grad is not None, f"{name}: no gradient"
        assert grad is None or grad.isfinite().all(), f"{name}: not finite"
    assert x.grad.abs().sum() > 0, "dx is zero"


@EACH
def test_is_built_the_same_each_time_with_awkward_norms(definition: Definition) -> None:
    state = definition.build().state_dict()
    torch.manual_seed(99)
    for name, tensor in definition.build().state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, module in definition.build().named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            assert (module.weight < 0).any(), f"{name}: no negative scale"
            assert (module.weight == 0).any(), f"{name}: no zero scale"
            assert (module.weight > 0).any() or module.num_features < 3, f"{name}: no positive scale"
            assert (module.bias != 0).all(), f"{name}: no offset"


@EACH
def test_survives_copies_and_pickle(definition: Definition) -> None:
    model, x = make(definition, training=False)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@MODES
@EACH
def test_counts_are_what_a_run_shows(definition: Definition, training: bool) -> None:
    model, x = make(definition, training)
    found = record(model, x)
    if training:
        expected = (definition.sites, definition.additions, definition.heads)
    else:
        expected = (definition.eval_sites, definition.eval_additions, definition.heads)
    if definition.drawn and training:
        least = (expected[0] - definition.hidden, expected[1] - definition.hidden_additions, expected[2])
        assert all(
            low <= count <= high for low, count, high in zip(least, found.counts, expected, strict=True)
        )
    else:
        assert found.counts == expected


@MODES
@EACH
def test_what_is_found_has_the_names_of_the_model(definition: Definition, training: bool) -> None:
    model, x = make(definition, training)
    found = record(model, x)
    modules = dict(model.named_modules())
    keys = dict(model.named_parameters()) | dict(model.named_buffers())
    for site in found.sites:
        if definition.name in FUNCTIONAL:
            assert site.conv in modules or site.conv in keys, site
            continue
        # A norm with neither parameters nor statistics owns nothing that it could be known by.
        norm = modules.get(site.bn)
        assert isinstance(norm, nn.BatchNorm2d) or (site.bn == "?" and definition.name == "norm_options"), (
            site
        )
        assert isinstance(modules[site.conv], nn.Conv2d), site
    assert {host for addition in found.additions for host in addition.hosts} <= {
        site.conv for site in found.sites
    }


@MODES
@pytest.mark.parametrize("name", [name for name in DEFINITIONS if name not in FUNCTIONAL])
def test_every_layer_that_runs_is_seen(name: str, training: bool) -> None:
    """Hooks on the layers count as many norms and convolutions as the oracle does."""
    model, x = make(DEFINITIONS[name], training)
    calls = {nn.BatchNorm2d: 0, nn.Conv2d: 0}

    def count(module: nn.Module, *_: Any) -> None:
        for kind in calls:
            calls[kind] += isinstance(module, kind)

    for module in model.modules():
        module.register_forward_hook(count)
    found = record(model, x)
    assert (found.batch_norms, found.convolutions) == tuple(calls.values())
    assert len(found.sites) <= found.convolutions


@MODES
@EACH
def test_tracing_succeeds_where_it_is_said_to(definition: Definition, training: bool) -> None:
    model, x = make(definition, training)
    if not (definition.traceable if training else definition.eval_traceable):
        with pytest.raises(fx.proxy.TraceError):
            fx.symbolic_trace(model)
        return
    traced = fx.symbolic_trace(copy.deepcopy(model))
    if definition.drawn and training:
        return  # what was recorded is what was drawn while tracing
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("name", [name for name, d in DEFINITIONS.items() if d.hidden and not d.drawn])
def test_hidden_sites_are_those_of_the_smallest_untraceable_units(name: str) -> None:
    definition = DEFINITIONS[name]
    model, x = make(definition, training=True)
    # A norm by itself never traces (it looks at the shape of its input); inside a parent it is a leaf.
    units = {
        path: module for path, module in model.named_modules() if next(module.children(), None) is not None
    }
    failing = [path for path, module in units.items() if not _traces(module)]
    smallest = [path for path in failing if not any(_below(other, path) for other in failing)]
    found = record(model, x)
    inside = tuple(f"{path}." for path in smallest)
    assert sum(site.conv.startswith(inside) for site in found.sites) == definition.hidden
    hidden = [addition for addition in found.additions if addition.hosts[0].startswith(inside)]
    assert len(hidden) == definition.hidden_additions


def _below(path: str, parent: str) -> bool:
    return path != parent and (not parent or path.startswith(f"{parent}."))


def _traces(module: nn.Module) -> bool:
    try:
        fx.symbolic_trace(module)
    except fx.proxy.TraceError:
        return False
    return True


def test_symbolic_tracing_advances_the_counters_of_a_norm_that_counts_itself() -> None:
    """A matcher that traces must put back what tracing changed."""
    model, _ = make(DEFINITIONS["timm_resnetv2_50"], training=True)
    fx.symbolic_trace(model)
    assert model.norm.num_batches_tracked == 1


def test_truth_of_a_tensor_stops_the_oldest_wide_unit_traced_or_not() -> None:
    unit = WideAndOr(8, 8, 1)
    with pytest.raises(RuntimeError, match="ambiguous"):
        unit(torch.randn(2, 8, 4, 4))
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(unit)


class Probe(nn.Module):
    """Two norms and two convolutions, and a forward of the test's own."""

    def __init__(self, run: Callable[[Probe, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def active(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


SITES = {
    "relu in place": lambda m, x: m.conv(F.relu(m.norm(x), inplace=True)),
    "keywords": lambda m, x: F.conv2d(weight=m.conv.weight, input=F.relu(input=m.norm(x))),
    "dropout at rest": lambda m, x: m.conv(F.dropout(m.active(x), 0.5, training=False)),
    "already contiguous": lambda m, x: m.conv(m.active(x).contiguous()),
    "torch.batch_norm": lambda m, x: m.conv(
        torch.batch_norm(x, m.norm.weight, m.norm.bias, None, None, True, 0.1, 1e-5, False).relu()
    ),
}
NO_SITES = {
    "dropout": lambda m, x: m.conv(F.dropout(m.active(x), 0.5)),
    "another activation in place": lambda m, x: m.conv(F.silu(m.norm(x), inplace=True)),
    "scaled in place": lambda m, x: m.conv(m.active(x).mul_(2)),
    "pool": lambda m, x: m.conv(F.max_pool2d(m.active(x), 2)),
    "slice": lambda m, x: m.conv(m.active(x)[:, :, 1:]),
    "sum": lambda m, x: m.conv((m.norm(x) + x).relu()),
    "transposed": lambda m, x: F.conv_transpose2d(m.active(x), m.conv.weight),
    "as the weight": lambda m, x: F.conv2d(x, m.active(x[:, :, :2, :1].reshape(4, 4, 1, 1))),
    "norm of lines": lambda m, x: F.conv2d(
        F.batch_norm(x[:, :, 0], None, None, training=True).relu(), m.conv.weight[:, :2]
    ),
    "lopsided pad": lambda m, x: m.conv(F.pad(m.active(x), (0, 1))),
    "channel pad": lambda m, x: F.conv2d(
        F.pad(m.active(x), (0, 0, 0, 0, 2, 2)), m.conv.weight.repeat(1, 2, 1, 1)
    ),
    "pad with ones": lambda m, x: m.conv(F.pad(m.active(x), (1, 1, 1, 1), value=1.0)),
    "reflected pad": lambda m, x: m.conv(F.pad(m.active(x), (1, 1, 1, 1), mode="reflect")),
}


@pytest.mark.parametrize("name", SITES)
def test_oracle_sees_a_site(name: str) -> None:
    assert [(site.bn, site.relu, site.padded) for site in record(Probe(SITES[name]), _input()).sites] == [
        ("norm", True, False)
    ]


@pytest.mark.parametrize("name", NO_SITES)
def test_oracle_is_not_taken_in(name: str) -> None:
    assert record(Probe(NO_SITES[name]), _input()).sites == []


def test_oracle_names_padded_and_bare_sites() -> None:
    found = record(Probe(lambda m, x: m.conv(F.pad(m.other(m.last(m.active(x))), [2, 2, 1, 1]))), _input())
    assert found.sites == [Site("norm", "last"), Site("other", "conv", relu=False, padded=True)]


ADDITIONS = {
    "operand first": (lambda m, x: x + m.conv(m.active(x)), ("conv",)),
    "in place": (lambda m, x: m.conv(m.active(x)).add_(x), ("conv",)),
    "shortcut is a site": (lambda m, x: (lambda a: m.conv(a) + m.last(a))(m.active(x)), ("conv", "last")),
    "scaled": (lambda m, x: torch.add(x, m.conv(m.active(x)), alpha=2), None),
    "a number": (lambda m, x: m.conv(m.active(x)) + 1, None),
    "broadcast": (lambda m, x: m.conv(m.active(x)) + x[:, :, :1, :1], None),
    "no site": (lambda m, x: m.conv(x) + x, None),
    "norm between": (lambda m, x: m.other(m.conv(m.active(x))) + x, None),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_oracle_finds_hosts_of_additions(name: str) -> None:
    run, hosts = ADDITIONS[name]
    found = record(Probe(run), _input())
    assert found.additions == ([] if hosts is None else [Addition(hosts)])
    assert found.other_additions == (hosts is None)


def test_oracle_wants_the_sum_to_be_the_only_reader() -> None:
    def run(m: Probe, x: Tensor) -> Tensor:
        out = m.conv(m.active(x))
        return m.last(m.other(out + x)) + out

    found = record(Probe(run), _input())
    assert found.additions == [Addition(("last",))]
    assert found.other_additions == 1


HEADS = {
    "mean": (lambda x: x.mean((2, 3)), True),
    "mean from behind": (lambda x: torch.mean(x, dim=[-1, -2], keepdim=True), True),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 1), True),
    "whole map": (lambda x: F.avg_pool2d(x, x.shape[-1]), True),
    "mean of one side": (lambda x: x.mean((2,)), False),
    "mean of everything": (lambda x: x.mean(), False),
    "a part of the map": (lambda x: F.avg_pool2d(x, 5, 4), False),
    "maximum": (lambda x: F.adaptive_max_pool2d(x, 1), False),
}


@pytest.mark.parametrize("name", HEADS)
def test_oracle_knows_heads(name: str) -> None:
    pool, is_head = HEADS[name]
    found = record(Probe(lambda m, x: pool(m.active(x))), _input())
    assert found.heads == (["norm"] if is_head else [])


def _input() -> Tensor:
    return torch.randn(2, 4, 6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_real_timm_holds_what_was_counted(name: str) -> None:
    assert record(timm_model(name).train(), torch.randn(2, 3, 64, 64)).counts == TIMM[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTORCHCV)
def test_real_pytorchcv_holds_what_was_counted(name: str) -> None:
    x = torch.randn(2, 3, input_size(name), input_size(name))
    assert record(pytorchcv_model(name).train(), x).counts == PYTORCHCV[name]
