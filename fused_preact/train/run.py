"""A whole run: one model or, compared, two; the curves and the closing table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fused_preact

from . import checkpoint
from .config import Config
from .data import Batches, DataSet
from .fit import Options, fit
from .log import Log
from .loop import Trainer
from .measure import compare_steps, saved_bytes
from .report import Result, learning_curve, summary
from .world import World


def free_folder(config: Config, root: Path = Path("runs")) -> Path:
    """A folder for a new run that no earlier run has used."""
    name = f"{config.data}-{config.recipe.model}-seed{config.seed}"
    out, number = root / name, 2
    while out.exists():
        out, number = root / f"{name}-{number}", number + 1
    return out


def plain_folder(out: Path) -> Path:
    """Where the plain model's files are in a run that compares."""
    return out / "plain"


def set_up_torch(config: Config) -> None:
    """Process-wide switches: reproducible, or as fast as cuDNN finds by trying."""
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        torch.use_deterministic_algorithms(True)


def serving_backend(config: Config) -> str:
    """The kernels that serve this run's activations; RuntimeError where those asked for cannot."""
    with fused_preact.backend(config.backend):
        activation = torch.empty(0, device=config.device, dtype=getattr(torch, config.dtype))
        return fused_preact.serving_backend(activation)


def run(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    resume: dict[str, Any] | None = None,
    resume_plain: dict[str, Any] | None = None,
    compare: bool = False,
    options: Options | None = None,
    world: World | None = None,
) -> list[Result]:
    """``fit``, and with ``compare`` the plain model too; draws the curves and prints the closing table.

    ``resume_plain`` is the checkpoint from which the plain model goes on.
    """
    options, world = options or Options(), world or World()
    log, recipe = Log(speak=world.first), config.recipe
    kernels = f"fused kernels: {serving_backend(config)}" if config.fused else "plain PyTorch"
    batches, every = Batches(data.train, recipe, config.seed, world=world.size), len(data.train)
    images = batches.images
    left_out = (
        ""
        if images == every
        else f" (of {every}: {'one' if every - images == 1 else every - images} would be left over)"
    )
    ranks = "" if world.size == 1 else f" x {world.size} processes"
    title = (
        f"{recipe.model} on {data.name}, {recipe.epochs} epochs of {images} images{left_out}, batch "
        f"{recipe.batch_size}, seed {config.seed}, {config.dtype} on {config.device}{ranks}, {kernels}"
    )
    log.line(f"{title}; {len(data.test)} test images, files in {out}")
    results = [fit(config, data, out, resume=resume, options=options, world=world)]
    steps = None
    if compare:
        plain, folder = replace(config, fused=False), plain_folder(out)
        if recipe.compare_accuracy:
            results.append(fit(plain, data, folder, resume=resume_plain, options=options))
        log.line("timing training steps of the fused and the plain model in turns")
        steps = compare_steps(config, data)
    if not world.first:
        return results
    picture = learning_curve(results, f"{recipe.model} on {data.name}")
    if picture is not None:
        checkpoint.write_bytes(out / "learning_curve.png", picture)
    else:
        log.line("no learning_curve.png: matplotlib is not installed (pip install 'fused_preact[train]')")
    log.line(f"\n{title}\n")
    models = ("fused", "plain") if compare else (results[0].name,)
    saved = {name: saved_bytes(Trainer(config, data, fused=name == "fused")) for name in models}
    log.line(summary(results, saved, steps))
    return results
