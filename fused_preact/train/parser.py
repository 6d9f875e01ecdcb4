"""The flags of ``python -m fused_preact.train``, and the configuration that they give."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

from . import console, flags
from .config import BACKENDS, DTYPES, Config
from .recipes import DEFAULTS, RECIPES, families, recipe_for

RECIPE_FLAGS = ("model", "batch_size", "lr", "weight_decay", "warmup_epochs", "decay_norm", *flags.RECIPE)
VARIANT_FLAGS = ("order", "shortcut", "body")
CONFIG_FLAGS = (
    "seed",
    "fused",
    "dtype",
    "deterministic",
    "sync_bn",
    "model_ema",
    "model_ema_decay",
    *VARIANT_FLAGS,
    *flags.CONFIG,
)
MACHINE_FLAGS = (  # where and how a run computes: free to change on resume
    "device",
    "backend",
    "graph",
    "grad_accum_steps",
    "grad_checkpointing",
    "channels_last",
    "compile",
    "fsdp",
    *flags.MACHINE,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(message)  # one line; the usage is three screens
        self.exit(2)

    def print_help(self, file: Any = None) -> None:
        if first_process():
            console.write(sys.stdout if file is None else file, self.format_help())


def first_process() -> bool:
    """Whether this is rank 0, or the only process; known before the ranks have found each other."""
    return os.environ.get("RANK", "0") == "0"


def complain(message: str) -> None:
    """One line on stderr, from the first process."""
    if first_process():
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
    what.add_argument("--recipe", metavar="NAME", help=f"{families()} (default: see below)")
    flags.add_data(what)
    what.add_argument(
        "--model", metavar="NAME", help="cifar_preact_resnet20, ...56, ...110, ...164, ...1001, ..."
    )
    what.add_argument("--order", metavar="NAME", help="order of activation in a unit (Fig. 4 of the paper)")
    what.add_argument("--shortcut", metavar="NAME", help="kind of shortcut, with its numbers (Fig. 2)")
    what.add_argument("--body", metavar="NAME", help="convolutions of a unit: basic, bottleneck or single")
    what.add_argument(
        "--plain", dest="fused", action="store_const", const=False, help="the plain model instead"
    )
    what.add_argument(
        "--compare", action="store_true", help="also train or time the plain model, side by side"
    )
    what.add_argument("--seeds", type=int, metavar="N", help="N runs, of seeds --seed and following")
    what.add_argument(
        "--table",
        type=int,
        metavar="N",
        help="a table of the paper, 1, 2 or 3: every network of it, one by one",
    )
    what.add_argument(
        "--depth",
        type=int,
        nargs="+",
        metavar="N",
        help="depths for --table (digits: 20 29, else the paper's)",
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
    how.add_argument(
        "--grad-accum-steps",
        type=int,
        metavar="N",
        help="take a process's share of a batch in N parts; BN sees each part alone",
    )
    how.add_argument(
        "--sync-bn",
        action="store_const",
        const=True,
        help="BN statistics over the images of all processes; without it each has its own, tests use the first one's",
    )
    how.add_argument(
        "--model-ema", action="store_const", const=True, help="also average the weights, and test the average"
    )
    how.add_argument("--model-ema-decay", type=float, metavar="X", help="decay of the average (0.9998)")
    flags.add_recipe(how)
    where = top.add_argument_group("where")
    where.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    where.add_argument("--dtype", choices=DTYPES, help="float32, float64, or autocast to another (float32)")
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
    where.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory format of weights and images (default: channels_last)",
    )
    where.add_argument("--compile", action="store_const", const=True, help="torch.compile the model")
    where.add_argument(
        "--grad-checkpointing",
        action="store_const",
        const=True,
        help="keep few activations and compute the others again in backward: for ResNet-1001",
    )
    where.add_argument(
        "--fsdp",
        action="store_const",
        const=True,
        help="under torchrun: shard weights instead of copying them",
    )
    flags.add_loading(where)
    files = top.add_argument_group("files")
    files.add_argument(
        "--out", metavar="DIR", help="folder of the run (default: runs/<data>-<model>-seed<seed>)"
    )
    files.add_argument(
        "--checkpoint-minutes",
        type=float,
        metavar="M",
        help="also write a checkpoint inside an epoch, M minutes after the last",
    )
    files.add_argument(
        "--keep", type=int, metavar="K", help="keep the last K checkpoints (1) beside the best"
    )
    files.add_argument("--log-tensorboard", action="store_true", help="also write TensorBoard's event files")
    flags.add_weights(files)
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
    recipe = replace(recipe, **given(args, RECIPE_FLAGS))
    config = Config(data=recipe.data, recipe=recipe, device=_default_device())
    return replace(config, **given(args, CONFIG_FLAGS + MACHINE_FLAGS))


def resumed_config(args: argparse.Namespace, payload: dict[str, Any]) -> Config:
    """The checkpoint's configuration. A flag that contradicts it is refused, so that the run goes on exactly.

    A test (``--eval``) only has to be of the same model and data.
    """
    config = Config.from_dict(payload["config"])
    if args.recipe not in (None, config.recipe.name):
        raise ValueError(f"recipe={args.recipe!r} was given, the checkpoint has {config.recipe.name!r}")
    for names, owner in ((RECIPE_FLAGS, config.recipe), (CONFIG_FLAGS, config)):
        for name, value in given(args, names).items():
            if value != getattr(owner, name) and (args.resume or name in ("model", "data", *VARIANT_FLAGS)):
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
        recipe = replace(recipe, **given(args, flags.TEST))
    chosen = given(args, CONFIG_FLAGS + MACHINE_FLAGS)
    if not chosen.get("device", config.device).startswith("cuda"):
        chosen.setdefault("graph", False)  # of the machine that the run comes from
    return replace(config, recipe=recipe, **chosen)


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of ``names`` that were given."""
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
