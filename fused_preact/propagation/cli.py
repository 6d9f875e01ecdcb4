"""The command line of ``python -m fused_preact.propagation``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import models
from ..train import console
from ..train.checkpoint import check_writable, write_atomically
from ..units import ORDERS, Shortcut
from .measure import Snapshot, measure
from .report import Variant, checks, figures, summary, to_json

__all__ = ["main"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_SNAPSHOTS = 4
"""Of a training, beside the one at initialisation."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fused_preact.propagation",
        description="The paper's analysis of signal propagation, measured: additive form, two-term gradient, what "
        "the shortcuts alone carry, gradient norms and negative sums of every unit.",
    )
    parser.add_argument(
        "--model", default="cifar_resnet110", help="such as %(default)s, cifar_preact_resnet164"
    )
    parser.add_argument(
        "--order",
        nargs="+",
        metavar="ORDER",
        help=f"one or more of {', '.join(ORDERS)}; default: the model's",
    )
    parser.add_argument(
        "--shortcut",
        nargs="+",
        metavar="KIND",
        help=f"one or more of {Shortcut.allowed()}; default: the model's",
    )
    parser.add_argument("--body", help="single, basic or bottleneck; default: the model's")
    parser.add_argument(
        "--data", default="random", choices=("random", "digits"), help="default: %(default)s, standard normal"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="train that long on the digits, and look at it on the way"
    )
    parser.add_argument(
        "--lr", type=float, default=0.05, help="of the training, SGD with momentum 0.9; default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="images that are measured with; default: %(default)s"
    )
    parser.add_argument(
        "--image-size", type=int, help="of random images; default: 32, or 224 for ImageNet's models"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--dtype", default="float64", choices=list(_DTYPES), help="of the measurement; default: %(default)s"
    )
    parser.add_argument(
        "--out",
        default="propagation",
        metavar="DIR",
        help="folder for JSON and figures; default: %(default)s",
    )
    return parser


def _at_least(args: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(args, name)
    if value is not None and value < least:
        raise ValueError(f"--{name.replace('_', '-')}: got {value}, allowed are {least} or more")


def _prepare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check the arguments; the options of each variant's network, with its label."""
    for name, least in (("batch_size", 2), ("steps", 0), ("image_size", 1), ("seed", 0)):
        _at_least(args, name, least)
    if args.steps and args.data != "digits":
        raise ValueError(f"--steps: got {args.steps} with --data {args.data}, allowed with --data digits")
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr: got {args.lr}, allowed are finite numbers above 0")
    if args.image_size is not None and args.data == "digits":
        raise ValueError(f"--image-size: got {args.image_size} with --data digits, whose images are 8x8")
    import matplotlib  # noqa: F401 - missing: said before the work

    found = []
    for order in args.order or [None]:
        for shortcut in args.shortcut or [None]:
            options = {"order": order, "shortcut": shortcut, "body": args.body}
            with torch.device("meta"):
                models.create(args.model, num_classes=10, **options)
            words = [word for word, many in ((order, args.order), (shortcut, args.shortcut)) if many]
            found.append({"label": " ".join(words) or args.model, **options})
    return found


def _images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """All there are: of random ones those that are measured with."""
    if args.data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        return images[order], torch.tensor(digits.target)[order]
    size = args.image_size or (32 if args.model.startswith("cifar") else 224)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(args.batch_size, 3, size, size, generator=generator)
    return images, torch.randint(10, (args.batch_size,), generator=generator)


def _follow(
    model: models.ResNet, images: Tensor, labels: Tensor, args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Snapshot, ...]:
    """Measure at initialisation and while training, always with the first images."""
    count, dtype = args.batch_size, _DTYPES[args.dtype]
    found = [measure(model, images[:count], labels[:count], 0, dtype)]
    at = {round(args.steps * i / _SNAPSHOTS) for i in range(1, _SNAPSHOTS + 1)}
    optimiser = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in at:
            found.append(measure(model, images[:count], labels[:count], step, dtype))
            say(f"  step {step}: training loss {loss.item():.3f}")
    return tuple(found)


def _work(args: argparse.Namespace, networks: list[dict[str, Any]], out: Path) -> bool:
    """Measure, write, print; whether every statement that is exact holds."""

    def say(text: str) -> None:
        console.write(sys.stderr, text + "\n")

    images, labels = _images(args)
    variants = []
    for options in networks:
        label = options.pop("label")
        say(f"{args.model} {label}")
        torch.manual_seed(args.seed)
        model = models.create(args.model, num_classes=10, in_channels=images.shape[1], **options)
        snapshots = _follow(model, images, labels, args, say)
        order = options["order"] or ("preact" if isinstance(model, models.PreActResNet) else "original")
        text = options["shortcut"] or ("B" if _projects(model) else "A")
        variants.append(Variant(label, order, Shortcut.parse(text, "A"), snapshots))
    dtype = _DTYPES[args.dtype]
    settings = {**vars(args), "torch": torch.__version__, "threads": torch.get_num_threads()}
    write_atomically(out / "propagation.json", partial(_write, to_json(settings, variants, dtype)))
    title = f"{args.model}, {args.data} images, batch {args.batch_size}"
    for name, picture in figures(variants, title, dtype).items():
        write_atomically(out / f"{name}.png", partial(_write, picture))
    console.write(sys.stdout, summary(variants, dtype) + "\n")
    say(f"written: {out}")
    return all(check.holds for variant in variants for check in checks(variant, dtype))


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _projects(model: models.ResNet) -> bool:
    return not any(name.endswith("shortcut.weight") for name, _ in model.named_buffers())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0; 1 where a statement that is exact does not hold, or a file could not be written; 2 for bad input, before
    anything is measured; 130 for Ctrl-C. All but 0 come with one line on stderr, or with the table's own.
    """
    try:
        try:
            args = _parser().parse_args(argv)
            networks = _prepare(args)
            out = Path(args.out)
            check_writable(out)
        except (ValueError, OSError, ImportError) as error:
            console.write(sys.stderr, f"error: {console.one_line(error)}\n")
            return 2
        return 0 if _work(args, networks, out) else 1
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except OSError as error:
        console.write(sys.stderr, f"error: {console.one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        console.write(sys.stderr, "\ninterrupted; nothing was written\n")
        return 130
