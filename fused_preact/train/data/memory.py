"""Data sets held whole on the device as bytes, and their augmentation there, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe
from . import draws

DIGITS_TEST = 500  # of 1,797; a wrong image is 0.2 %
DIGITS_SPLIT_SEED = 0  # the split belongs to the data set: it does not change with --seed


def evenly(images: int, wanted: int) -> np.ndarray:
    """``wanted`` of ``images`` numbers at equal distances, or all: a part of a sorted split keeps its classes."""
    wanted = min(wanted, images)
    return np.arange(wanted, dtype=np.int64) * images // max(wanted, 1)


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,C,H,W] and labels int64 [N].

    ``pixel_mean`` float32 [C,H,W] is the mean of the *training* images, for the recipes that subtract it.
    """

    images: Tensor
    labels: Tensor
    num_classes: int = 0
    pixel_mean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.images.shape[1]

    def to(self, device: torch.device) -> Split:
        """The same split on ``device``."""
        mean = None if self.pixel_mean is None else self.pixel_mean.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), pixel_mean=mean)

    def first(self, limit: int | None) -> Split:
        """The first ``limit`` images, or all."""
        return replace(self, images=self.images[:limit], labels=self.labels[:limit])

    def spread(self, images: int | None) -> Split:
        """``images`` of them at equal distances, or all: ``batches.Source``."""
        if images is None:
            return self
        chosen = torch.from_numpy(evenly(len(self), images)).to(self.labels.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def mean_image(self) -> Tensor:
        """The mean of the images, float32 [C,H,W], of exact sums: the same on every machine."""
        return (self.images.sum(0, dtype=torch.int64).double() / max(len(self), 1)).float()

    def augmented(
        self, recipe: Recipe, seed: int, epoch: int, order: Tensor, parts: Sequence[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``order[part]``, flipped and cropped: ``batches.Source``. Draws the epoch's numbers first."""
        n, device = len(self), self.labels.device
        chance = draws.generator(seed, "crop", epoch)
        offsets = torch.randint(0, 2 * recipe.pad + 1, (n, 2), generator=chance).to(device)
        flips = torch.randint(0, 2, (n,), generator=chance).bool().to(device) if recipe.flip else None
        order = order.to(device)
        for part in parts:
            chosen = order[part]
            images = normalise(self.images[chosen], recipe, self.pixel_mean)
            flip = None if flips is None else flips[part]
            yield augment(images, recipe.pad, offsets[part], flip), self.labels[chosen]

    def plain(self, recipe: Recipe, parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``part``, normalised: ``batches.Source``."""
        for part in parts:
            yield normalise(self.images[part], recipe, self.pixel_mean), self.labels[part]


def digits() -> tuple[Split, Split]:
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


def normalise(images: Tensor, recipe: Recipe, pixel_mean: Tensor | None = None) -> Tensor:
    """Bytes to floats ``(x - mean) / std`` [N,C,H,W], channels_last.

    The mean is the recipe's per channel, or ``pixel_mean`` [C,H,W] where the recipe has ``pixel_mean=True``.
    """
    if recipe.pixel_mean:
        if pixel_mean is None:
            raise ValueError("pixel_mean=True: the mean image of the training set is not known")
        mean = pixel_mean
    else:
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
