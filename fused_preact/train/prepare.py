"""Everything that a user can get wrong, checked before training starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fused_preact

from . import checkpoint, paper, run, study, weights
from .config import Config
from .data import Batches, DataSet, load_for
from .fit import Options, evaluate
from .log import Log, writer
from .networks import build_model
from .parser import VARIANT_FLAGS, check_device, given, new_config, resumed_config
from .study import Study
from .world import World, check_together

Work = Callable[[], object]


@dataclass
class _Found:
    """What rank 0 found on its disk; the others may have another."""

    out: Path
    payload: dict[str, Any] | None = None
    plain: dict[str, Any] | None = None
    study: Study | None = None


def prepare(args: argparse.Namespace, world: World) -> tuple[Work, Path | None]:
    """What does the work of ``args``, and the run's folder, None for a test. Every rank has to ask.

    Raises ValueError, OSError, ImportError or RuntimeError for what a user can get wrong; last that the folder takes
    files.
    """
    found = world.broadcast(check_together(world, lambda: _read(args) if world.first else None))
    assert found is not None
    return check_together(world, lambda: _work(args, found, world))


def _read(args: argparse.Namespace) -> _Found:
    if args.resume and (args.out or args.eval):
        raise ValueError("--resume goes on in the checkpoint's own folder: leave --out and --eval away")
    many = args.table is not None or args.seeds is not None
    if args.depth is not None and args.table is None:
        raise ValueError("--depth is of --table; for one network give --model")
    if many and (args.compare or args.eval or args.bn_recalibrate):
        raise ValueError("--seeds and --table only train: leave --compare, --eval and --bn-recalibrate away")
    if args.resume and (Path(args.resume) / study.PLAN).exists():
        return _Found(Path(args.resume), study=_resumed_study(args))
    if many:
        if args.resume:
            raise ValueError(
                f"--resume {args.resume}: holds no {study.PLAN}, so no run of --seeds or --table"
            )
        return _new_study(args)
    source = args.resume or args.eval
    payload = checkpoint.load(source) if source else None
    config = new_config(args) if payload is None else resumed_config(args, payload)
    if args.resume:
        out = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    elif args.out:
        out = Path(args.out)
        if any((out / name).exists() for name in ("last.pt", study.PLAN)):
            raise FileExistsError(
                f"--out {args.out}: holds a run; go on with --resume {args.out} or name another folder"
            )
    else:
        out = run.free_folder(config)
    plain = None
    if args.resume and args.compare and config.recipe.compare_accuracy:
        folder = run.plain_folder(out)
        plain = checkpoint.load(folder) if (folder / "last.pt").exists() else None
    return _Found(out, payload, plain)


def _new_study(args: argparse.Namespace) -> _Found:
    config = new_config(args)
    if args.table is not None:
        fixed = sorted(given(args, ("model", *VARIANT_FLAGS)))
        if fixed:
            raise ValueError(
                f"--table {args.table} trains its own networks: leave --{', --'.join(fixed)} away"
            )
        small = config.data == "digits"
        defaults = (paper.SMALL_DEPTHS if small else paper.PAPER_DEPTHS).get(args.table, ())
        depths = tuple(args.depth or defaults)
        name = f"{config.data}-table{args.table}"
        asked = Study(config, args.seeds or 1, args.table, depths)
        asked.cells  # noqa: B018 (raises for a table or a depth that is not there)
    else:
        name = f"{config.data}-{config.recipe.model}-seeds"
        asked = Study(config, args.seeds)
    out = Path(args.out or Path("runs") / name)
    if (out / study.PLAN).exists():
        problem = study.difference(asked, study.load(out))
        if problem:
            raise FileExistsError(f"--out {out}: holds another study; asked for is {problem}")
    elif (out / "last.pt").exists():
        raise FileExistsError(f"--out {out}: holds a run; name another folder")
    return _Found(out, study=asked)


def _resumed_study(args: argparse.Namespace) -> Study:
    """The study as it was; what says where to compute may change."""
    found = study.load(Path(args.resume))
    for name, value, ours in (("table", args.table, found.table), ("seeds", args.seeds, found.seeds)):
        if value not in (None, ours):
            raise ValueError(f"--{name} {value} was given, {args.resume} has {ours}")
    # The checks are those of a checkpoint's configuration.
    config = resumed_config(args, {"config": found.config.to_dict(), "epoch": 0})
    return replace(found, config=config)


def _work(args: argparse.Namespace, found: _Found, world: World) -> tuple[Work, Path | None]:
    payload, out = found.payload, found.out
    if found.study is not None:
        config = found.study.config
    else:
        config = new_config(args) if payload is None else resumed_config(args, payload)
    options = _options(args)
    check_config(args, config, world)
    configs = [config]
    if found.study is not None:
        configs = [found.study.run_config(cell, config.seed) for cell in found.study.cells]
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    data = load_for(replace(config, device=str(world.device(config.device))))
    for one in configs:
        _check_network(one, data)
    _check_weights(args, config, data)
    check_shares(config, data, world)
    folders = [out]
    if payload is not None:
        checkpoint.check(payload, config, data)
        if found.plain is not None:
            checkpoint.check(found.plain, replace(config, fused=False), data)
    if args.compare and config.recipe.compare_accuracy:
        folders.append(run.plain_folder(out))

    def train() -> None:
        run.run(
            config,
            data,
            out,
            resume=payload,
            resume_plain=found.plain,
            compare=args.compare,
            options=options,
            world=world,
        )
        if args.export and world.first:
            _export(args.export, checkpoint.load(out / "recalibrated.pt" if args.bn_recalibrate else out))

    def repeat() -> None:
        assert found.study is not None
        if world.first:
            study.save(found.study, out)
        study.run(found.study, data, out, options, world)

    def test() -> None:
        assert payload is not None
        place = f" and {payload['step']} steps" if payload["step"] else ""
        log = Log(speak=world.first)
        for line in evaluate(config, data, payload, options=options, world=world):
            log.line(
                f"{args.eval}: {config.recipe.model} on {data.name} after {payload['epoch']} epochs{place}: {line}"
            )

        if args.export and world.first:
            _export(args.export, payload)

    chosen = test if args.eval else repeat if found.study is not None else train

    def work() -> None:
        run.set_up_torch(config)
        with fused_preact.backend(config.backend):
            chosen()

    if args.eval:
        return work, None
    if world.first:
        for folder in folders:
            _check_folder(folder, args)
    return work, out


def _options(args: argparse.Namespace) -> Options:
    if args.log_tensorboard:
        writer()  # raises if it is not there
    return Options(
        checkpoint_minutes=args.checkpoint_minutes,
        keep=1 if args.keep is None else args.keep,
        tensorboard=args.log_tensorboard,
        recalibrate=args.bn_recalibrate,
        bn_images=args.bn_images,
        initial=weights.initial(args.initial_checkpoint) if args.initial_checkpoint else None,
    )


def check_config(args: argparse.Namespace, config: Config, world: World) -> None:
    """Raises ValueError for flags that do not go together, RuntimeError for kernels that are not there."""
    if args.compare and not config.fused:
        raise ValueError("--compare trains the fused and the plain model: leave --plain away")
    if world.size > 1:
        for name, on in (("--compare", args.compare), ("--graph", config.graph)):
            if on:
                raise ValueError(f"{name}: of one process, these are {world.size}")
        preact = "preact" in config.recipe.model and config.order in (None, "preact")
        if config.sync_bn and config.device == "cpu" and not (config.fused and preact):
            raise ValueError(
                "sync_bn=True on a CPU: PyTorch's SyncBatchNorm takes no CPU tensors, and only fused pre-activation "
                "units do without it; leave --sync-bn or --plain away"
            )
    elif args.fsdp:
        raise ValueError(
            "--fsdp: shards weights over several processes, this is one; start them with torchrun"
        )
    check_device(config.device)
    run.serving_backend(config)  # raises if it is not there


def _check_network(config: Config, data: DataSet) -> None:
    """ValueError unless there is such a network: built of shapes alone."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            build_model(config, data, fused=config.fused)
        except (ValueError, TypeError) as error:
            asked = {"model": config.recipe.model} | {
                name: getattr(config, name) for name in VARIANT_FLAGS if getattr(config, name) is not None
            }
            words = ", ".join(f"{name}={value!r}" for name, value in asked.items())
            raise ValueError(f"{words}: {error}") from error


def check_shares(config: Config, data: DataSet, world: World) -> None:
    """ValueError unless every process, and every part of its share, gets as many images of a batch, at least two."""
    recipe, parts = config.recipe, config.grad_accum_steps
    Batches(data.train, recipe, config.seed, rank=world.rank, world=world.size)
    if recipe.batch_size % (world.size * parts) or recipe.batch_size < 2 * world.size * parts:
        unit = world.size * parts
        raise ValueError(
            f"batch_size={recipe.batch_size}, grad_accum_steps={parts}, {world.size} processes: every part of a "
            f"batch must have as many images, at least 2; allowed: multiples of {unit} from {2 * unit}"
        )


def _check_weights(args: argparse.Namespace, config: Config, data: DataSet) -> None:
    """ValueError or OSError for weights that do not fit, or that could not be written at the end."""
    if args.initial_checkpoint:
        if args.resume or args.eval:
            raise ValueError("--initial-checkpoint begins a run: leave --resume and --eval away")
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            ours = build_model(config, data, fused=config.fused).state_dict()
        file = args.initial_checkpoint
        weights.check_state(ours, weights.initial(file), f"--initial-checkpoint {file}")
    if args.export:
        if args.seeds is not None or args.table is not None:
            raise ValueError("--export: of one run; export a run of --seeds or --table with --eval")
        if args.eval and args.bn_recalibrate:
            raise ValueError(
                "--export with --eval writes the weights as they are: leave --bn-recalibrate away"
            )
        weights.check_target(Path(args.export))


def _export(file: str, payload: dict[str, Any]) -> None:
    weights.write(Path(file), weights.of_payload(payload))


def _check_folder(folder: Path, args: argparse.Namespace) -> None:
    flag = f"--resume {args.resume}" if args.resume else f"--out {folder}"
    try:
        checkpoint.check_writable(folder)
    except OSError as error:
        raise OSError(
            f"{flag}: cannot write to {folder} ({error.strerror}); allowed: a folder that takes files, new or not"
        ) from error
