"""The tuning loop: rank, compile, check, time, choose, write; one problem after the other, each kept at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..kernels.triton import bn_backward_apply, tables
from ..kernels.triton.choose import Problem, forced, own_config, reload
from ..kernels.triton.common import Device
from ..kernels.triton.configs import ConvConfig
from ..kernels.triton.cost import candidates, fits, predict
from ..kernels.triton.crosscompile import Resources
from .compiling import Compiler
from .timing import Runner, Timer
from .trial import Inputs, Oracle, eager_runner, make_inputs, run

__all__ = ["Outcome", "Tuner", "trials_path"]

Job = tuple[ConvConfig, "Future[Resources] | None"]
"""A configuration and its compilation; None in the interpreter."""
Way = tuple[str, "ConvConfig | None"]
"""What :func:`choose.forced` takes."""
SPLIT, EAGER, APPLY = "split", "eager", "bn_backward_apply"


@dataclass
class Outcome:
    """What became of one problem; times in milliseconds."""

    key: str
    entry: dict[str, Any] | None
    """What was written to the table; None where nothing right could be timed."""
    eager_ms: float | None
    apply_ms: float = 0.0
    """The pass that eager's dgrad contains and ours does not."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Candidates that are not right, with the reason; they were not timed."""

    @property
    def slower(self) -> bool:
        """Whether even the best path loses to eager PyTorch, which keeps twice the memory."""
        if self.entry is None or self.eager_ms is None:
            return False
        return self.entry["ms"] + self.apply_ms > self.eager_ms


def trials_path(table: Path) -> Path:
    """Where every candidate's prediction and time goes, one JSON object a line, beside the table."""
    return table.with_suffix(".trials.jsonl")


def name_of(config: ConvConfig) -> str:
    """Such as "128x64x64 w8 s3"."""
    splits = f" k{config.splits}" if config.splits else ""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile} w{config.num_warps} s{config.num_stages}{splits}"


@dataclass
class Tuner:
    """Tunes problems on one device and writes to one table."""

    device: Device
    where: torch.device
    table: Path
    timer: Timer
    limit: int = 12
    """Configurations that are timed for one problem."""
    say: Callable[[str], None] = print
    finished: bool = False
    """Whether the last run came to its end before its time was up."""

    def run(self, problems: Iterable[Problem], seconds: float, again: bool = False) -> list[Outcome]:
        """Tune what the table does not have yet, until the time is up; the table is complete after each problem.

        Raises ValueError for a table that cannot be read: it is not overwritten.
        """
        entries = tables.read(self.table, self.device.name)
        wanted = [p for p in problems if again or p.key not in entries]
        compiler = Compiler(self.device)
        outcomes: list[Outcome] = []
        end = time.monotonic() + seconds
        try:
            ranked = [self._ranked(problem) for problem in wanted]
            # All of them at once: the pool compiles the next problems while this process times the first.
            compiled = [
                [(c, compiler.submit(problem, c)) for c in configs]
                for problem, configs in zip(wanted, ranked, strict=True)
            ]
            for index, (problem, jobs) in enumerate(zip(wanted, compiled, strict=True)):
                left = end - time.monotonic()
                if left <= 0:
                    self.say(f"time is up: {len(wanted) - index} problems left, run the command again")
                    break
                outcome = self._problem(problem, jobs, left / (len(wanted) - index) / 2)
                if outcome.entry is not None:
                    entries[problem.key] = outcome.entry
                    tables.write(self.table, self.device.name, entries)
                outcomes.append(outcome)
                self.say(f"[{index + 1}/{len(wanted)}] {self._line(outcome)}")
        finally:
            compiler.close()
            reload()
        self.finished = len(outcomes) == len(wanted)
        return outcomes

    def _ranked(self, problem: Problem) -> list[ConvConfig]:
        """Half as many again as are timed, by the estimated cost, and the heuristic's own; none for "apply"."""
        if problem.op == "apply":
            return []
        own = own_config(problem, self.device)
        first = candidates(problem, self.device)[: self.limit + self.limit // 2]
        return [own, *(c for c in first if c != own)]

    def _problem(self, problem: Problem, jobs: list[Job], seconds: float) -> Outcome:
        """Everything for one problem; ``jobs`` begin with the heuristic's configuration, "apply" has none."""
        wrong: dict[str, str] = {}
        if problem.op == "apply":
            reload()  # its dgrad and wgrad have just been tuned
            ways: dict[str, Way] = {name: (name, None) for name in ("loaded", "stored")}
            self._check(problem, ways, wrong)
            return self._outcome(problem, ways, self.timer(self._runners(problem, ways), seconds), wrong)
        predicted = self._predicted(problem, jobs, wrong)
        own = name_of(jobs[0][0])
        kept = sorted(predicted, key=lambda config: predicted[config])[: self.limit]
        paths: dict[str, Way] = {name_of(config): ("fused", config) for config in kept}
        if jobs[0][0] in predicted:
            paths.setdefault(own, ("fused", jobs[0][0]))
        paths[SPLIT] = ("split", None)
        self._check(problem, paths, wrong)
        times = self.timer(self._runners(problem, paths), seconds)
        microseconds = {name_of(config): round(us, 2) for config, us in predicted.items()}
        self._keep(
            {
                "key": problem.key,
                "name": name,
                "predicted_us": microseconds.get(name),
                "ms": times.get(name),
                "wrong": wrong.get(name),
                "heuristic": name == own,
            }
            for name in [*paths, *wrong, EAGER]
        )
        return self._outcome(problem, paths, times, wrong)

    def _predicted(self, problem: Problem, jobs: list[Job], wrong: dict[str, str]) -> dict[ConvConfig, float]:
        """Microseconds by the cost model over the compiled code; what spills is left out, but for the heuristic's."""
        found = {}
        for config, job in jobs:
            try:
                resources = None if job is None else job.result()
            except Exception as error:  # the compiler's own: this configuration is out
                wrong[name_of(config)] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if config == jobs[0][0] or fits(problem, config, self.device, resources):
                found[config] = predict(problem, config, self.device, resources).us
        return found

    def _check(self, problem: Problem, paths: dict[str, Way], wrong: dict[str, str]) -> None:
        """Compare each path with float64 on a few images; what is not right moves from ``paths`` to ``wrong``."""
        oracle = Oracle(problem, self.where)
        for name, path in list(paths.items()):
            try:
                with forced(*path):
                    found = oracle.problem_with(run(oracle.problem, oracle.inputs))
            except Exception as error:  # such as too much shared memory: this configuration is out
                found = f"{type(error).__name__}: {error}".splitlines()[0]
            if found:
                wrong[name] = found
                del paths[name]

    def _runners(self, problem: Problem, paths: dict[str, Way]) -> dict[str, Runner]:
        one = make_inputs(problem, self.where)
        copies = self.timer.copies(sum(t.nbytes for t in one))
        inputs = [one, *(Inputs(*(t.clone() for t in one)) for _ in range(copies - 1))]

        def runner(path: Way) -> Runner:
            def call(index: int) -> Any:
                with forced(*path):
                    return run(problem, inputs[index % copies])

            return call

        runners = {name: runner(path) for name, path in paths.items()}
        if problem.op != "apply":
            runners[EAGER] = eager_runner(problem, inputs)
        if "masked" in problem.extras:

            def apply(index: int) -> Any:
                i = inputs[index % copies]
                return bn_backward_apply(i.x, i.x, i.mean, i.scale, i.scale, i.mean, i.mean, True, None)

            runners[APPLY] = apply
        return runners

    def _outcome(
        self,
        problem: Problem,
        paths: dict[str, Way],
        times: dict[str, float],
        wrong: dict[str, str],
    ) -> Outcome:
        eager = times.get(EAGER)
        timed = {name: times[name] for name in paths if name in times}
        if not timed:
            return Outcome(problem.key, None, eager, wrong=wrong)
        best = min(timed, key=lambda name: timed[name])
        path, config = paths[best]
        numbers = None
        if config is not None:
            tile = [config.block_m, config.block_n, config.block_k]
            numbers = [*tile, config.num_warps, config.num_stages, config.splits]
        entry = {"path": path, "config": numbers, "ms": timed[best]}
        entry |= {"split_ms": timed.get(SPLIT), "eager_ms": eager}
        return Outcome(problem.key, entry, eager, times.get(APPLY, 0.0), wrong)

    def _keep(self, trials: Iterable[dict[str, Any]]) -> None:
        path = trials_path(self.table)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(trial) + "\n" for trial in trials)

    def _line(self, outcome: Outcome) -> str:
        lines = [f"  excluded {name}: {reason}" for name, reason in outcome.wrong.items()]
        if outcome.entry is None:
            return "\n".join([f"{outcome.key}: nothing right could be timed", *lines])
        entry = outcome.entry
        tile = entry["path"] if entry["config"] is None else name_of(ConvConfig(*entry["config"]))
        head = f"{outcome.key}: {tile}, {entry['ms']:.4f} ms"
        if outcome.eager_ms is not None:
            apply = f" + {outcome.apply_ms:.4f} apply" if outcome.apply_ms else ""
            head += f"{apply}, eager {outcome.eager_ms:.4f} ms"
        return "\n".join([head + (" SLOWER THAN EAGER" if outcome.slower else ""), *lines])
