"""The command line of ``python -m fused_preact.train``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from fused_preact import _interrupt

from . import console, flags
from .config import BACKENDS, DTYPES, Config
from .recipes import DEFAULTS, RECIPES, recipe_for

RECIPE_FLAGS = ("model", "batch_size", "lr", "weight_decay", "warmup_epochs", "decay_norm", *flags.RECIPE)
CONFIG_FLAGS = ("seed", "fused", "dtype", "deterministic", *flags.CONFIG)
MACHINE_FLAGS = (
    "device",
    "backend",
    "graph",
    *flags.MACHINE,
)  # where a run computes: free to change on resume


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(message)  # one line; the usage is three screens
        self.exit(2)

    def print_help(self, file: Any = None) -> None:
        console.write(sys.stdout if file is None else file, self.format_help())


def _complain(message: str) -> None:
    with suppress(OSError):  # where stderr cannot be written to, the status has to do
        console.write(sys.stderr, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """All flags. Those of the recipe default to None: the data set decides, or the checkpoint on resume."""
    top = _Parser(
        prog="python -m fused_preact.train",
        description="Train a ResNet-v2 with fused BN-ReLU-conv on scikit-learn's digits, CIFAR or ImageNet.",
        epilog="Defaults are those of --recipe, or of --data: "
        + ". ".join(f"{data}: {_defaults(data)}" for data in DEFAULTS)
        + ". docs/recipes.md has all of them.",
    )
    what = top.add_argument_group("what to train")
    what.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)} (default: see below)")
    flags.add_data(what)
    what.add_argument(
        "--model", metavar="NAME", help="cifar_preact_resnet20, ...56, ...110, ...164, ...1001, ..."
    )
    what.add_argument(
        "--plain", dest="fused", action="store_const", const=False, help="the plain model instead"
    )
    what.add_argument(
        "--compare", action="store_true", help="also train or time the plain model, side by side"
    )
    how = top.add_argument_group("recipe")
    how.add_argument("--epochs", type=int, metavar="N", help="milestones and warm-up scale along")
    how.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="at least 2; an image left over for a batch of its own is left out of the epoch: BN cannot train on it",
    )
    how.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    how.add_argument("--weight-decay", type=float, metavar="X")
    how.add_argument(
        "--no-decay-norm",
        dest="decay_norm",
        action="store_const",
        const=False,
        help="no weight decay on BN parameters and biases",
    )
    how.add_argument("--warmup-epochs", type=float, metavar="X", help="linear warm-up")
    how.add_argument("--seed", type=int, metavar="N", help="weights and batches (default: 0)")
    how.add_argument("--bn-recalibrate", action="store_true", help="re-estimate BN statistics at the end")
    flags.add_recipe(how)
    where = top.add_argument_group("where")
    where.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    where.add_argument("--dtype", choices=DTYPES, help="float32, or autocast to the other (default: float32)")
    where.add_argument("--backend", choices=BACKENDS, help="kernels of the fused model (default: auto)")
    where.add_argument(
        "--graph",
        action="store_const",
        const=True,
        help="record forward and backward as CUDA graphs: on images of CIFAR's size the host is the bottleneck",
    )
    where.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="only deterministic PyTorch operations, no cuDNN benchmarking",
    )
    flags.add_loading(where)
    files = top.add_argument_group("files")
    files.add_argument(
        "--out", metavar="DIR", help="folder of the run (default: runs/<data>-<model>-seed<seed>)"
    )
    files.add_argument("--resume", metavar="PATH", help="go on from a checkpoint or a run's folder, exactly")
    files.add_argument("--eval", metavar="PATH", help="only test a checkpoint")
    return top


def _defaults(data: str) -> str:
    recipe = RECIPES[DEFAULTS[data]]
    return (
        f"{recipe.name}, {recipe.model}, {recipe.epochs} epochs, batch {recipe.batch_size}, lr {recipe.lr} "
        f"({recipe.schedule}), weight decay {recipe.weight_decay}, warm-up {recipe.warmup_epochs}"
    )


def new_config(args: argparse.Namespace) -> Config:
    """The data set's recipe with the flags given put over it."""
    recipe = recipe_for(args.data, args.recipe)
    if args.epochs is not None:
        if args.epochs < 1:
            raise ValueError(f"--epochs {args.epochs}: must be at least 1")
        recipe = recipe.with_epochs(args.epochs)
    recipe = replace(recipe, **_given(args, RECIPE_FLAGS))
    config = Config(data=recipe.data, recipe=recipe, device=_default_device())
    return replace(config, **_given(args, CONFIG_FLAGS + MACHINE_FLAGS))


def resumed_config(args: argparse.Namespace, payload: dict[str, Any]) -> Config:
    """The checkpoint's configuration. A flag that contradicts it is refused, so that the run goes on exactly.

    A test (``--eval``) only has to be of the same model and data.
    """
    config = Config.from_dict(payload["config"])
    if args.recipe not in (None, config.recipe.name):
        raise ValueError(f"recipe={args.recipe!r} was given, the checkpoint has {config.recipe.name!r}")
    for names, owner in ((RECIPE_FLAGS, config.recipe), (CONFIG_FLAGS, config)):
        for name, value in _given(args, names).items():
            if value != getattr(owner, name) and (args.resume or name in ("model", "data")):
                raise ValueError(f"{name}={value!r} was given, the checkpoint has {getattr(owner, name)!r}")
    recipe = config.recipe
    if args.epochs not in (None, recipe.epochs):
        if recipe.schedule != "step" or args.epochs < payload["epoch"]:
            raise ValueError(
                f"epochs={args.epochs} was given, the checkpoint has {recipe.epochs} in a "
                f"{recipe.schedule} schedule with {payload['epoch']} done; only a step schedule can be extended"
            )
        recipe = replace(recipe, epochs=args.epochs)  # the milestones stay where they were
    if args.eval:
        recipe = replace(recipe, **_given(args, flags.TEST))
    given = _given(args, CONFIG_FLAGS + MACHINE_FLAGS)
    if not given.get("device", config.device).startswith("cuda"):
        given.setdefault("graph", False)  # of the machine that the run comes from
    return replace(config, recipe=recipe, **given)


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """ValueError unless ``name`` is a device this process can train on."""
    import torch

    count = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in allowed:
        raise ValueError(f"device={name!r}: allowed here: {', '.join(allowed)}")


def prepare(args: argparse.Namespace) -> tuple[Callable[[], object], Path | None]:
    """Check everything a user can get wrong, last that the run's folder takes files.

    Returns what does the work, and the folder, None for a test.
    """
    import fused_preact
    from fused_preact import models

    from . import checkpoint, run
    from .data import load_for
    from .log import Log
    from .loop import Trainer

    if args.resume and (args.out or args.eval):
        raise ValueError("--resume goes on in the checkpoint's own folder: leave --out and --eval away")
    source = args.resume or args.eval
    payload = checkpoint.load(source) if source else None
    config = new_config(args) if payload is None else resumed_config(args, payload)
    if args.compare and not config.fused:
        raise ValueError("--compare trains the fused and the plain model: leave --plain away")
    if config.recipe.model not in models.names():
        raise ValueError(f"model={config.recipe.model!r}: unknown; allowed: {', '.join(models.names())}")
    check_device(config.device)
    run.serving_backend(config)  # raises if it is not there
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    data = load_for(config)
    out = Path(args.out) if args.out else run.free_folder(config)
    if args.out and (out / "last.pt").exists():
        raise FileExistsError(
            f"--out {args.out}: holds a run; go on with --resume {args.out} or name another folder"
        )
    if args.resume:
        out = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    plain = run.plain_folder(out) if args.compare and config.recipe.compare_accuracy else None
    payload_plain = None
    if payload is not None:
        checkpoint.check(payload, config, data)
        if args.resume and plain is not None and (plain / "last.pt").exists():
            payload_plain = checkpoint.load(plain)
            checkpoint.check(payload_plain, replace(config, fused=False), data)

    def train() -> None:
        run.set_up_torch(config)
        with fused_preact.backend(config.backend):
            run.run(
                config,
                data,
                out,
                resume=payload,
                resume_plain=payload_plain,
                compare=args.compare,
                recalibrate=args.bn_recalibrate,
            )

    def test() -> None:
        assert payload is not None
        run.set_up_torch(config)
        with fused_preact.backend(config.backend):
            trainer = Trainer(config, data, fused=config.fused)
            checkpoint.restore(trainer, payload)
            if args.bn_recalibrate:
                trainer.recalibrate()
            stats = trainer.evaluate()
        Log().line(
            f"{args.eval}: {config.recipe.model} on {data.name} after {payload['epoch']} epochs: test accuracy "
            f"{stats.accuracy:.2f} %, loss {stats.loss:.4f}, {len(data.test)} images, {stats.images_per_s:,.0f} img/s"
        )

    if args.eval:
        return test, None
    for folder in (out, plain):
        if folder is not None:
            _check_folder(folder, args)
    return train, out


def _check_folder(folder: Path, args: argparse.Namespace) -> None:
    from . import checkpoint

    flag = f"--resume {args.resume}" if args.resume else f"--out {folder}"
    try:
        checkpoint.check_writable(folder)
    except OSError as error:
        raise OSError(
            f"{flag}: cannot write to {folder} ({error.strerror}); allowed: a folder that takes files, new or not"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0; 2 for bad input, found before training starts; 1 for divergence or a file that could not be written; 130 for
    Ctrl-C. All but 0 come with one line on stderr. A closed pipe behind stdout or stderr only silences it.
    """
    out = None
    try:
        args = parser().parse_args(argv)
        try:
            work, out = prepare(args)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            _complain(console.one_line(error))
            return 2
        _interrupt.loaded()
        work()
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    except FloatingPointError as error:
        _complain(console.one_line(error))
        return 1
    except OSError as error:
        _complain(f"{console.one_line(error)}; {_how_to_go_on(out)}")
        return 1
    except KeyboardInterrupt:
        with suppress(OSError):
            console.write(sys.stderr, f"\ninterrupted; {_how_to_go_on(out)}\n")
        return 130
    return 0


def _how_to_go_on(out: Path | None) -> str:
    if out is None:
        return "nothing was written"
    if (out / "last.pt").exists():
        return f"the last finished epoch is in {out / 'last.pt'}, go on with --resume {out}"
    return f"no epoch was finished in {out}"
