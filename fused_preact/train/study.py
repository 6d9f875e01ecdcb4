"""Many runs as one: several seeds of a model, or a table of the paper. Each has a folder; what is done stays done."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import checkpoint, paper
from .config import Config
from .data import DataSet
from .fit import Options, fit
from .log import Log
from .paper import Cell
from .study_report import curves, markdown, picture
from .world import World

PLAN = "study.json"


@dataclass(frozen=True)
class Study:
    """``seeds`` runs of every cell, from ``config.seed`` on."""

    config: Config
    seeds: int
    table: int | None = None
    depths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= 1000:
            raise ValueError(f"--seeds {self.seeds}: allowed: 1 to 1000")

    @property
    def cells(self) -> list[Cell]:
        """The networks to train."""
        if self.table is not None:
            return paper.cells(self.table, self.depths, self.config.data)
        recipe, config = self.config.recipe, self.config
        return [Cell(recipe.model, "test error %", recipe.model, config.order, config.shortcut, config.body)]

    def run_config(self, cell: Cell, seed: int) -> Config:
        """The configuration of one run."""
        recipe = replace(self.config.recipe, model=cell.model)
        return replace(
            self.config, recipe=recipe, order=cell.order, shortcut=cell.shortcut, body=cell.body, seed=seed
        )

    def folder(self, out: Path, cell: Cell, seed: int) -> Path:
        """Where one run has its files."""
        return out / cell.folder / f"seed{seed}" if self.table is not None else out / f"seed{seed}"

    def to_dict(self) -> dict[str, Any]:
        """For ``study.json``."""
        return {
            "table": self.table,
            "depths": list(self.depths),
            "seeds": self.seeds,
            "config": self.config.to_dict(),
        }


def load(folder: Path) -> Study:
    """The study of ``folder``; raises OSError, or ValueError for a file that ``save`` did not write."""
    file = folder / PLAN
    try:
        found = json.loads(file.read_text())
        recipe = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found["config"]["recipe"].items()
        }
        config = Config.from_dict({**found["config"], "recipe": recipe})
        return Study(config, found["seeds"], found["table"], tuple(found["depths"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not written by --seeds or --table: {error}") from error


def save(study: Study, out: Path) -> None:
    """Write ``study.json``, from which ``--resume`` goes on."""
    checkpoint.write_bytes(out / PLAN, (json.dumps(study.to_dict(), indent=2) + "\n").encode())


def difference(one: Study, other: Study) -> str | None:
    """The first setting in which they differ, in words; machine settings, that change no numbers, may."""
    free = {"device", "backend", "graph", "data_dir", "workers", "download", "compile", "fsdp"}
    ours, theirs = one.to_dict(), other.to_dict()
    for mine, yours in ((ours, theirs), (ours["config"], theirs["config"])):
        for name, value in mine.items():
            if name not in free | {"config", "recipe"} and value != yours[name]:
                return f"{name}={value!r}, it has {name}={yours[name]!r}"
    recipes = ours["config"]["recipe"], theirs["config"]["recipe"]
    for name, value in recipes[0].items():
        if value != recipes[1][name]:
            return f"{name}={value!r}, it has {name}={recipes[1][name]!r}"
    return None


@dataclass(frozen=True)
class Outcome:
    """What became of one run: the test error in percent after its last epoch, None where the loss became infinite."""

    seed: int
    error: float | None
    best_error: float | None
    seconds: float
    images_per_s: float
    rows: list[dict[str, float]]


def run(study: Study, data: DataSet, out: Path, options: Options, world: World) -> dict[str, Any]:
    """All runs one after the other, complete ones only read; returns what ``results.json`` holds."""
    log = Log(speak=world.first)
    options = replace(options, quiet=True)
    jobs = [
        (cell, seed)
        for cell in study.cells
        for seed in range(study.config.seed, study.config.seed + study.seeds)
    ]
    found: dict[Cell, list[Outcome]] = {}
    for number, (cell, seed) in enumerate(jobs, 1):
        outcome, fresh = _outcome(study, cell, seed, data, out, options, world)
        found.setdefault(cell, []).append(outcome)
        told = "diverged" if outcome.error is None else f"test error {outcome.error:.2f} %"
        done = "" if fresh else ", done before"
        of = "" if study.table is None else f"{cell.row}, {cell.column}, "
        log.line(f"{number}/{len(jobs)} {of}seed {seed}: {told}, {outcome.seconds:.0f} s{done}")
    results = summarise(study, found)
    if world.first:
        _write(study, results, found, out)
        log.line("\n" + markdown(results))
    return results


def _outcome(
    study: Study, cell: Cell, seed: int, data: DataSet, out: Path, options: Options, world: World
) -> tuple[Outcome, bool]:
    config, folder = study.run_config(cell, seed), study.folder(out, cell, seed)
    diverged = folder / "diverged.txt"
    payload = None
    if world.first and (folder / "last.pt").exists():
        payload = checkpoint.load(folder)
    payload, over = world.broadcast((payload, world.first and diverged.exists()))
    epochs = study.config.recipe.epochs
    fresh = not over and (payload is None or payload["epoch"] < epochs)
    rows = [] if payload is None else payload["metrics"]
    if payload is not None:
        ours = replace(Config.from_dict(payload["config"]), **_machine(config))
        if ours != config:
            raise ValueError(f"checkpoint {str(folder / 'last.pt')!r}: of another run than this study's")
    if fresh:
        title = f"{cell.row}, seed {seed}"
        try:
            rows = fit(config, data, folder, resume=payload, options=options, world=world, name=title).rows
        except FloatingPointError as error:
            over = True
            rows = [dict(row) for row in (payload or {"metrics": []})["metrics"]]
            if world.first:
                checkpoint.write_bytes(diverged, f"{error}\n".encode())
    seconds = sum(row["train_seconds"] for row in rows)
    rate = statistics.median(row["images_per_s"] for row in rows) if rows else 0.0
    if over:
        return Outcome(seed, None, None, seconds, rate, rows), fresh
    errors = [round(100 - checkpoint.score(row), 6) for row in rows]  # not 1.4000000000000057
    return Outcome(seed, errors[-1], min(errors), seconds, rate, rows), fresh


def _machine(config: Config) -> dict[str, Any]:
    names = ("device", "backend", "graph", "data_dir", "workers", "download", "compile", "fsdp")
    return {name: getattr(config, name) for name in names}


def summarise(study: Study, found: dict[Cell, list[Outcome]]) -> dict[str, Any]:
    """Per cell the errors of all seeds, their median, mean and standard deviation (n - 1), and whether it failed."""
    import torch

    recipe = study.config.recipe
    cells = []
    for cell, outcomes in found.items():
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        whole = len(errors) == len(outcomes)
        # A run without an end is worse than any that has one.
        median = statistics.median([float("inf") if one.error is None else one.error for one in outcomes])
        cells.append(
            {
                "row": cell.row,
                "column": cell.column,
                "model": cell.model,
                "order": cell.order,
                "shortcut": cell.shortcut,
                "body": cell.body,
                "paper": cell.paper,
                "paper_net": "" if study.table is None else paper.paper_net(cell, study.table),
                "errors": [outcome.error for outcome in outcomes],
                "best_errors": [outcome.best_error for outcome in outcomes],
                "median": median if median < float("inf") else None,
                "mean": statistics.fmean(errors) if whole else None,
                "std": statistics.stdev(errors) if whole and len(errors) > 1 else None,
                "fail": median > paper.FAIL,
                "seconds": sum(outcome.seconds for outcome in outcomes),
            }
        )
    return {
        "table": study.table,
        "title": paper.TITLES[study.table] if study.table is not None else recipe.model,
        "data": study.config.data,
        "limit_train": study.config.limit_train,
        "limit_test": study.config.limit_test,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "recipe": recipe.name,
        "first_seed": study.config.seed,
        "seeds": study.seeds,
        "dtype": study.config.dtype,
        "device": study.config.device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "cells": cells,
    }


def _write(study: Study, results: dict[str, Any], found: dict[Cell, list[Outcome]], out: Path) -> None:
    files: dict[str, bytes | None] = {
        "results.json": (json.dumps(results, indent=2) + "\n").encode(),
        "results.md": markdown(results).encode(),
        "results.png": picture(results) if study.table is not None else None,
    }
    title = f"{results['title']}, {results['data']}"
    by_column: dict[str, dict[str, list[dict[str, float]]]] = {}
    for cell, outcomes in found.items():
        label = cell.row if study.table is not None else ""
        for outcome in outcomes if study.table is None else _middle(outcomes):
            name = label or f"seed {outcome.seed}"
            if outcome.rows:
                by_column.setdefault(cell.column, {})[name] = outcome.rows
    for column, runs in by_column.items():
        suffix = column.lower().replace(" ", "-") if study.table is not None else "seeds"
        files[f"curves-{suffix}.png"] = curves(runs, f"{title}, {column}")
    for name, content in files.items():
        if content is not None:
            checkpoint.write_bytes(out / name, content)


def _middle(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The run with the median error, the lower one of two."""
    ranked = sorted(outcomes, key=lambda one: float("inf") if one.error is None else one.error)
    return [ranked[(len(ranked) - 1) // 2]]
