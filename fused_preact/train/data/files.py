"""Images that are decoded while the model trains: worker processes make bytes of one size, the device the rest."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import Recipe
from . import colour, draws
from .index import Index
from .memory import normalise
from .views import Decoder, test_boxes, training_box

TRIES = 100  # unreadable images in a row: then it is something else than single damaged files


@dataclass(frozen=True)
class Request:
    """One batch: the images ``numbers``, at ``positions`` of ``epoch``, or as in a test where ``epoch`` is None."""

    recipe: Recipe
    numbers: np.ndarray
    seed: int = 0
    epoch: int | None = None
    positions: range = range(0)


@dataclass
class Made:
    """A batch as it comes from a worker."""

    images: Tensor
    """uint8 [N,views,H,W,3]."""
    labels: Tensor
    maps: Tensor | None
    """float32 [N,3,4], the maps of the colours, where the recipe changes them."""
    bad: dict[int, str]
    """Images that could not be read, and why."""
    failed: bool = False

    def pin_memory(self) -> Made:
        """In pages that a GPU copies from without waiting; DataLoader calls it."""
        maps = None if self.maps is None else self.maps.pin_memory()
        return Made(self.images.pin_memory(), self.labels.pin_memory(), maps, self.bad, self.failed)


class Unreadable(OSError):
    """An image cannot be read, and the run is not to go on without it."""


class _Decoding(Dataset[Made]):
    """Makes the batch of a request; what a worker process holds."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def __getitem__(self, request: Request) -> Made:
        images: list[Tensor] = []
        labels: list[int] = []
        maps: list[np.ndarray | None] = []
        bad: dict[int, str] = {}
        for place, number in enumerate(request.numbers.tolist()):
            for tried in range(number, number + TRIES):
                candidate = tried % len(self.index)
                try:
                    pixels, colours = self._view(request, place, candidate)
                except Exception as error:  # a decoder raises a dozen kinds over damaged bytes
                    bad[candidate] = " ".join(str(error).split()) or type(error).__name__
                    continue
                images.append(torch.from_numpy(pixels))
                labels.append(int(self.index.labels[candidate]))
                maps.append(colours)
                break
            else:
                return Made(torch.empty(0), torch.empty(0), None, bad, failed=True)
        if not images:  # a rank's share of a last batch
            size = request.recipe.val_img_size or 0
            nothing = torch.empty(0, 5 if request.recipe.ten_crop else 1, size, size, 3, dtype=torch.uint8)
            return Made(nothing, torch.empty(0, dtype=torch.int64), None, bad)
        drawn = [each for each in maps if each is not None]
        return Made(
            torch.stack(images),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(np.stack(drawn)) if drawn else None,
            bad,
        )

    def _view(self, request: Request, place: int, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 [views,size,size,3] and the map of the colours of one image."""
        recipe, decoder = request.recipe, Decoder(self.index.read(number))
        if request.epoch is None:
            boxes = test_boxes(decoder.width, decoder.height, recipe)
            return decoder.views(boxes, recipe.val_img_size or 0, recipe.interpolation), None
        chance = random.Random(draws.derive(request.seed, "image", request.epoch, request.positions[place]))
        box = training_box(decoder.width, decoder.height, recipe, chance)
        drawn = chance.choice(("bilinear", "bicubic"))
        interpolation = drawn if recipe.train_interpolation == "random" else recipe.train_interpolation
        mirrored = chance.random() < 0.5
        pixels = decoder.views([box], recipe.img_size or 0, interpolation)
        if recipe.flip and mirrored:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        if not (recipe.color_jitter or recipe.lighting):
            return pixels, None
        return pixels, colour.draw(recipe, pixels.mean((0, 1, 2)), chance)


class _Requests(Sampler[Request]):
    """The batches of the next pass: DataLoader sends them to its workers as if they were indices."""

    def __init__(self) -> None:
        self.next: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.next)

    def __len__(self) -> int:
        return len(self.next)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the one that trains decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _signals_of_a_parent() -> Iterator[None]:
    """While workers start: none dies of a Ctrl-C before it ignores it, and PyTorch's SIGCHLD handler does not stay.

    That handler raises wherever the main thread happens to be, in the middle of a checkpoint too. Without it a dead
    worker is noticed where its batch is waited for.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Files:
    """A split whose images are decoded when they are needed: ``batches.Source``.

    An image that cannot be read is replaced by the next one in the index that can, in training and in a test, and
    counted in ``bad``; with ``on_bad_image="error"`` it raises Unreadable. A worker that dies raises
    ChildProcessError. One pass at a time: a new one ends the old one.
    """

    def __init__(
        self,
        index: Index,
        num_classes: int,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
        on_bad_image: str = "skip",
    ) -> None:
        self.index, self.num_classes = index, num_classes
        self.device, self.workers, self.on_bad_image = torch.device(device), workers, on_bad_image
        self.bad: dict[int, str] = {}
        self._requests, self._pass = _Requests(), 0
        self._made: DataLoader[Made] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def spread(self, images: int | None) -> Files:
        """``images`` of them at equal distances in the index, or all: ``batches.Source``."""
        if images is None:
            return self
        return Files(
            self.index.spread(images),
            self.num_classes,
            device=self.device,
            workers=self.workers,
            on_bad_image=self.on_bad_image,
        )

    def note(self) -> str | None:
        """How many images could not be read so far, with the first of them; None for none."""
        if not self.bad:
            return None
        number = min(self.bad)
        count = f"{len(self.bad)} image{'s' * (len(self.bad) > 1)}"
        return f"{count} could not be read, others took their place: {self._blame(number)}"

    def augmented(
        self, recipe: Recipe, seed: int, epoch: int, order: Tensor, parts: Sequence[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``order[part]``, cropped, mirrored and coloured by ``recipe``: ``batches.Source``."""
        numbers = order.numpy()
        requests = [
            Request(recipe, numbers[part], seed, epoch, range(part.start, part.stop)) for part in parts
        ]
        for made in self._batches(requests):
            images = made.images.to(self.device, non_blocking=True).squeeze(1)
            if made.maps is None:
                images = normalise(images.permute(0, 3, 1, 2), recipe)
            else:
                images = colour.apply(images, made.maps.to(self.device, non_blocking=True), recipe)
            yield images, made.labels.to(self.device, non_blocking=True)

    def plain(self, recipe: Recipe, parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``part``, the centre of each image; with ``ten_crop`` [N,10,C,H,W]: ``batches.Source``.

        The ten are centre, upper left, upper right, lower left, lower right, and the mirror images of these.
        """
        requests = [Request(recipe, np.arange(part.start, part.stop)) for part in parts]
        for made in self._batches(requests):
            images = made.images.to(self.device, non_blocking=True)
            views = images.shape[1]
            flat = normalise(images.flatten(0, 1).permute(0, 3, 1, 2), recipe)
            if recipe.ten_crop:
                several = flat.unflatten(0, (-1, views))
                flat = torch.cat([several, several.flip(-1)], 1)
            yield flat, made.labels.to(self.device, non_blocking=True)

    def _batches(self, requests: Sequence[Request]) -> Iterator[Made]:
        self._pass += 1
        current, self._requests.next = self._pass, requests
        with _signals_of_a_parent(), self._deaths_named():
            made = iter(self._loader())
        for _ in requests:
            if self._pass != current:
                raise RuntimeError("a new pass over these images began before this one ended")
            with self._deaths_named():
                batch = next(made)
            self._look_at(batch)
            yield batch

    @contextmanager
    def _deaths_named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self._made = None  # with new ones if there is a next pass
            raise ChildProcessError(
                f"a process that decodes images has died ({' '.join(str(error).split())}); out of memory, or of "
                f"shared memory (/dev/shm)? try fewer --workers (now {self.workers})"
            ) from error

    def _loader(self) -> DataLoader[Made]:
        if self._made is None:
            self._made = DataLoader(
                _Decoding(self.index),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # its seed for the workers is not to come out of the model's stream
            )
        return self._made

    def _look_at(self, batch: Made) -> None:
        self.bad.update(batch.bad)
        if batch.failed:
            first = min(batch.bad)
            raise Unreadable(f"{TRIES} images in a row cannot be read: {self._blame(first)}")
        if batch.bad and self.on_bad_image == "error":
            raise Unreadable(f"{self._blame(min(batch.bad))}; --on-bad-image skip would take the next image")

    def _blame(self, number: int) -> str:
        return f"{self.index.name(number)}: {self.bad[number]}"
