"""The data sets, held whole on the device as bytes, and the augmented batches drawn from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import cifar
from .config import Recipe, recipe_for

DIGITS_TEST = 500  # of 1,797; a wrong image is 0.2 %
DIGITS_SPLIT_SEED = 0  # the split belongs to the data set: it does not change with --seed


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,C,H,W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def first(self, limit: int | None) -> Split:
        """The first ``limit`` images, or all."""
        return Split(self.images[:limit], self.labels[:limit])


@dataclass(frozen=True)
class DataSet:
    """A training and a test split."""

    name: str
    num_classes: int
    train: Split
    test: Split

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1]


def load(
    name: str,
    data_dir: str | None = None,
    device: torch.device | str = "cpu",
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> DataSet:
    """Data set ``name`` on ``device``; ``data_dir`` is for CIFAR, the limits are for quick trials."""
    recipe_for(name)  # raises for an unknown name
    if name == "digits":
        train, test, num_classes = *_digits(), 10
    else:
        arrays, num_classes = cifar.read(name, data_dir), cifar.LAYOUTS[name].num_classes
        train, test = (Split(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in arrays)
    device = torch.device(device)
    return DataSet(name, num_classes, train.first(limit_train).to(device), test.first(limit_test).to(device))


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 scans, 8x8 pixels of 0 to 16, fed as they are: 8x8 maps end as 2x2, which is enough."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "data='digits' comes with scikit-learn, which is not installed: pip install 'fused_preact[train]'"
        ) from error
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    images = bunch.images.astype(np.uint8)[:, None]
    # Stratified: each class gives its share of the test images, the largest remainders rounded up.
    share = np.bincount(labels) * DIGITS_TEST / len(labels)
    quota = np.floor(share).astype(int)
    quota[np.argsort(quota - share, kind="stable")[: DIGITS_TEST - quota.sum()]] += 1
    order = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(labels))
    in_test = np.zeros(len(labels), dtype=bool)
    for digit, count in enumerate(quota):
        in_test[order[labels[order] == digit][:count]] = True
    train, test = order[~in_test[order]], order[in_test[order]]
    as_split = [Split(torch.from_numpy(images[i]), torch.from_numpy(labels[i])) for i in (train, test)]
    return as_split[0], as_split[1]


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Bytes to floats of about zero mean and unit deviation per channel, channels_last."""
    mean = torch.tensor(recipe.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(recipe.std, device=images.device).view(1, -1, 1, 1)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, pad: int, offsets: Tensor, flips: Tensor | None) -> Tensor:
    """Flip where ``flips`` [N] says so, pad with ``pad`` zeros, crop at ``offsets`` [N,2] (row, column).

    ``images`` are normalised already, so the zeros are the mean colour and not black.
    Returns channels_last: the gather below makes NHWC in one pass.
    """
    n, _, height, width = images.shape
    if flips is not None:
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    images = F.pad(images, (pad, pad, pad, pad))
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    cols = offsets[:, 1:] + torch.arange(width, device=images.device)
    index = torch.arange(n, device=images.device).view(n, 1, 1)
    return images[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def starts(images: int, batch_size: int, *, at_least: int = 1) -> range:
    """Where the batches of one pass begin; a last one of fewer than ``at_least`` images is left out."""
    return range(0, images - at_least + 1, batch_size)


class Batches:
    """Shuffled, augmented training batches.

    All randomness comes from ``generator``, which lives on the CPU: its state in a checkpoint makes a resume
    exact, and every device sees the same batches.

    A batch has at least two images, for BN cannot train on one value per channel, which is all that one image gives
    where a map has shrunk to 1x1: an image left over at the end of an epoch is left out, another one each epoch.
    Raises ValueError for a split that holds fewer than two.
    """

    def __init__(self, split: Split, recipe: Recipe, seed: int) -> None:
        if len(split) < 2:
            raise ValueError(f"train={len(split)} images: BN needs at least 2 to train on")
        self.split = split
        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(starts(len(self.split), self.recipe.batch_size, at_least=2))

    @property
    def images(self) -> int:
        """Images of an epoch: all, or all but the one left over."""
        return min(len(self.split), len(self) * self.recipe.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the split, the last batch as it comes. Draws the whole epoch's randomness first."""
        n, recipe, device = len(self.split), self.recipe, self.split.labels.device
        order = torch.randperm(n, generator=self.generator).to(device)
        offsets = torch.randint(0, 2 * recipe.pad + 1, (n, 2), generator=self.generator).to(device)
        flips = torch.randint(0, 2, (n,), generator=self.generator).bool().to(device) if recipe.flip else None
        for start in starts(n, recipe.batch_size, at_least=2):
            chosen = order[start : start + recipe.batch_size]
            part = slice(start, start + len(chosen))
            images = normalise(self.split.images[chosen], recipe)
            flip = None if flips is None else flips[part]
            yield augment(images, recipe.pad, offsets[part], flip), self.split.labels[chosen]
