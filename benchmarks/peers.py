"""What a user would pick instead, for whole networks: how to prepare it, and what is missing here.

A peer prepares a plain network in its own best setting and returns a function of a batch of images. A peer whose
package is not installed is listed as missing; one that raises is listed with its error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_preact

from . import foreign
from .networks import CHANNELS_LAST
from .options import Setting

BASE = "eager channels_last"
OURS = "fused"
OPTIMIZED = "fused optimized"
Function = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """One way to run a network."""

    name: str
    prepare: Callable[[nn.Module, Tensor, Setting], Function]
    schedule: str
    memory_format: torch.memory_format = CHANNELS_LAST
    package: str = ""
    """The module to import; empty where PyTorch itself is enough."""
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Entered around every block of its calls, forward and backward."""
    ours: bool = False
    """Whether our operations run in it."""


def missing(peer: Peer) -> str | None:
    """Why the peer cannot run here, or None."""
    if peer.package and importlib.util.find_spec(peer.package) is None:
        return f"missing: {peer.package} is not installed"
    return None


def _as_is(net: nn.Module, x: Tensor, setting: Setting) -> Function:
    return net


def _optimized(net: nn.Module, x: Tensor, setting: Setting) -> Function:
    return fused_preact.optimize_for_inference(net)


def _converted(then: Callable[..., Function]) -> Callable[[nn.Module, Tensor, Setting], Function]:
    """The same layers as somebody else would have written the network, converted."""

    def prepare(net: nn.Module, x: Tensor, setting: Setting) -> Function:
        return then(fused_preact.fuse(foreign.network(net)), x, setting)

    return prepare


def _compiled(mode: str | None) -> Callable[[nn.Module, Tensor, Setting], Function]:
    def prepare(net: nn.Module, x: Tensor, setting: Setting) -> Function:
        function = torch.compile(net, dynamic=False, mode=mode)

        def run(x: Tensor) -> Tensor:
            # Tells CUDA graphs that the outputs of the step before are no longer read.
            torch.compiler.cudagraph_mark_step_begin()
            return function(x)

        return run

    return prepare


def _graphed(net: nn.Module, x: Tensor, setting: Setting) -> Function:
    """The network's own forward and backward as two CUDA graphs: what the host does between kernels is not paid.

    As a user would have them, by ``torch.cuda.make_graphed_callables``. The compilers' modes that record graphs have
    the same advantage.
    """
    # Autocast as in the steps, but without its cache, whose copies of the weights would outlive the recording.
    dtype = setting.torch_dtype
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        function: Function = torch.cuda.make_graphed_callables(net, (x.clone(),))
    return function


def _replayed(prepare: Callable[[nn.Module, Tensor, Setting], Function]) -> Callable[..., Function]:
    """Inference by ``prepare``, recorded as a CUDA graph."""

    def recorded(net: nn.Module, x: Tensor, setting: Setting) -> Function:
        function, images = prepare(net, x, setting), x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                function(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            logits = function(images)

        def run(x: Tensor) -> Tensor:
            images.copy_(x)
            graph.replay()
            return logits

        return run

    return recorded


def _frozen(net: nn.Module, x: Tensor, setting: Setting) -> Function:
    """Inductor with the weights as constants: it folds BN into the convolution before it, and repacks weights."""
    import torch._inductor.config as config

    # A function of its own: compiled modules of one class share Dynamo's cache, so that this one would be handed the
    # code of the peer "compile", with nothing frozen.
    @torch.compile(dynamic=False)
    def function(x: Tensor) -> Tensor:
        return net(x)

    def run(x: Tensor) -> Tensor:
        with config.patch(freezing=True), torch.no_grad():
            return function(x)

    return run


def _onnx(net: nn.Module, x: Tensor, path: Path) -> None:
    """The plain network in eval mode as an ONNX file, for the runtimes."""
    net = net.to(memory_format=torch.contiguous_format)
    x = x.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
        torch.onnx.export(net, (x,), str(path), input_names=["x"], dynamo=True, verbose=False)


def _onnxruntime(net: nn.Module, x: Tensor, setting: Setting) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        _onnx(net, x, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return run


def _openvino(net: nn.Module, x: Tensor, setting: Setting) -> Function:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        # In float32 whatever the precision: OpenVINO takes no bfloat16 graph and casts by itself.
        _onnx(net.float(), x.float(), path)
        model = openvino.Core().read_model(str(path))
        # Without the hint OpenVINO computes float32 networks in bfloat16 where the CPU can: not the same work.
        precision = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[setting.dtype]
        hints = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": setting.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(model, "CPU", hints)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        images = x.float().numpy()
        return torch.from_numpy(request.infer({0: images}, share_inputs=True)[compiled.output(0)])

    return run


def _gems() -> contextlib.AbstractContextManager[Any]:
    """FlagGems' Triton operators in the place of PyTorch's, all that it has."""
    return importlib.import_module("flag_gems").use_gems()


_EAGER = [
    Peer(BASE, _as_is, "eager"),
    Peer("eager nchw", _as_is, "eager", torch.contiguous_format),
    Peer("compile", _compiled(None), "pointwise"),
]
_TUNED = Peer("max-autotune", _compiled("max-autotune"), "pointwise")
_OURS = Peer(OURS, _as_is, "c1", ours=True)
_CONVERTED = Peer(f"{OURS} by conversion", _converted(_as_is), "c1", ours=True)
_GEMS = Peer("FlagGems", _as_is, "eager", package="flag_gems", context=_gems)

NOT_COMPARED = {
    "cuDNN frontend": "a graph of operations and no drop-in for a network; its fused convolutions take fp16 with "
    "fp16 scales, and the backward that reduces BN's gradients is not bound in Python",
    "inplace_abn": "needs an activation that can be inverted and refuses ReLU, so it cannot run this network",
    "apex": "contrib.groupbn fuses BN with ReLU or addition in NHWC fp16 and nothing into a convolution, and its "
    "bottleneck is post-activation with frozen BN",
}
"""Libraries near this one that no figure here is of, and why."""


def training(setting: Setting) -> list[Peer]:
    """The peers of a training step that were asked for; the base is always among them."""
    found = [*_EAGER, _OURS, _CONVERTED]
    if setting.device == "cuda":
        graphed = [Peer("eager graph", _graphed, "eager"), Peer(f"{OURS} graph", _graphed, "c1", ours=True)]
        found += [*graphed, _TUNED, _GEMS]
    return [p for p in found if p.name == BASE or setting.wants(p.name)]


def inference(setting: Setting) -> list[Peer]:
    """The peers of inference that were asked for; the base is always among them."""
    found = [*_EAGER, Peer("inductor frozen", _frozen, "pointwise"), _OURS]
    found += [Peer(OPTIMIZED, _optimized, "c1", ours=True)]
    found += [Peer(f"{OPTIMIZED} by conversion", _converted(_optimized), "c1", ours=True)]
    if setting.device == "cuda":
        graphed = [
            Peer("eager graph", _replayed(_as_is), "eager"),
            Peer(f"{OPTIMIZED} graph", _replayed(_optimized), "c1", ours=True),
        ]
        found += [*graphed, _TUNED, _GEMS]
    else:
        nchw = torch.contiguous_format
        found += [
            Peer("onnxruntime", _onnxruntime, "pointwise", nchw, "onnxruntime"),
            Peer("openvino", _openvino, "pointwise", nchw, "openvino"),
        ]
    return [p for p in found if p.name == BASE or setting.wants(p.name)]
