"""Workflows: CUDA graphs. On a CUDA device only (``pytest -m gpu``)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from workflows import NOT_HERE, Subject, workflow

GROUP = "CUDA graphs"
REMARK = "`pytest -m gpu`, where there is a CUDA device"


def on_device(s: Subject) -> tuple[Any, Any, Tensor]:
    """A fused network twice, and an image."""
    last = torch.channels_last
    model = s.pair(dtype=torch.float32)[1].to("cuda", memory_format=last)
    return model, copy.deepcopy(model), s.image(4, torch.float32).to("cuda", memory_format=last)


@workflow("cuda-graph", "capture of a training step", GROUP, outcome=NOT_HERE, gpu=True, remark=REMARK)
def cuda_graph(s: Subject) -> None:
    model, expected, x = on_device(s)
    state = copy.deepcopy(expected.state_dict())

    def step(m: Any) -> Tensor:
        y: Tensor = m(x)
        y.square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step(model)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(model)
    model.load_state_dict(state)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, step(expected))
    same(model, expected)


@workflow(
    "graphed-callables", "torch.cuda.make_graphed_callables", GROUP, outcome=NOT_HERE, gpu=True, remark=REMARK
)
def graphed_callables(s: Subject) -> None:
    model, expected, x = on_device(s)
    state = copy.deepcopy(expected.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    model.load_state_dict(state)  # the recording trained BN's statistics
    for _ in range(2):
        x = torch.randn_like(x)
        for m in (graphed, expected):
            m.zero_grad(set_to_none=True)
            m(x).square().mean().backward()
    same(model, expected)


def same(model: Any, expected: Any) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
