"""Workflows: copies, files, devices without data, threads and processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from typing import Any

import torch
from convert_helpers import assert_close, assert_same_step
from torch import nn
from workflows import HOLDS, NOT_FUSED, Subject, otherwise, workflow

import fused_preact

GROUP = "Copies, files, threads, processes"


def independent(s: Subject, make: Any) -> None:
    """What ``make`` gives is fused, and nothing of the original's."""
    plain, model = s.pair()
    x = s.image()
    plain(x), model(x)
    twin = make(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert_same_step(plain, twin, s.image(), steps=2, lr=0.01)
    assert all(p.grad is None for p in model.parameters())
    assert fused_preact.explain(twin).fused


@workflow("deepcopy", "copy.deepcopy", GROUP)
def deepcopy(s: Subject) -> None:
    independent(s, copy.deepcopy)


@workflow("pickle", "pickle", GROUP)
def pickled(s: Subject) -> None:
    independent(s, lambda model: pickle.loads(pickle.dumps(model)))


def _through_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@workflow("save-load", "torch.save and torch.load of the model", GROUP)
def save_load(s: Subject) -> None:
    independent(s, _through_file)


@workflow("state-dict", "state dicts between plain and fused", GROUP)
def state_dict(s: Subject) -> None:
    """Both ways, by a file, weights only."""
    for direction in (1, -1):
        source, target = s.pair()[::direction]
        assert list(source.state_dict()) == list(target.state_dict())
        with torch.no_grad():
            for p in source.parameters():
                p.mul_(0.9)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        assert_same_step(*(source, target)[::direction], s.image())


@workflow("meta-device", "meta device, then `load_state_dict(assign=True)`", GROUP)
def meta_device(s: Subject) -> None:
    plain = s.build().double()
    for before in (True, False):
        with torch.device("meta"):
            model: Any = copy.deepcopy(plain).to("meta")
        state = copy.deepcopy(plain.state_dict())
        if before:
            model = s.fuse(model)
            model.load_state_dict(state, assign=True)
        else:
            model.load_state_dict(state, assign=True)
            model = s.fuse(model)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert_same_step(copy.deepcopy(plain), model, s.image())


@workflow(
    "shallow-copy",
    "copies that share attributes: copy.copy, replicas of nn.DataParallel",
    GROUP,
    outcome=NOT_FUSED,
    remark="a forward that `fuse` made serves its own module only; the units of `fused_preact` do not mind",
    but={"own": otherwise(HOLDS, "")},
)
def shallow_copy(s: Subject) -> None:
    """It runs with what it holds, not with what the original does."""
    plain, model = s.pair(training=False)
    x = s.image()
    found = []
    with torch.no_grad():
        for m in (plain, model):
            twin = replica(m)
            found.append(twin(x))
    assert_close("output", found[1], found[0])
    assert (found[0] - plain(x)).abs().max() > 1e-3


def replica(model: nn.Module) -> Any:
    """As ``nn.DataParallel`` makes it, with other parameters."""
    twins: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, parameter.detach() * 0.8)  # no parameters, as they are no leaves
        for name, buffer in module._buffers.items():
            twin._buffers[name] = None if buffer is None else buffer.clone()
    return twins[model]


@workflow("threads", "several Python threads", GROUP)
def threads(s: Subject) -> None:
    """One network, and its first call, which traces, from all at once; with backward."""
    plain, model = s.pair(training=False)
    images = [s.image() for _ in range(4)]
    results: list[Any] = [None] * len(images)

    def work(i: int) -> None:
        try:
            x = images[i].clone().requires_grad_()
            y = model(x)
            results[i] = y.detach(), torch.autograd.grad(y.square().sum(), x)[0]
        except Exception as error:
            results[i] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for x, result in zip(images, results, strict=True):
        assert isinstance(result, tuple), result
        x.requires_grad_()
        y = plain(x)
        assert_close("output", result[0], y.detach())
        assert_close("dx", result[1], torch.autograd.grad(y.square().sum(), x)[0])


@workflow("fork", "fork after the first use, one thread in the child", GROUP)
def fork(s: Subject) -> None:
    """As in a worker of a DataLoader: forward, in both modes."""
    model = s.pair(dtype=torch.float32)[1]
    x = s.image(dtype=torch.float32)
    with torch.no_grad():
        model(x)
        twin = copy.deepcopy(model)
        expected = [model.train(training)(x) for training in (True, False)]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                found = [twin.train(training)(x) for training in (True, False)]
            status = 0 if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "1: an error, 2: other numbers"
