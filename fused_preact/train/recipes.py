"""Recipes by name, with the source of every number. docs/recipes.md tells what differs, and why.

Sources: *paper* is "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027) with the CIFAR and ImageNet
settings of the first ResNet paper (arXiv:1512.03385) that it keeps; *FB* is facebookarchive/fb.resnet.torch; *L1k*
is KaimingHe/resnet-1k-layers, the paper's networks for FB's program. A name that ends in ``-torch`` is what FB and
L1k do, the others what the paper says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .config import DATASETS, Recipe

DIGITS = Recipe(
    name="digits",
    model="cifar_preact_resnet20",
    epochs=30,  # under a minute on 2 CPU cores
    batch_size=64,  # 21 steps an epoch
    lr=0.1,  # paper
    schedule="cosine",  # ends at zero, so the last epoch is as good as the best and needs no picking
    milestones=(),
    warmup_epochs=0.0,  # the paper finds none needed; two epochs of it changed nothing, the mean of 5 seeds
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,  # paper; 5e-4 gave 0.1 % less, the mean of 5 seeds
    decay_norm=True,
    mean=(0.0,),  # so that blank paper is 0 and every zero padding, ours and the convs', continues it
    std=(8.0,),  # half the range of 0 to 16; their root mean square is 7.8
    pad=1,  # a shift by one pixel: the digits fill the 8 pixels' height
    flip=False,  # a mirrored digit is not a digit
    compare_accuracy=True,  # the plain model trains in seconds too
)

STEPS = 391  # of 128 images in an epoch of CIFAR's 50,000
CIFAR_PAPER = Recipe(
    name="cifar10",
    model="",
    epochs=164,  # 64k iterations are 163.7
    batch_size=128,  # on 2 GPUs: its BN saw 64 images; one process here sees all 128
    lr=0.1,
    schedule="step",
    milestones=(32_000 / STEPS, 48_000 / STEPS),  # "divided by 10 at 32k and 48k iterations"
    warmup_epochs=400
    / STEPS,  # "0.01 for the first 400 iterations" of every CIFAR run, though "not necessary"
    warmup_lr=0.01,
    warmup_constant=True,
    momentum=0.9,
    nesterov=False,  # Caffe's SGD; the paper does not say
    weight_decay=1e-4,
    decay_norm=True,  # Caffe decays what it is not told to spare; the paper does not say
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),  # the paper subtracts and does not divide
    pixel_mean=True,
    pad=4,
    flip=True,
    compare_accuracy=False,  # a second run of 164 epochs is asked for with --plain, never slipped in
)
CIFAR_TORCH = replace(
    CIFAR_PAPER,
    epochs=164,  # FB's opts.lua
    batch_size=128,  # FB's TRAINING.md, on 2 GPUs
    milestones=(81, 122),  # FB's train.lua
    warmup_epochs=0.0,  # FB and L1k have none
    warmup_lr=0.0,
    warmup_constant=False,
    nesterov=True,  # FB's train.lua
    decay_norm=True,  # FB decays every parameter, those of BN and the biases included
    pixel_mean=False,
)
CIFAR_STATISTICS = {  # FB's datasets: mean and deviation per channel of the training set, 0 to 255
    "cifar10": (
        (125.3, 123.0, 113.9),
        (63.0, 62.1, 66.7),
    ),  # the often copied .2023/.1994/.2010 is not the data's
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}

IMAGENET_PAPER = Recipe(
    name="imagenet",
    model="",
    epochs=90,  # the paper does not say; "up to 60e4 iterations" of the first paper are 120, FB has 90
    batch_size=256,  # on 8 GPUs: BN saw 32 images
    lr=0.1,
    schedule="step",
    milestones=(30, 60),  # "divided by 10 at 30 and 60 epochs"
    warmup_epochs=0.0,  # "we start from 0.1 without warming up"
    momentum=0.9,
    nesterov=False,  # Caffe's SGD; the paper does not say
    weight_decay=1e-4,
    decay_norm=True,
    mean=(123.675, 116.28, 103.53),  # the means per channel: the mean image of 224 x 224 is not published
    std=(1.0, 1.0, 1.0),  # the paper subtracts and does not divide
    pad=0,
    flip=True,
    compare_accuracy=False,
    img_size=224,
    short_side=(256, 480),  # "scale augmentation": the shorter side at random, a crop of 224
    color_jitter=0.0,
    lighting=0.1,  # "the standard color augmentation" of AlexNet
    val_img_size=320,  # the rows of Table 5 that compare: "a single 320x320 crop with s = 320"
    crop_pct=1.0,
)
IMAGENET_TORCH = replace(
    IMAGENET_PAPER,
    nesterov=True,  # FB's train.lua
    mean=(123.675, 116.28, 103.53),  # FB's datasets/imagenet.lua: 0.485, 0.456, 0.406 of 255
    std=(58.395, 57.12, 57.375),  # FB: 0.229, 0.224, 0.225 of 255
    short_side=(),
    scale=(0.08, 1.0),  # FB's "scale and aspect ratio augmentation"
    ratio=(3 / 4, 4 / 3),
    color_jitter=0.4,  # FB: brightness, contrast and saturation in random order
    lighting=0.1,
    val_img_size=224,
    crop_pct=224 / 256,
)


def _recipes() -> dict[str, Recipe]:
    made = [DIGITS]
    for data, (mean, std) in CIFAR_STATISTICS.items():
        for depth in (20, 56, 110, 164, 1001):
            name, model = f"{data}-resnet{depth}", f"cifar_preact_resnet{depth}"
            made.append(replace(CIFAR_PAPER, name=name, model=model))
            torch = replace(CIFAR_TORCH, name=f"{name}-torch", model=model, mean=mean, std=std)
            if depth >= 164:  # L1k's README: -nEpochs 200 -batchSize 64 on 2 GPUs, the rate still 0.1
                torch = replace(torch, epochs=200, batch_size=64)
            made.append(torch)
    for depth in (18, 34, 50, 101, 152, 200):
        name, model = f"imagenet-resnet{depth}", f"preact_resnet{depth}"
        made.append(replace(IMAGENET_PAPER, name=name, model=model))
        made.append(replace(IMAGENET_TORCH, name=f"{name}-torch", model=model))
    return {recipe.name: recipe for recipe in made}


RECIPES: Mapping[str, Recipe] = _recipes()
DEFAULTS: Mapping[str, str] = {  # of --data alone: the smallest network, FB's numbers
    "digits": "digits",
    "cifar10": "cifar10-resnet20-torch",
    "cifar100": "cifar100-resnet20-torch",
    "imagenet": "imagenet-resnet50-torch",
}


def families() -> str:
    """The names, shortened: those that differ in the depth alone as one."""
    depths: dict[str, list[str]] = {}
    for name in RECIPES:
        if not name.endswith("-torch"):
            family, _, depth = name.partition("resnet")
            depths.setdefault(family, []).append(depth)
    return ", ".join(
        f"{family}resnet{'|'.join(found)}[-torch]" if any(found) else family
        for family, found in depths.items()
    )


def recipe_for(data: str | None = None, name: str | None = None) -> Recipe:
    """The recipe called ``name``, or the default of ``data``, or of the digits where neither is given."""
    if data is not None and data not in DATASETS:
        raise ValueError(f"data={data!r}: unknown data set; allowed: {', '.join(DATASETS)}")
    if name is None:
        name = DEFAULTS[data or "digits"]
    if name not in RECIPES:
        known = [known for known in RECIPES if data is None or RECIPES[known].data == data]
        raise ValueError(f"recipe={name!r}: unknown; allowed: {', '.join(known)}")
    if data not in (None, RECIPES[name].data):
        raise ValueError(f"recipe={name!r} is for --data {RECIPES[name].data}, --data {data} was given")
    return RECIPES[name]
