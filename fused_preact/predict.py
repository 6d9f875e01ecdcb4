"""``python -m fused_preact.predict CHECKPOINT IMAGE...``: what a trained model says of image files."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fused_preact import _interrupt
from fused_preact.train import console, weights
from fused_preact.train.data import normalise, views


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first first."""

    image: str
    labels: list[int]
    names: list[str]
    probabilities: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = zip(self.labels, self.names, self.probabilities, strict=True)
        return {
            "image": self.image,
            "top": [{"label": label, "class": name, "probability": share} for label, name, share in rows],
        }

    def __str__(self) -> str:
        rows = zip(self.names, self.probabilities, strict=True)
        return "\n".join([self.image, *(f"  {100 * share:6.2f} %  {name}" for name, share in rows)])


class Predictor:
    """A model with the preprocessing of its training: ``Predictor(weights.read(path))``.

    Images of files are resized and cropped as in the tests of the recipe (``val_img_size``, ``crop_pct``). Where the
    training images all had one size (digits, CIFAR) the centred square is resized to it; for digits it is made grey,
    and the strokes have to be the bright part.
    """

    def __init__(self, found: weights.Weights, device: str = "cpu") -> None:
        self.recipe, self.card, self.device = found.config.recipe, found.card, torch.device(device)
        model = weights.build(found)
        weights.load_into(model, found.state, "checkpoint")
        self.model: nn.Module = model.to(self.device).eval()
        mean = self.card["pixel_mean"]
        self.pixel_mean: Tensor | None = None if mean is None else mean.to(self.device)

    def read(self, path: str | Path) -> Tensor:
        """The bytes of an image as the training had them, [views,C,H,W]. OSError or ValueError for no whole image."""
        decoder = views.Decoder(Path(path).read_bytes())
        if self.card["image_size"] is None:
            boxes = views.test_boxes(decoder.width, decoder.height, self.recipe)
            pixels = decoder.views(boxes, self.recipe.val_img_size or 224, self.recipe.interpolation)
        else:
            pixels = decoder.views(
                [views.centre(decoder.width, decoder.height)], max(self.card["image_size"]), "bicubic"
            )
        found = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if self.card["image_size"] is None and self.recipe.ten_crop:
            found = torch.cat([found, found.flip(-1)])
        if self.card["in_channels"] == 1:
            grey = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601
            found = (found * grey).sum(1, keepdim=True)
        return found * (self.card["white"] / 255) if self.card["white"] != 255 else found

    def logits(self, images: Tensor) -> Tensor:
        """Logits [N,classes] of ``images`` [N,views,C,H,W] as ``read`` gives them: the mean over the views."""
        count, several = images.shape[:2]
        flat = normalise(images.flatten(0, 1).to(self.device), self.recipe, self.pixel_mean)
        with torch.inference_mode():
            return self.model(flat).float().unflatten(0, (count, several)).mean(1).cpu()

    def __call__(self, paths: Sequence[str], topk: int = 5) -> list[Prediction]:
        """The ``topk`` most probable classes of each image."""
        return self.of(paths, torch.stack([self.read(path) for path in paths]), topk)

    def of(self, names: Sequence[str], images: Tensor, topk: int) -> list[Prediction]:
        """The same of images that are read already; ``names`` are what to call them."""
        classes = self.card["class_names"]
        shares, labels = self.logits(images).softmax(1).topk(min(topk, len(classes)))
        return [
            Prediction(name, found, [classes[label] for label in found], probabilities)
            for name, found, probabilities in zip(names, labels.tolist(), shares.tolist(), strict=True)
        ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(message)
        self.exit(2)


def _complain(message: str) -> None:
    with suppress(OSError):
        console.write(sys.stderr, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """All flags."""
    top = _Parser(
        prog="python -m fused_preact.predict",
        description="The most probable classes of images, by a checkpoint with its own preprocessing.",
    )
    top.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's folder, a checkpoint or a file of --export (.safetensors)",
    )
    top.add_argument("images", metavar="IMAGE", nargs="+", help="image files of any format that Pillow reads")
    top.add_argument("--topk", type=int, default=5, metavar="K", help="classes an image (default: 5)")
    top.add_argument("--json", action="store_true", help="a JSON list instead of text")
    top.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda or cuda:N")
    top.add_argument("-b", "--batch-size", type=int, default=16, metavar="N", help="images at once (16)")
    return top


def _readable(predictor: Predictor, paths: Sequence[str], bad: list[str]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            yield path, predictor.read(path)
        except Exception as error:  # a decoder raises a dozen kinds over damaged bytes
            bad.append(path)
            _complain(f"{path}: cannot be read ({console.one_line(error)})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0; 1 where an image could not be read, the others being predicted; 2 for other bad input; 130 for Ctrl-C.
    """
    try:
        args = parser().parse_args(argv)
        for name in ("topk", "batch_size"):
            if getattr(args, name) < 1:
                _complain(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
                return 2
        try:
            predictor = Predictor(weights.read(args.checkpoint), args.device)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            _complain(console.one_line(error))
            return 2
        _interrupt.loaded()
        bad: list[str] = []
        made: list[Prediction] = []
        waiting: list[tuple[str, Tensor]] = []

        def serve() -> None:
            found = predictor.of([p for p, _ in waiting], torch.stack([i for _, i in waiting]), args.topk)
            waiting.clear()
            made.extend(found)
            if not args.json:
                console.write(sys.stdout, "".join(f"{one}\n" for one in found))

        for item in _readable(predictor, args.images, bad):
            waiting.append(item)
            if len(waiting) == args.batch_size:
                serve()
        if waiting:
            serve()
        if args.json:
            console.write(sys.stdout, json.dumps([one.to_dict() for one in made], indent=2) + "\n")
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    except OSError as error:  # a full disk behind stdout
        _complain(console.one_line(error))
        return 1
    except KeyboardInterrupt:
        with suppress(OSError):
            console.write(sys.stderr, "\ninterrupted\n")
        return 130
    return 1 if bad else 0


if __name__ == "__main__":
    status = main()
    if status == 130:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os._exit(status)
    sys.exit(status)
