"""Which images make which batch of which process: arithmetic, the same for images in memory and in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from ..config import Recipe
from . import draws
from .mix import mixed

Batch = tuple[Tensor, Tensor]  # images float [N,C,H,W], labels int64 [N] or, mixed, float [N,classes]


class Source(Protocol):
    """Labelled images: ``memory.Split`` holds them on the device, ``files.Files`` decodes them in processes."""

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def spread(self, images: int | None) -> Source:
        """``images`` of them at equal distances, or all."""
        ...

    def augmented(
        self, recipe: Recipe, seed: int, epoch: int, order: Tensor, parts: Sequence[slice]
    ) -> Iterator[Batch]:
        """For each of ``parts``, slices of positions in the epoch, its images ``order[part]``, augmented.

        What is drawn for an image depends on ``seed``, ``epoch`` and its position alone.
        """
        ...

    def plain(self, recipe: Recipe, parts: Sequence[slice]) -> Iterator[Batch]:
        """The images at ``parts`` as in a test; float [N,views,C,H,W] where the recipe takes several views."""
        ...


def starts(images: int, batch_size: int, *, at_least: int = 1) -> range:
    """Where the batches of one pass begin; a last one of fewer than ``at_least`` images is left out."""
    return range(0, max(images - at_least + 1, 0), batch_size)


def share(start: int, stop: int, rank: int, world: int, *, pairs: bool = False) -> slice:
    """The part of ``start`` to ``stop`` that is ``rank``'s: contiguous, sizes that differ by at most one image.

    With ``pairs`` a part is of whole pairs, which are counted from ``start``; an odd last image is the last rank's.
    """
    step = 2 if pairs else 1
    size, more = divmod((stop - start) // step, world)
    begin = start + step * (rank * size + min(rank, more))
    return slice(begin, stop if rank == world - 1 else begin + step * (size + (rank < more)))


class Batches:
    """Shuffled, augmented training batches of one process, each a pure function of its place.

    The batch of step ``s`` in epoch ``e`` is images ``s * batch_size`` and following of a permutation that depends on
    (seed, e) alone; rank r of ``world`` takes its contiguous share of them. What augments an image depends on (seed,
    e, position in the epoch), what mixes a batch on (seed, e, s). So nothing has to be saved to go on inside an
    epoch, on however many processes, and all ranks together see what one process sees.

    A batch gives every rank at least two images, for BN cannot train on one value per channel, which is all that one
    image gives where a map has shrunk to 1x1: a last batch of fewer than ``2 * world`` images is left out, others
    each epoch. The shares of a last batch can differ by one image: weigh a rank's mean loss with
    ``len(labels) * world / count(step)`` where gradients are averaged over ranks.

    Raises ValueError for fewer images than a batch has, and for a batch size that ``world`` does not divide.
    """

    def __init__(self, source: Source, recipe: Recipe, seed: int, *, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}, world={world}: allowed: 0 to world-1")
        self.mixes = recipe.mixup > 0 or recipe.cutmix > 0
        unit = 2 * world if self.mixes and world > 1 else world
        if recipe.batch_size % unit or recipe.batch_size < 2 * world:
            pairs = ", in pairs for mixup and cutmix" if unit > world else ""
            allowed = f"multiples of {unit} from {2 * world}"
            raise ValueError(
                f"batch_size={recipe.batch_size}, world={world}: every process must take the same share of a batch"
                f"{pairs}, at least 2 images; allowed: {allowed}"
            )
        if len(source) < 2 * world:
            ranks = "" if world == 1 else f" for each of {world} processes"
            raise ValueError(f"train={len(source)} images: BN needs at least 2 to train on{ranks}")
        if len(source) < recipe.batch_size:
            raise ValueError(
                f"train={len(source)} images, batch_size={recipe.batch_size}: fewer images than a batch; allowed: "
                f"batches of up to {len(source)}"
            )
        self.source, self.recipe, self.seed = source, recipe, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(starts(len(self.source), self.recipe.batch_size, at_least=2 * self.world))

    @property
    def images(self) -> int:
        """Images of an epoch over all ranks: all, or all but those left over."""
        return min(len(self.source), len(self) * self.recipe.batch_size)

    def count(self, step: int) -> int:
        """Images of the batch of ``step`` over all ranks."""
        return min(self.recipe.batch_size, len(self.source) - step * self.recipe.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch``, counted from 0, from step ``start`` on: images on the device, and labels.

        Images are float32 [N,C,H,W], channels_last. Labels are int64 [N]; with mixup or cutmix float32 [N,classes].
        ``torch.nn.functional.cross_entropy`` takes both.
        """
        steps = range(start, len(self))
        size = self.recipe.batch_size
        parts = [
            share(step * size, step * size + self.count(step), self.rank, self.world, pairs=self.mixes)
            for step in steps
        ]
        order = draws.permutation(len(self.source), self.seed, epoch)
        for step, batch in zip(
            steps, self.source.augmented(self.recipe, self.seed, epoch, order, parts), strict=True
        ):
            yield self._mixed(batch, epoch, step) if self.mixes else batch

    def _mixed(self, batch: Batch, epoch: int, step: int) -> Batch:
        chance = draws.generator(self.seed, "mix", epoch, step)
        return mixed(*batch, self.source.num_classes, self.recipe, chance)


def plain_batches(
    source: Source, recipe: Recipe, *, rank: int = 0, world: int = 1, at_least: int = 1
) -> Iterator[Batch]:
    """Every image of ``source`` once, in order, not augmented; each batch is shared out as in training.

    All ranks get the same number of batches; a rank's share of the last one can be empty. ``at_least`` images for
    each rank: a last batch with fewer is left out (2 where BN trains on them). Batches of images in ten crops are a
    tenth as large.
    """
    size, images = recipe.batch_size, len(source)
    if recipe.ten_crop:
        size = max(size // 10, at_least * world)
    least = 1 if at_least == 1 else at_least * world
    begins = starts(images, size, at_least=least)
    parts = [share(start, min(start + size, images), rank, world) for start in begins]
    return source.plain(recipe, parts)
