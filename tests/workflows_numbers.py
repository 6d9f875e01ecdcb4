"""Workflows: dtypes, formats and batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from convert_helpers import assert_close, assert_same_step
from helpers import assert_within_policy
from torch import Tensor
from workflows import NOT, Subject, otherwise, workflow

from fused_preact import ops

GROUP = "Dtypes, formats, batches"


def trained(subject: Subject, dtype: torch.dtype, cast: torch.dtype | None) -> None:
    """Output and gradients of a training step, the output within the policy of float64; ``cast``: by autocast."""
    plain, model = subject.pair(dtype=dtype)
    exact = copy.deepcopy(plain).double()
    x = subject.image(4).to(dtype)
    outputs: list[Tensor] = []
    for m in (plain, model):
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            y = m(x)
        y.float().square().mean().backward()
        outputs.append(y)
    assert outputs[0].dtype == outputs[1].dtype
    oracle = exact(x.double())
    oracle.square().mean().backward()
    # The compiled kernels compute in float32 what PyTorch rounds between its operations.
    compiled = ops.serving_backend(x.to(cast or dtype)) == "cpu"
    assert_within_policy("output", outputs[1], outputs[0], oracle, ulps=8, compiled=compiled)
    grads = []
    for m in (model, exact):
        assert [p.grad is None for p in m.parameters()] == [p.grad is None for p in plain.parameters()]
        grads.append(torch.cat([p.grad.double().flatten() for p in m.parameters() if p.grad is not None]))
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    # Rounding turns ReLUs, and each changes the gradients of all layers before: here and in eager by up to a third.
    assert (grads[0] - grads[1]).norm() <= 0.5 * grads[1].norm()


@workflow("autocast-bf16", "autocast, bfloat16", GROUP)
def autocast_bf16(s: Subject) -> None:
    trained(s, torch.float32, torch.bfloat16)


@workflow("bf16", "pure bfloat16", GROUP)
def bf16(s: Subject) -> None:
    trained(s, torch.bfloat16, None)


@workflow("fp16", "pure float16", GROUP)
def fp16(s: Subject) -> None:
    trained(s, torch.float16, None)


@workflow("fp64", "float64, training and evaluation", GROUP)
def fp64(s: Subject) -> None:
    for training in (True, False):
        assert_same_step(*s.pair(training), s.image(), steps=2, lr=0.01)


@workflow("autocast-fp16-scaler", "autocast, float16, with GradScaler", GROUP)
def autocast_fp16(s: Subject) -> None:
    """Two steps; the second overflows in both, and is left out by both."""
    plain, model = s.pair(dtype=torch.float32)
    x = s.image(2, torch.float32)
    states: list[Any] = []
    for m in (plain, model):
        optimiser, scaler = torch.optim.SGD(m.parameters(), 0.05), torch.amp.GradScaler("cpu", 2.0**10)
        before = [p.detach().clone() for p in m.parameters()]
        moved, scales = [], []
        for factor in (1.0, 1e30):
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = m(x).float().square().mean()
            scaler.scale(loss * factor).backward()
            scaler.step(optimiser)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append([(p.detach() - b).clone() for p, b in zip(m.parameters(), before, strict=True)])
        assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True)), "an overflow moved something"
        states.append((scales, moved[0]))
    assert states[0][0] == states[1][0]
    whole = [torch.cat([t.flatten() for t in moved]) for _, moved in states]
    assert whole[0].norm() > 0
    assert (whole[0] - whole[1]).norm() <= 0.5 * whole[0].norm()  # as above


@workflow("channels-last", "channels_last", GROUP)
def channels_last(s: Subject) -> None:
    formatted(s, torch.channels_last)


@workflow("nchw", "NCHW", GROUP)
def nchw(s: Subject) -> None:
    formatted(s, torch.contiguous_format)


def formatted(s: Subject, memory_format: torch.memory_format) -> None:
    """By the kernels: eager's numbers, by the policy."""
    plain, model = (m.to(memory_format=memory_format) for m in s.pair(dtype=torch.float32))
    exact = copy.deepcopy(plain).double()
    x = s.image(4, torch.float32).contiguous(memory_format=memory_format)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, x)]
    outputs = [m(leaf) for m, leaf in zip((plain, model), leaves, strict=True)]
    assert_within_policy("output", outputs[1], outputs[0], exact(x.double()), ulps=8)
    for y in outputs:
        y.sum().backward()
    assert leaves[1].grad is not None
    assert leaves[1].grad.shape == x.shape
    for (name, a), b, c in zip(model.named_buffers(), plain.buffers(), exact.buffers(), strict=True):
        if a.is_floating_point():
            assert_within_policy(name, a, b, c)


@workflow("batch-of-one-eval", "a batch of one, in evaluation", GROUP)
def batch_of_one(s: Subject) -> None:
    plain, model = s.pair(training=False)
    assert_same_step(plain, model, s.image(1))
    images = s.image(3)
    with torch.no_grad():
        together = model(images)
        for i in range(3):
            assert_close("output", model(images[i : i + 1]), together[i : i + 1])


REFUSED = "`view(0, -1)` in its own code, which plain PyTorch refuses too: the same error"


@workflow(
    "empty-batch",
    "an empty batch, training and evaluation",
    GROUP,
    but={name: otherwise(NOT, REFUSED) for name in ("kuangliu_18", "densenet_cifar")},
)
def empty_batch(s: Subject) -> None:
    for training in (True, False):
        plain, model = s.pair(training)
        if s.name in ("kuangliu_18", "densenet_cifar"):
            said = []
            for m in (plain, model):
                with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements") as refused:
                    m(s.image(0))
                said.append(str(refused.value))
            assert said[0] == said[1]
        else:
            assert_same_step(plain, model, s.image(0))
