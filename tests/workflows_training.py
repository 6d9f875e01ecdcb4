"""Workflows: what a training loop does, and what is frozen, averaged, recomputed or looked at."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from convert_helpers import assert_close, assert_same_step, seeded, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from workflows import HOLDS, Subject, otherwise, workflow

import fused_preact

GROUP = "Training"


@workflow("accumulation", "gradient accumulation", GROUP)
def accumulation(s: Subject) -> None:
    plain, model = s.pair()
    images = [s.image() for _ in range(3)]
    for m in (plain, model):
        for x in images:
            m(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(name, q.grad, p.grad)


@workflow("ema", "EMA by AveragedModel", GROUP)
def ema(s: Subject) -> None:
    plain, model = s.pair()
    averages = [
        AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in (plain, model)
    ]
    for seed in range(2):
        x = s.image()
        for m, average in zip((plain, model), averages, strict=True):
            step(m, (x,), lr=0.01, seed=seed + 1)
            average.update_parameters(m)
    x = s.image()
    assert_close("output", averages[1].eval()(x), averages[0].eval()(x))
    for (name, a), b in zip(averages[0].named_parameters(), averages[1].parameters(), strict=True):
        assert_close(name, b, a)


@workflow("frozen-parameters", "frozen subsets of the parameters", GROUP)
def frozen_parameters(s: Subject) -> None:
    names = [n for n, _ in s.build().named_parameters()]
    for kept in (names[len(names) // 2 :], names[::2], names[-2:]):
        plain, model = s.pair()
        for m in (plain, model):
            for name, p in m.named_parameters():
                p.requires_grad_(name in kept)
        assert_same_step(plain, model, s.image())


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@workflow("frozen-statistics", "fine-tuning with frozen statistics", GROUP)
def frozen_statistics(s: Subject) -> None:
    """All norms in evaluation, then every other one; the rest trains."""
    for every in (1, 2):
        plain, model = s.pair()
        before = [bn.running_mean.clone() for bn in norms(model)]
        for m in (plain, model):
            for bn in norms(m)[::every]:
                bn.eval()
        assert_same_step(plain, model, s.image(), steps=2, lr=0.01)
        for bn, mean in list(zip(norms(model), before, strict=True))[::every]:
            assert torch.equal(bn.running_mean, mean)


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def parametrised(s: Subject, norm: Any, after: bool) -> None:
    """On half of the convolutions, before the conversion or ``after`` it and a call."""
    plain, model = s.pair()
    if not after:
        model = copy.deepcopy(plain)
    else:
        x = s.image()
        plain(x), model(x)
    for m in (plain, model):
        torch.manual_seed(1)
        for conv in convolutions(m)[1::2]:
            norm(conv)
    model = model if after else s.fuse(model)
    model.load_state_dict(plain.state_dict())
    assert_same_step(plain, model, s.image(), steps=2, lr=0.01)


@workflow("weight-norm", "weight norm", GROUP)
def weight_norm(s: Subject) -> None:
    parametrised(s, parametrizations.weight_norm, False)
    parametrised(s, parametrizations.weight_norm, True)


@workflow("spectral-norm", "spectral norm", GROUP)
def spectral_norm(s: Subject) -> None:
    parametrised(s, parametrizations.spectral_norm, True)


@workflow(
    "gradient-penalty",
    "gradient penalty (`create_graph=True`)",
    GROUP,
    remark="the gradients come from PyTorch's own operations, made again from what the fused forward saved",
)
def gradient_penalty(s: Subject) -> None:
    for training in (True, False):
        found = []
        for m in s.pair(training):
            torch.manual_seed(0)
            x = s.image().requires_grad_()
            (dx,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
            (m(x).square().mean() + (dx.flatten(1).norm(dim=1) - 1).square().mean()).backward()
            found.append({"dx": x.grad, **{n: p.grad for n, p in m.named_parameters()}})
        largest = max(float(g.abs().max()) for g in found[0].values() if g is not None)
        for name, grad in found[0].items():
            other = found[1][name]
            assert (grad is None) == (other is None), name
            if grad is not None:
                assert float((other - grad).abs().max()) <= 1e-9 * largest, name


# --- recomputation --------------------------------------------------------------------------------------------


def fused_norms(model: nn.Module) -> set[str]:
    """The paths of the norms of fused sites."""
    rows = fused_preact.explain(model).rows
    named = {row.site.split(" -> ")[0] for row in rows if row.fused}
    return named & {name for name, _ in model.named_modules()}


def checkpointed(s: Subject, **options: Any) -> None:
    """Gradients as without; statistics of our norms updated once."""
    plain, model = s.pair()
    expected = step(plain, (s.image(),))
    plain, model = s.pair()
    x = s.image()
    expected = step(plain, (x,))
    ours = fused_norms(model)
    holder = Checkpointed(model, options)
    found = {name.removeprefix("model."): t for name, t in step(holder, (x,)).items()}
    found = {name.replace("gradient of model.", "gradient of "): t for name, t in found.items()}
    buffers = dict(model.named_buffers())
    for name, tensor in expected.items():
        counter = s.name == "timm_resnetv2_50" and name.endswith("num_batches_tracked")
        if (name not in buffers or name.rpartition(".")[0] in ours) and not counter:
            assert_close(name, found[name], tensor)
    assert ours


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.model, x, **self.options)
        assert isinstance(y, Tensor)
        return y


TIMM = {
    "timm_resnetv2_50": otherwise(
        HOLDS, "its norms count `num_batches_tracked` in their own code, twice as in plain"
    )
}
ONCE = "running statistics of fused norms are updated once, as without; PyTorch's own modules count a batch twice"


@workflow("checkpoint-reentrant", "activation checkpointing, reentrant", GROUP, remark=ONCE, but=TIMM)
def checkpoint_reentrant(s: Subject) -> None:
    checkpointed(s, use_reentrant=True)


@workflow("checkpoint", "activation checkpointing, not reentrant", GROUP, but=TIMM)
def checkpoint_not_reentrant(s: Subject) -> None:
    checkpointed(s, use_reentrant=False)


@workflow("checkpoint-selective", "selective checkpointing, our convolutions saved", GROUP, but=TIMM)
def checkpoint_selective(s: Subject) -> None:
    seen: set[str] = set()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.add(str(op))
        saved = str(op).startswith("fused_preact.conv_fprop")
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    checkpointed(s, use_reentrant=False, context_fn=contexts)
    assert "fused_preact.conv_fprop.default" in seen


# --- modes ----------------------------------------------------------------------------------------------------


@workflow("deterministic", "deterministic mode, two runs of the same bits", GROUP)
def deterministic(s: Subject) -> None:
    plain, model = s.pair()
    twin = copy.deepcopy(model)
    torch.use_deterministic_algorithms(True)
    try:
        x = s.image()
        first, second = step(model, (x,)), step(twin, (x,))
        assert_same_step(plain, s.fuse(copy.deepcopy(plain)), x)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in first.items():
        other = second[name]
        assert (tensor is None) == (other is None)
        assert tensor is None or other is None or torch.equal(tensor, other), name


@workflow("anomaly", "anomaly mode: a NaN is found, and nothing else", GROUP)
def anomaly(s: Subject) -> None:
    plain, model = s.pair()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_step(plain, model, s.image())
        with torch.no_grad():
            convolutions(model)[0].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index]
        with pytest.raises(RuntimeError, match="returned nan values"):
            model(s.image()).sum().backward()


@workflow("profiler", "the profiler shows our operations", GROUP)
def profiler(s: Subject) -> None:
    model = s.pair(dtype=torch.float32)[1]
    x = s.image(dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    for name in ("fused_preact::conv_fprop", "fused_preact::bn_scale_shift", "UnitFunctionBackward"):
        assert any(name in found for found in names), name


@workflow("hooks", "hooks on the network, blocks and norms", GROUP)
def hooks(s: Subject) -> None:
    """Forward and backward hooks hear what they hear in the plain network, and may replace outputs."""
    plain, model = s.pair()
    heard: list[list[tuple[str, tuple[int, ...]]]] = []
    for m in (plain, model):
        m(s.image())  # traced before there are hooks
        mine: list[tuple[str, tuple[int, ...]]] = []
        heard.append(mine)
        blocks = [(n, c) for n, c in m.named_modules() if n and len(list(c.children())) > 2]
        norm = next((n, c) for n, c in m.named_modules() if isinstance(c, nn.BatchNorm2d))
        for name, child in (("", m), blocks[len(blocks) // 2], norm):
            child.register_forward_hook(
                lambda _, args, y, name=name, mine=mine: mine.append((name, tuple(y.shape)))
            )
            if child is not norm[1]:  # (before a ReLU in place PyTorch itself refuses them)
                child.register_full_backward_hook(
                    lambda _, dx, dy, name=name, mine=mine: mine.append((f"d{name}", tuple(dy[0].shape)))
                )
        blocks[-1][1].register_forward_hook(lambda _, args, y: y * 1.5)
    plain.load_state_dict(model.state_dict())
    assert_same_step(plain, model, s.image())
    assert heard[0] == heard[1]
    assert len(heard[0]) == 5


@workflow("inference-mode", "inference mode and no_grad", GROUP)
def inference_mode(s: Subject) -> None:
    plain, model = s.pair(training=False)
    x = s.image()
    expected = plain(x)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            y = model(x)
        assert not y.requires_grad
        assert_close("output", y, expected)
    seeded()
    assert_same_step(plain, model, x)
