"""What ``op`` and ``unit`` share: one module against its peers on inputs rotated past the cache."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_preact
from fused_preact import functional
from fused_preact.functional import BatchNorm, Convolution, Statistics

from . import correct, measure, networks, results
from .counting import Ceilings, Kernel
from .measure import Candidate
from .networks import CHANNELS_LAST, BareConv
from .options import Setting
from .results import Row

BASE = "eager channels_last"
OURS = ("fused", "fused alone")


class Input(NamedTuple):
    """One set of tensors to run on; sets are rotated."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    statistics: Statistics


@dataclass
class Case:
    """One site or unit to measure."""

    name: str
    count: int
    module: nn.Module
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    adds: bool
    convs: list[BareConv]
    kernels: Callable[[str], list[Kernel]]
    """Schedule -> what it moves and computes."""


class Subject(NamedTuple):
    """A way to run a plain module's parameters."""

    name: str
    run: Callable[[nn.Module], Callable[[Input], Tensor]]
    """Module -> a function of an input; made once, so that compilation is not timed."""
    memory_format: torch.memory_format
    schedule: str


def _eager(module: nn.Module) -> Callable[[Input], Tensor]:
    return lambda i: correct.plain(module, i.x, i.residual)


def _compiled(**options: Any) -> Callable[[nn.Module], Callable[[Input], Tensor]]:
    def make(module: nn.Module) -> Callable[[Input], Tensor]:
        torch._dynamo.reset()  # its limit of recompilations counts over the cases otherwise
        return _eager(torch.compile(module, dynamic=False, **options))

    return make


def _fused(inside: bool) -> Callable[[nn.Module], Callable[[Input], Tensor]]:
    """``inside``: as in a network, taking the statistics of x and handing on those of y; else as called alone."""

    def make(module: nn.Module) -> Callable[[Input], Tensor]:
        module.fused = True
        if not inside:
            return _eager(module)
        if isinstance(module, fused_preact.PreActConv2d):
            return lambda i: functional._unit(
                i.x,
                [(BatchNorm.of(module.bn), Convolution.of(module.conv))],
                None,
                False,
                i.residual,
                i.statistics,
                True,
            )[0]
        unit: Any = module
        return lambda i: unit.forward_with_statistics(i.x, i.statistics, True)[0]

    return make


def subjects(setting: Setting) -> list[Subject]:
    """The candidates that were asked for; the base is always among them."""
    found = [
        Subject(BASE, _eager, CHANNELS_LAST, "eager"),
        Subject("eager nchw", _eager, torch.contiguous_format, "eager"),
        Subject("compile", _compiled(), CHANNELS_LAST, "pointwise"),
    ]
    if setting.device == "cuda":
        tuned = _compiled(mode="max-autotune-no-cudagraphs")
        found.append(Subject("max-autotune", tuned, CHANNELS_LAST, "pointwise"))
    found += [Subject(name, _fused(name == "fused"), CHANNELS_LAST, "c1") for name in OURS]
    return [s for s in found if s.name == BASE or setting.wants(s.name)]


def _statistics(x: Tensor) -> Statistics:
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return Statistics(mean, var)


def _inputs(case: Case, setting: Setting, memory_format: torch.memory_format) -> list[Input]:
    dtype, device = setting.torch_dtype, setting.torch_device

    def made(shape: tuple[int, ...], grad: bool) -> Tensor:
        t = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
        return t.requires_grad_(grad)

    item = setting.torch_dtype.itemsize
    sizes = [torch.Size(s).numel() * item for s in (case.in_shape, case.out_shape)]
    copies = measure.copies_past_cache(sizes[0] + sizes[1] * (2 if case.adds else 1), device, most=32)
    x, dy = made(case.in_shape, True), made(case.out_shape, False)
    first = Input(x, made(case.out_shape, True) if case.adds else None, dy, _statistics(x))

    def again(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(t.requires_grad)

    # Other memory with the same values: drawing half a gigabyte of them takes longer than what is measured.
    others = [
        Input(
            again(x), None if first.residual is None else again(first.residual), again(dy), first.statistics
        )
        for _ in range(copies - 1)
    ]
    return [first, *others]


def _candidate(
    name: str, run: Callable[[Input], Tensor], module: nn.Module, inputs: list[Input]
) -> Candidate:
    parameters = list(module.parameters())

    def forward(i: int) -> Tensor:
        return run(inputs[i % len(inputs)])

    def backward(i: int, y: Tensor) -> None:
        chosen = inputs[i % len(inputs)]
        leaves = [chosen.x, *parameters, *([chosen.residual] if chosen.residual is not None else [])]
        torch.autograd.grad(y, leaves, chosen.dy)

    return Candidate(name, forward, backward)


def candidate_of(
    case: Case, subject: Subject, setting: Setting, inputs: list[Input] | None = None
) -> Candidate:
    """A candidate with its own copy of the module; ``inputs`` made here where none are given to share."""
    module = copy.deepcopy(case.module).to(
        device=setting.torch_device, dtype=setting.torch_dtype, memory_format=subject.memory_format
    )
    inputs = _inputs(case, setting, subject.memory_format) if inputs is None else inputs
    return _candidate(subject.name, subject.run(module), module, inputs)


def problems(case: Case, setting: Setting, batch: int = 4) -> dict[str, str]:
    """What is wrong with each candidate on a small batch: "REFUSED ..." for a wrong result, "ERROR ..." for none."""
    batch = min(batch, case.in_shape[0])
    device = setting.torch_device
    module = copy.deepcopy(case.module).to(device=device, memory_format=CHANNELS_LAST)
    adds = (batch, *case.out_shape[1:]) if case.adds else None
    reference = correct.Reference(module, (batch, *case.in_shape[1:]), adds, setting.torch_dtype)
    wrong = {}
    for subject in subjects(setting):
        factor = correct.OURS if subject.name in OURS else correct.PEER

        def run(m: nn.Module, x: Tensor, r: Tensor | None, subject: Subject = subject) -> Tensor:
            x = x.contiguous(memory_format=subject.memory_format)
            r = None if r is None else r.contiguous(memory_format=subject.memory_format)
            return subject.run(m.to(memory_format=subject.memory_format))(Input(x, r, x, _statistics(x)))

        try:
            with fused_preact.backend(setting.backend):
                found = reference.problem(run, factor)
        except Exception as error:  # a peer that cannot run is a row, not the end
            wrong[subject.name] = f"ERROR {measure.one_line(error)}"
            if subject.name in OURS:
                traceback.print_exc()
        else:
            if found:
                wrong[subject.name] = f"REFUSED {found}"
    return wrong


def measure_case(case: Case, setting: Setting, model: str, top: Ceilings, seconds: float) -> list[Row]:
    """Check every candidate, then time those that are right, in turns."""
    wrong = problems(case, setting)
    device, dtype, batch = setting.torch_device, setting.torch_dtype, case.in_shape[0]
    candidates, schedules = [], {"bare convolutions": "conv"}
    inputs: dict[torch.memory_format, list[Input]] = {}
    for subject in subjects(setting):
        schedules[subject.name] = subject.schedule
        if subject.name in wrong:
            continue
        if subject.memory_format not in inputs:
            inputs[subject.memory_format] = _inputs(case, setting, subject.memory_format)
        rotated = inputs[subject.memory_format]
        candidates.append(candidate_of(case, subject, setting, rotated))
    copies = len(next(iter(inputs.values()), [0]))
    bare = networks.bare_candidate("bare convolutions", case.convs, batch, dtype, device, copies)
    with fused_preact.backend(setting.backend):
        measured = measure.interleave([*candidates, bare], device, seconds)
        serving = fused_preact.serving_backend(torch.empty(1, device=device, dtype=dtype))
    wrong.update({name: f"ERROR {error}" for name, error in measured.errors.items()})
    rows = []
    for name, schedule in schedules.items():
        for phase in measure.PHASES:
            row = setting.row(
                model, batch, case=case.name, count=str(case.count), candidate=name, phase=phase
            )
            row.backend = serving if name in OURS else ""
            if name in wrong:
                row.status = wrong[name]
                rows.append(row)
                break
            fill(row, measured, phase, BASE)
            kernels = [k for k in case.kernels(schedule) if phase in ("both", k.phase)]
            row.floor_ms = results.number(top.ms(kernels))
            row.bytes = results.number(sum(k.bytes for k in kernels))
            row.flops = results.number(sum(k.flops for k in kernels))
            rows.append(row)
    return rows


def fill(row: Row, measured: measure.Measured, phase: str, base: str) -> None:
    """Write a candidate's times and its speed-up over the base into a row."""
    samples = measured.samples
    times = samples[row.candidate].phase(phase)
    row.note = measured.notes.get(row.candidate, "")
    row.others = "" if measured.others is None else f"{measured.others:.2f}"
    middle = measure.spread(times)
    row.rounds = str(len(times))
    row.p20, row.p50, row.p80 = (results.number(v) for v in middle)
    row.samples = " ".join(f"{t:.4g}" for t in times)
    # A base without this phase (inference has no backward), or with fewer rounds, gives no ratio.
    if base in samples and len(samples[base].phase(phase)) >= len(times):
        row.base = base
        faster = measure.speedup(samples[base].phase(phase), times)
        row.speedup_p20, row.speedup_p50, row.speedup_p80 = (results.number(v) for v in faster)


def run_cases(cases: dict[str, list[Case]], setting: Setting, top: Ceilings) -> int:
    """Measure every case, keeping each one's rows as soon as they are there; 1 where one was wrong."""
    total, done, status = sum(map(len, cases.values())), 0, 0
    for model, found in cases.items():
        for case in found:
            rows = measure_case(case, setting, model, top, setting.share(done, total))
            setting.finish(rows)
            done += 1
            status |= failed(rows)
    return status


def failed(rows: list[Row]) -> int:
    """1 where a result was wrong or one of our own rows failed; a peer's error is only a row."""
    ours = [r for r in rows if r.candidate.startswith("fused")]
    return int(any(r.status.startswith("REFUSED") for r in rows) or any(r.status != "ok" for r in ours))
