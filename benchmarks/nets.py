"""What ``step`` and ``infer`` share: whole networks, checked first and then timed in turns."""

from __future__ import annotations

import contextlib
import copy
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_preact
from fused_preact.modules import _PreActUnit

from . import correct, counting, kinds, measure, micro, networks, peers, results, roofline
from .measure import Candidate
from .options import Setting
from .peers import BASE, OURS, Peer
from .results import Row

BARE = "bare convolutions"


def fuse(net: nn.Module, fused: bool) -> None:
    """Switch our modules between fused and plain; the parameters are the same."""
    for module in net.modules():
        if isinstance(module, (_PreActUnit, fused_preact.models.PreActResNet)):
            module.fused = fused


def autocast(setting: Setting) -> Any:
    """Low-precision training as users do it: float32 weights under autocast."""
    if setting.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(setting.device, setting.torch_dtype)


class Training:
    """Training steps: cross-entropy, backward, SGD with momentum."""

    phases = measure.PHASES

    def __init__(self, model: str, batch: int, setting: Setting) -> None:
        self.model, self.batch, self.setting = model, batch, setting
        self.net = networks.create(model).to(setting.torch_device)
        size = networks.image_size(model)
        self.images = torch.randn(batch, 3, size, size, device=setting.torch_device)
        self.labels = torch.randint(networks.classes(model), (batch,), device=setting.torch_device)
        self.net.train()
        with torch.no_grad():
            wide = copy.deepcopy(self.net).double()
            # In float64 every activation counts twice; the batch is the whole one, since BN couples its images.
            self.oracle = wide(self.images.double())

    def peers(self) -> list[Peer]:
        """The candidates."""
        return peers.training(self.setting)

    def prepare(self, peer: Peer, eager: list[Tensor]) -> tuple[Candidate, str | None]:
        """The peer's candidate, and what is wrong with its logits in training mode."""
        net = copy.deepcopy(self.net).to(memory_format=peer.memory_format)
        fuse(net, peer.ours)
        images = self.images.contiguous(memory_format=peer.memory_format)
        function = peer.prepare(net, images, self.setting)
        optimiser = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, foreach=True)

        def forward(i: int) -> Tensor:
            with autocast(self.setting):
                return F.cross_entropy(function(images), self.labels)

        def backward(i: int, loss: Tensor) -> None:
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        with peer.context(), autocast(self.setting):
            logits = function(images).detach().double().clone()
        if peer.name == BASE:
            eager.append(logits)
        factor = correct.OURS if peer.ours else correct.PEER
        wrong = _logits_problem(logits, eager[0], self.oracle, self.setting.torch_dtype, factor)
        if wrong is None and peer.name == OURS:
            wrong = correct.units_problem(
                self.model, self.setting.torch_dtype, self.setting.torch_device, _run_fused
            )
        return Candidate(peer.name, forward, backward, peer.context), wrong

    def bare(self) -> Candidate:
        """The convolutions alone."""
        convs = networks.network_convs(self.model)
        return networks.bare_candidate(
            BARE, convs, self.batch, self.setting.torch_dtype, self.setting.torch_device
        )

    def kernels(self, schedule: str) -> list[counting.Kernel]:
        """What a schedule moves and computes."""
        return counting.network_kernels(self.model, self.batch, self.setting.torch_dtype.itemsize, schedule)


class Inference:
    """Forward passes in eval mode without gradients."""

    phases = ("forward",)

    def __init__(self, model: str, batch: int, setting: Setting) -> None:
        self.model, self.batch, self.setting = model, batch, setting
        device, dtype = setting.torch_device, setting.torch_dtype
        size = networks.image_size(model)
        self.images = torch.randn(batch, 3, size, size, device=device)
        net = networks.create(model).to(device)
        correct.settle(net, self.images[: min(batch, 16)])
        self.net, self.images = net.to(dtype), self.images.to(dtype)
        with torch.no_grad():
            self.oracle = copy.deepcopy(self.net).double()(self.images.double())

    def peers(self) -> list[Peer]:
        """The candidates."""
        return peers.inference(self.setting)

    def prepare(self, peer: Peer, eager: list[Tensor]) -> tuple[Candidate, str | None]:
        """The peer's candidate, and what is wrong with its logits."""
        net = copy.deepcopy(self.net).to(memory_format=peer.memory_format)
        fuse(net, peer.ours)
        images = self.images.contiguous(memory_format=peer.memory_format)
        function = peer.prepare(net, images, self.setting)

        def forward(i: int) -> Tensor:
            with torch.no_grad():
                return function(images)

        with peer.context():
            logits = forward(0).double().clone()
        if peer.name == BASE:
            eager.append(logits)
        factor = correct.OURS if peer.ours else correct.PEER
        dtype = self.setting.torch_dtype
        wrong = _logits_problem(logits, eager[0], self.oracle, dtype, factor)
        return Candidate(peer.name, forward, None, peer.context), wrong

    def bare(self) -> Candidate:
        """The convolutions alone."""
        convs = networks.network_convs(self.model)
        device, dtype = self.setting.torch_device, self.setting.torch_dtype
        return networks.bare_candidate(BARE, convs, self.batch, dtype, device, backward=False)

    def kernels(self, schedule: str) -> list[counting.Kernel]:
        """What a schedule moves and computes."""
        return counting.inference_kernels(self.model, self.batch, self.setting.torch_dtype.itemsize, schedule)


def _run_fused(module: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    fuse(module, True)
    return module(x)


def _logits_problem(
    actual: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, factor: float
) -> str | None:
    """What is wrong with a network's logits, or None: errors as root mean squares, against the float64 network."""
    if actual.shape != oracle.shape or not actual.isfinite().all():
        return f"logits: shape {tuple(actual.shape)}, or values that are not finite"

    def rms(t: Tensor) -> float:
        return float(t.square().mean().sqrt())

    allowed = factor * (rms(eager - oracle) + 4 * torch.finfo(dtype).eps * rms(oracle))
    error = rms(actual - oracle)
    return None if error <= allowed else f"logits: error {error:.2e} where {allowed:.2e} is allowed"


def run(work: Callable[[str, int, Setting], Any], setting: Setting, profile: bool) -> int:
    """Measure every network; 1 where a result was wrong."""
    top = roofline.ceilings(setting.torch_device, setting.torch_dtype)
    status = 0
    for done, model in enumerate(setting.models):
        for rows in _network(work, model, setting, top, done, profile):
            setting.finish(rows)
            status |= micro.failed(rows)
    return status


def _network(
    work: Callable[[str, int, Setting], Any],
    model: str,
    setting: Setting,
    top: counting.Ceilings,
    done: int,
    profile: bool,
) -> Iterator[list[Row]]:
    """The rows of one network, in portions that are worth keeping before the next is there."""
    batch = setting.batch_for(model)
    deadline = setting.share(done, len(setting.models))
    begun = measure.now()
    job = work(model, batch, setting)
    ready: list[Candidate] = []
    rows: list[Row] = []
    eager: list[Tensor] = []
    schedules = {BARE: "conv"}
    torch._dynamo.reset()
    with fused_preact.backend(setting.backend):
        serving = fused_preact.serving_backend(job.images)
        for peer in job.peers():
            schedules[peer.name] = peer.schedule
            status = peers.missing(peer)
            if status is None:
                setting.say(f"{model}: preparing {peer.name}")
                try:
                    candidate, wrong = job.prepare(peer, eager)
                except Exception as error:  # a peer that fails is a row, not the end
                    status = f"ERROR {measure.one_line(error)}"
                else:
                    status = f"REFUSED {wrong}" if wrong else None
                    if status is None:
                        ready.append(candidate)
            if status:
                rows.append(_row(setting, model, batch, peer.name, job.phases[-1], status=status))
        candidates = [*ready, job.bare()]
        seconds = max(0.0, deadline - (measure.now() - begun))
        measured = measure.interleave(
            candidates, setting.torch_device, seconds, min_rounds=3, slow_s=setting.slow
        )
        for name, error in measured.errors.items():
            rows.append(_row(setting, model, batch, name, job.phases[-1], status=f"ERROR {error}"))
        for name in measured.samples:
            kernels = job.kernels(schedules[name])
            for phase in job.phases:
                row = _row(
                    setting, model, batch, name, phase, backend=serving if name.startswith(OURS) else ""
                )
                micro.fill(row, measured, phase, BASE)
                chosen = [k for k in kernels if phase in ("both", k.phase)]
                row.floor_ms = results.number(top.ms(chosen))
                row.bytes = results.number(sum(k.bytes for k in chosen))
                row.flops = results.number(sum(k.flops for k in chosen))
                rows.append(row)
        yield rows
        if profile:
            # Not of those that are too slow: one more of their steps would cost more than it tells.
            profiled = [c for c in ready if c.name in measured.samples and c.name not in measured.notes]
            yield [row for c in profiled for row in _extras(setting, model, batch, c)]


def _extras(setting: Setting, model: str, batch: int, candidate: Candidate) -> list[Row]:
    """Peak memory (on a GPU) or page faults (on a CPU), and the time by kind of work, each from one more step."""
    rows = []
    if setting.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kinds.call(candidate)
        row = _row(setting, model, batch, candidate.name, "peak")
        row.value, row.unit = results.number(torch.cuda.max_memory_allocated() - before), "B"
        rows.append(row)
    else:
        before_step = resource.getrusage(resource.RUSAGE_SELF)
        kinds.call(candidate)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        faults, seconds = usage.ru_minflt - before_step.ru_minflt, usage.ru_stime - before_step.ru_stime
        for phase, value, unit in (("faults", faults, "page faults"), ("kernel time", seconds, "s")):
            row = _row(setting, model, batch, candidate.name, phase)
            row.value, row.unit = results.number(value), unit
            rows.append(row)
    for kind, ms in kinds.by_kind(candidate, setting.torch_device).items():
        row = _row(setting, model, batch, candidate.name, f"kind:{kind}")
        row.value, row.unit = results.number(ms), "ms"
        rows.append(row)
    return rows


def _row(setting: Setting, model: str, batch: int, name: str, phase: str, **columns: str) -> Row:
    return setting.row(model, batch, case="network", candidate=name, phase=phase, **columns)
