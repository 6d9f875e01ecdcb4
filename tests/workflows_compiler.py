"""Workflows: ``torch.compile``, ``torch.export``, AOTInductor and what is exported elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from convert_helpers import assert_close
from helpers import set_fused
from torch._dynamo.testing import CompileCounterWithBackend
from workflows import NOT, NOT_FUSED, Claim, Subject, elsewhere, untried, workflow

import fused_preact

GROUP = "Compiler and export"
BACKEND = "test_convert_backend.py::test_definitions"
OWN = "test_models.py::test_torch_compile_fullgraph"
SIZES = "test_convert_backend.py::test_batch_sizes_and_modes_do_not_recompile[fuse]"


def compiled(s: Subject, training: bool) -> None:
    """One graph, whatever the batch; outputs and gradients of the plain network."""
    torch._dynamo.reset()
    plain, model = s.pair(training)
    counter = CompileCounterWithBackend("eager")
    function = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = s.image(batch)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [f(leaf) for f, leaf in zip((plain, function), leaves, strict=True)]
        for y in outputs:
            y.square().sum().backward()
        assert_close("output", outputs[1], outputs[0])
        assert_close("dx", leaves[1].grad, leaves[0].grad)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_close(name, a, b)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(name, q.grad, p.grad)
    assert counter.frame_count == 1, "recompiled"


@workflow(
    "compile",
    "torch.compile(fuse(model), fullgraph=True), training",
    GROUP,
    but={
        "kuangliu_18": elsewhere(f"{BACKEND}[kuangliu_18-fuse-train]"),
        "densenet_cifar": elsewhere(f"{BACKEND}[densenet_cifar-fuse-train]"),
        "own": elsewhere(OWN),
        "timm_resnetv2_50": untried("no test by this door"),
    },
)
def compile_fused(s: Subject) -> None:
    compiled(s, True)


def _same_as(row: str, subject: str) -> Claim:
    return elsewhere(f"test_workflows.py::test_workflow[{row}-{subject}]")


@workflow(
    "compile-batch-sizes",
    "the same, no recompilation over batch sizes, dynamic=True",
    GROUP,
    but={
        "kuangliu_18": elsewhere(SIZES),
        "timm_resnetv2_50": untried("no test by this door"),
        "wide_resnet": _same_as("compile", "wide_resnet"),
        "own": elsewhere(OWN),
    },
)
def compile_sizes(s: Subject) -> None:
    compiled(s, False)


@workflow(
    "compile-backend",
    'torch.compile(model, backend="fused_preact")',
    GROUP,
    but={
        **{
            n: elsewhere(f"{BACKEND}[{n}-backend-train]")
            for n in ("timm_resnetv2_50", "kuangliu_18", "densenet_cifar")
        },
        "wide_resnet": elsewhere(
            f"{BACKEND}[functional_wide_resnet-backend-train]", remark="the functional WideResNet"
        ),
    },
)
def compile_backend(s: Subject) -> None:
    """Of a network of ours: it is fused by itself, and the backend leaves it so."""
    torch._dynamo.reset()
    plain, model = s.pair()
    options = {"then": "eager"}
    function = torch.compile(model, backend="fused_preact", fullgraph=True, options=options)
    x = s.image()
    y, expected = function(x), plain(x)
    y.sum().backward(), expected.sum().backward()
    assert_close("output", y, expected)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(name, q.grad, p.grad)


SLOW = "no test: up to a minute of C++ compilation each"


@workflow(
    "compile-inductor",
    "the same by Inductor",
    GROUP,
    but={
        "kuangliu_18": elsewhere("test_convert_backend.py::test_inductor[fuse]"),
        **{n: untried(SLOW) for n in ("timm_resnetv2_50", "wide_resnet", "densenet_cifar", "own")},
    },
)
def compile_inductor(s: Subject) -> None:
    raise NotImplementedError


OTHERS = untried("no test; nothing in it depends on the network")


@workflow(
    "compile-double-backward",
    "a gradient penalty under torch.compile",
    GROUP,
    outcome=NOT,
    remark='an error: from us where Dynamo alone traced (backend="eager"); with AOTAutograd (Inductor) from PyTorch, '
    "which has no double backward there",
    but=dict.fromkeys(("timm_resnetv2_50", "kuangliu_18", "wide_resnet", "densenet_cifar"), OTHERS),
)
def compile_double_backward(s: Subject) -> None:
    torch._dynamo.reset()
    function = torch.compile(s.pair()[1], backend="eager")
    x = s.image().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True: the backward of a forward"):
        torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    (dx,) = torch.autograd.grad(function(x).square().sum(), x)  # the first derivative is there
    assert dx.shape == x.shape


@workflow("export", "torch.export, any batch size, saved and loaded", GROUP)
def export(s: Subject) -> None:
    plain, model = s.pair(training=False)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (s.image(),), dynamic_shapes=(batch,))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    assert any("fused_preact.conv_fprop" in str(node.target) for node in loaded.graph.nodes)
    for count in (2, 5):
        x = s.image(count)
        assert_close("output", loaded.module()(x), plain(x))


@workflow(
    "export-training",
    "torch.export of the training mode",
    GROUP,
    but={"kuangliu_18": elsewhere("test_convert_backend.py::test_export[train]")},
)
def export_training(s: Subject) -> None:
    plain, model = s.pair()
    x = s.image()
    program = torch.export.export(model, (x,))
    loaded = program.module()
    assert_close("output", loaded(x), plain(x))
    buffers = dict(loaded.named_buffers())
    for name, buffer in plain.named_buffers():
        assert_close(name, buffers[name], buffer)


def unfused(s: Subject, model: Any) -> Any:
    """As it was written; a network of ours by its switch."""
    return set_fused(model, False) if s.name == "own" else fused_preact.unfuse(model)


@workflow(
    "onnx",
    "ONNX: torch.export of `unfuse(model)` holds PyTorch's operations only",
    GROUP,
    outcome=NOT_FUSED,
    remark="what `torch.onnx.export(dynamo=True)` starts from; the package onnx is not installed where tests run. "
    "A network of ours is exported with `fused=False`",
)
def onnx(s: Subject) -> None:
    plain, model = s.pair(training=False)
    x = s.image()
    model = unfused(s, model)
    program = torch.export.export(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert all(target.startswith(("aten.", "<built-in function getitem>")) for target in targets), targets
    assert_close("output", program.module()(x), plain(x))


@workflow(
    "aotinductor",
    "AOTInductor: compiled, packaged, loaded",
    GROUP,
    but=dict.fromkeys(("timm_resnetv2_50", "wide_resnet", "densenet_cifar", "own"), untried(SLOW)),
    remark="one converted block, evaluation",
)
def aotinductor(s: Subject) -> None:
    import tempfile

    import torch._inductor.config as config

    plain, model = (m.layer1[0].requires_grad_(False) for m in s.pair(False, torch.float32))
    x = torch.randn(2, model.bn1.num_features, 8, 8)
    program = torch.export.export(model, (x,))
    assert any("fused_preact.conv_fprop" in str(node.target) for node in program.graph.nodes)
    with (
        tempfile.TemporaryDirectory() as folder,
        config.patch({"aot_inductor.compile_wrapper_opt_level": "O0", "cpp_cache_precompile_headers": False}),
    ):
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/block.pt2")
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(x), plain(x), rtol=1e-4, atol=1e-4)
