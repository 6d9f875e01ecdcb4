"""The flags of data, augmentation and recipe, named as in timm's train.py where it has them."""

from __future__ import annotations

import argparse
from typing import Any

from .config import DATASETS, INTERPOLATIONS, ON_BAD_IMAGE

# Fields of the recipe and of the configuration that a flag of this file sets; each flag's default is None.
RECIPE = (
    "warmup_lr",
    "smoothing",
    "mixup",
    "cutmix",
    "mixup_prob",
    "mixup_switch_prob",
    "flip",
    "img_size",
    "scale",
    "ratio",
    "train_interpolation",
    "color_jitter",
    "lighting",
    "val_img_size",
    "crop_pct",
    "interpolation",
    "ten_crop",
)
TEST = ("val_img_size", "crop_pct", "interpolation", "ten_crop")  # of the recipe: what --eval may change
CONFIG = ("data", "train_split", "val_split", "limit_train", "limit_test")
MACHINE = (
    "data_dir",
    "download",
    "workers",
    "on_bad_image",
)  # free to change on resume: the batches stay the same


class _Numbers(argparse.Action):
    """``nargs=2`` as the tuple that a recipe holds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def add_data(group: Any) -> None:
    """What to train on."""
    group.add_argument("--data", choices=DATASETS, help="data set (default: the recipe's, or digits)")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="CIFAR: folder of the binary archive, packed or unpacked. imagenet: folder with train/ and val/, a "
        "folder for each class in them, or with the shards train-*.tar and val-*.tar",
    )
    group.add_argument(
        "--download",
        action="store_const",
        const=True,
        help="fetch CIFAR's archive into --data-dir if missing",
    )
    group.add_argument("--train-split", metavar="NAME", help="name of the training folder or shards (train)")
    group.add_argument("--val-split", metavar="NAME", help="name of the test folder or shards (val)")
    group.add_argument(
        "--limit-train",
        type=int,
        metavar="N",
        help="N training images, for a trial (of files evenly spread)",
    )
    group.add_argument("--limit-test", type=int, metavar="N", help="N test images, for a trial")


def add_recipe(group: Any) -> None:
    """Augmentation and labels; the default of each is the recipe's."""
    group.add_argument(
        "--bn-images",
        type=int,
        metavar="N",
        help="training images for --bn-recalibrate, at equal distances (all)",
    )
    group.add_argument("--warmup-lr", type=float, metavar="X", help="where the warm-up begins")
    group.add_argument("--smoothing", type=float, metavar="X", help="label smoothing")
    group.add_argument("--mixup", type=float, metavar="A", help="mixup with Beta(A, A); 0 is off")
    group.add_argument("--cutmix", type=float, metavar="A", help="cutmix with Beta(A, A); 0 is off")
    group.add_argument("--mixup-prob", type=float, metavar="P", help="share of the batches that are mixed")
    group.add_argument("--mixup-switch-prob", type=float, metavar="P", help="cutmix's share, if both are on")
    group.add_argument(
        "--no-hflip", dest="flip", action="store_const", const=False, help="no mirrored images"
    )
    group.add_argument("--img-size", type=int, metavar="N", help="imagenet: pixels of a training crop")
    for name, what in (("--scale", "area of a training crop, shares"), ("--ratio", "its aspect")):
        group.add_argument(
            name, nargs=2, type=float, action=_Numbers, metavar=("MIN", "MAX"), help=f"imagenet: {what}"
        )
    group.add_argument(
        "--train-interpolation", choices=(*INTERPOLATIONS, "random"), help="imagenet: resizing"
    )
    group.add_argument(
        "--color-jitter", type=float, metavar="X", help="imagenet: brightness, contrast, saturation"
    )
    group.add_argument(
        "--lighting", type=float, metavar="X", help="imagenet: deviation of AlexNet's PCA noise"
    )
    group.add_argument("--val-img-size", type=int, metavar="N", help="imagenet: pixels of a test crop")
    group.add_argument("--crop-pct", type=float, metavar="X", help="imagenet: test crop / shorter side")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="imagenet: resizing for a test")
    group.add_argument(
        "--ten-crop",
        action="store_const",
        const=True,
        help="imagenet: test on centre and corners, each mirrored too",
    )


def add_weights(group: Any) -> None:
    """Weights from and for elsewhere."""
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="begin with the weights of a checkpoint or a .safetensors file of the same network",
    )
    group.add_argument(
        "--export",
        metavar="FILE",
        help="at the end, or with --eval, write the weights as a .safetensors file",
    )


def add_loading(group: Any) -> None:
    """How files become batches."""
    group.add_argument(
        "-j", "--workers", type=int, metavar="N", help="imagenet: decoding processes (default: 4)"
    )
    group.add_argument(
        "--on-bad-image",
        choices=ON_BAD_IMAGE,
        help="imagenet: an image that cannot be read is counted and the next one taken, or ends the run (skip)",
    )
