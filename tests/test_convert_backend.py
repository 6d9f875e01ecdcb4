"""``torch.compile``: the backend of this package on anybody's model, and compiled models that ``fuse`` converted."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import seeded, watching
from definitions import DEFINITIONS
from definitions_oracle import record
from helpers import COMPILED, assert_within_policy
from torch import Tensor, nn

import fused_preact
from fused_preact import functional
from fused_preact.convert.backend import backend

pytestmark = [pytest.mark.usefixtures("exact_float32"), pytest.mark.xdist_group("convert-backend")]

# One for each way of spelling things; compiling all of them would take minutes.
NAMES = [
    "kuangliu_18",
    "timm_resnetv2_50",
    "spellings",
    "functional_wide_resnet",
    "densenet_cifar",
    "keras_resnet50v2",
]
DOORS: dict[str, Callable[..., Any]] = {
    "backend": lambda model, then, **kwargs: torch.compile(
        model, backend=backend, options={"then": then}, **kwargs
    ),
    "fuse": lambda model, then, **kwargs: torch.compile(fused_preact.fuse(model), backend=then, **kwargs),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of sites of each fused call that is traced or run."""
    found: list[int] = []
    unit = functional._unit

    def counted(x: Tensor, pairs: list[Any], projection: Any, *rest: Any) -> Any:
        found.append(len(pairs) + (projection is not None))
        return unit(x, pairs, projection, *rest)

    monkeypatch.setattr(functional, "_unit", counted)
    return found


def step(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {k: v.clone() for k, v in (found | dict(model.named_buffers())).items() if v is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for name, t in expected.items() if name.startswith("d"))
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), largest * 1e-3 if name.startswith("d") else 1e-6)
        assert float((found[name] - tensor).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(
    ("name", "door", "training"),
    [
        pytest.param(name, door, training, id=f"{name}-{door}-{'train' if training else 'eval'}")
        for name in NAMES
        for door in DOORS
        for training in (True, False)
        # What fuse writes has been matched without Dynamo: a unit, lists of tensors and functions are enough here.
        if door == "backend"
        or (training and name in ("kuangliu_18", "functional_wide_resnet", "densenet_cifar"))
    ],
)
def test_definitions(name: str, door: str, training: bool, sites: list[int]) -> None:
    """No graph break, the numbers of the plain model in float64 over two steps, and the sites are fused."""
    definition = DEFINITIONS[name]
    plain = definition.build().double().train(training)
    model = copy.deepcopy(plain)
    function = DOORS[door](model, "aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(definition.shape, dtype=torch.float64)
        same(step(function, model, x), step(plain, plain, x), 1e-9)
    assert sum(sites) >= definition.sites - 1  # AOTAutograd traces more than once


@pytest.mark.parametrize("name", ["gated_unit", "skipped_units", "dual_path"])
def test_what_tracing_cannot_enter_dynamo_can(name: str) -> None:
    """It breaks the graph where code depends on data or draws in Python, and knows the types of values."""
    definition = DEFINITIONS[name]
    model = definition.build().double().train()
    plain, x = copy.deepcopy(model), torch.randn(definition.shape, dtype=torch.float64)
    seeded()
    seen = record(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend=backend, options={"then": "eager"})
    with watching(model) as ran:
        seeded()
        y = compiled(x)
    seeded()
    torch.testing.assert_close(y, plain(x))
    assert ran.counts == (len(seen.sites), len(seen.additions), len(seen.heads))


@pytest.mark.parametrize("door", DOORS)
def test_batch_sizes_and_modes_do_not_recompile(door: str) -> None:
    definition = DEFINITIONS["kuangliu_18"]
    model = definition.build()
    compiled: list[int] = []

    def counting(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    target = fused_preact.fuse(model) if door == "fuse" else model

    def fusing(graph: Any, inputs: Any) -> Any:
        counting(graph, inputs)
        return backend(graph, inputs, options={"then": "eager"})

    function = torch.compile(
        target, backend=counting if door == "fuse" else fusing, dynamic=True, fullgraph=True
    )
    for training in (True, False, True, False):
        model.train(training)
        for batch in (2, 3, 5):
            x = torch.randn(batch, *definition.shape[1:])
            plain = copy.deepcopy(fused_preact.unfuse(copy.deepcopy(model)))
            torch.testing.assert_close(function(x), plain(x), rtol=1e-3, atol=1e-4)
    assert len(compiled) == 2, "training and evaluation"


@COMPILED
@pytest.mark.parametrize("door", DOORS)
def test_inductor(door: str) -> None:
    """The default: the rest of the graph by Inductor, our compiled kernels in it; float32 by the policy."""
    definition = DEFINITIONS["kuangliu_18"]
    plain = definition.build()
    model, oracle = copy.deepcopy(plain), copy.deepcopy(plain).double()
    function = DOORS[door](model, "inductor", fullgraph=True)
    x = torch.randn(definition.shape)
    y = function(x)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_within_policy("y", y, plain(x), oracle(x.double()))
    for (name, buffer), eager, exact in zip(
        model.named_buffers(), plain.buffers(), oracle.buffers(), strict=True
    ):
        if buffer.is_floating_point():
            assert_within_policy(name, buffer, eager, exact)
        else:
            assert torch.equal(buffer, exact), name


def test_autocast(sites: list[int]) -> None:
    definition = DEFINITIONS["kuangliu_18"]
    plain = definition.build()
    model, oracle = copy.deepcopy(plain), copy.deepcopy(plain).double()
    function = DOORS["backend"](model, "aot_eager", fullgraph=True)
    x = torch.randn(definition.shape)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = function(x), plain(x)
    assert sites
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_within_policy("y", y, expected, oracle(x.double()), ulps=16)


def test_functional_code(sites: list[int]) -> None:
    """A function of tensors, without any module."""
    weight, gamma, beta = torch.randn(4, 4, 3, 3), torch.rand(4) + 0.5, torch.randn(4)

    def function(x: Tensor) -> Tensor:
        y = torch.relu(F.batch_norm(x, None, None, gamma, beta, training=True))
        return torch.add(F.conv2d(y, weight, padding=1), x)

    x = torch.randn(2, 4, 6, 5)
    compiled = torch.compile(function, backend=backend, options={"then": "aot_eager"})
    torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-4)
    assert sites


def test_statistics_are_handed_on() -> None:
    """Inside one graph too: a row of units computes those of its input once."""
    plain = nn.Sequential(*(DEFINITIONS["kuangliu_18"].build().layer1[0] for _ in range(3)))  # type: ignore[union-attr]
    graphs: list[Any] = []

    def aot(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        return aot_autograd(fw_compiler=keep)(graph, inputs)

    torch._dynamo.register_backend(aot, name="fused_preact_test_aot")
    function = DOORS["backend"](plain, "fused_preact_test_aot")
    function(torch.randn(2, 8, 5, 5)).sum().backward()
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("bn_stats" in t for t in targets) == 1


def test_name_of_the_backend() -> None:
    """``torch.compile(model, backend="fused_preact")`` finds it through the entry point, without an import."""
    (point,) = [
        e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "fused_preact"
    ]
    assert point.load() is backend
    model = DEFINITIONS["kuangliu_18"].build().eval()
    x = torch.randn(DEFINITIONS["kuangliu_18"].shape)
    y = torch.compile(model, backend="fused_preact", options={"then": "eager"})(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("then", ["fused_preact", "no such backend"])
def test_unknown_backend(then: str) -> None:
    with pytest.raises(Exception, match=rf"options\['then'\]: got '{then}', allowed are .*inductor"):
        DOORS["backend"](nn.Linear(2, 2), then)(torch.randn(1, 2))


def test_a_change_after_compilation_is_seen() -> None:
    """Another BN or another convolution in a fused model: Dynamo guards on what the graph reads."""
    definition = DEFINITIONS["kuangliu_18"]
    model: Any = fused_preact.fuse(definition.build().double().eval())
    function = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(definition.shape, dtype=torch.float64)
    function(x)
    model.layer1[0].bn1 = nn.BatchNorm2d(8, eps=0.5).double().eval()
    model.layer1[1].conv2 = nn.Conv2d(8, 8, 3, padding=1).double()
    expected = fused_preact.unfuse(copy.deepcopy(model))(x)
    torch.testing.assert_close(function(x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(training: bool) -> None:
    """``torch.export`` of a fused model, saved and loaded."""
    import io

    definition = DEFINITIONS["kuangliu_18"]
    model = fused_preact.fuse(definition.build().train(training))
    x = torch.randn(definition.shape)
    program = torch.export.export(copy.deepcopy(model), (x,))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    torch.testing.assert_close(loaded.module()(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)
    targets = [str(node.target) for node in loaded.graph.nodes]
    assert any("fused_preact.conv_fprop" in target for target in targets)
