"""The data sets by name, with what a run and a checkpoint have to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import DATASETS, Config
from . import cifar, index
from .batches import Source
from .files import Files
from .memory import Split, digits


@dataclass(frozen=True)
class DataSet:
    """A training and a test split, and the names of the classes in the order of the labels."""

    name: str
    class_names: tuple[str, ...]
    train: Source
    test: Source
    in_channels: int

    @property
    def num_classes(self) -> int:
        """Classes of the data set, of which a part may be missing in a limited split."""
        return len(self.class_names)

    def notes(self) -> list[str]:
        """What a reader of the results should know: images that could not be read."""
        named = (("train", self.train), ("test", self.test))
        found = [(name, split.note()) for name, split in named if isinstance(split, Files)]
        return [f"{name}: {note}" for name, note in found if note is not None]

    def card(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, so that a prediction needs none. ``check_card`` is its other half.

        ``class_names``; ``in_channels``; ``image_size`` (height and width) and ``white``, the stored value of white,
        of images that all have one size, else None and 255; ``pixel_mean``, the mean image or None.
        """
        split = self.train if isinstance(self.train, Split) else None
        mean = None if split is None else split.pixel_mean
        return {
            "class_names": list(self.class_names),
            "in_channels": self.in_channels,
            "image_size": None if split is None else list(split.images.shape[-2:]),
            "white": 16 if self.name == "digits" else 255,
            "pixel_mean": None if mean is None else mean.cpu(),
        }


def check_card(card: object, data: DataSet | None = None) -> None:
    """ValueError unless ``card`` is what ``DataSet.card`` makes, and of the classes of ``data`` where it is given."""
    names_of = {"class_names", "in_channels", "image_size", "white", "pixel_mean"}
    if not isinstance(card, Mapping) or set(card) != names_of:
        raise ValueError("checkpoint has no class names and mean image in data_card")
    names, size, mean = card["class_names"], card["image_size"], card["pixel_mean"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("checkpoint has class_names that are no list of names")
    for name, value in (("in_channels", card["in_channels"]), ("white", card["white"])):
        if type(value) is not int or not 1 <= value <= 255:
            raise ValueError(f"checkpoint has {name} that is no number from 1 to 255")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and 1 <= n <= 4096 for n in size)
    ):
        raise ValueError("checkpoint has image_size that is neither None nor two numbers from 1 to 4096")
    if mean is not None:
        plain = isinstance(mean, Tensor) and mean.layout == torch.strided and mean.dtype == torch.float32
        if size is None or not plain or list(mean.shape) != [card["in_channels"], *size]:
            raise ValueError("checkpoint has a pixel_mean that is no float32 tensor of an image's shape")
    if data is None:
        return
    if len(names) != data.num_classes:
        raise ValueError(f"checkpoint has {len(names)} classes, this run's data has {data.num_classes}")
    for number, (found, ours) in enumerate(zip(names, data.class_names, strict=True)):
        if found != ours:
            raise ValueError(f"checkpoint has class {number} {found!r}, this run's data has {ours!r}")


def load(
    name: str,
    data_dir: str | None = None,
    device: torch.device | str = "cpu",
    limit_train: int | None = None,
    limit_test: int | None = None,
    *,
    download: bool = False,
    splits: tuple[str, str] = ("train", "val"),
    workers: int = 0,
    on_bad_image: str = "skip",
) -> DataSet:
    """Data set ``name`` on ``device``; ``data_dir`` is for CIFAR and ImageNet, the limits are for quick trials.

    The limits take the first images, of files ones at equal distances. ``download`` is CIFAR's, ``splits`` and what
    follows it ImageNet's.
    """
    if name not in DATASETS:
        raise ValueError(f"data={name!r}: unknown data set; allowed: {', '.join(DATASETS)}")
    if name == "imagenet":
        indices, class_names = index.find(data_dir, splits)
        options = {"device": device, "workers": workers, "on_bad_image": on_bad_image}
        trained, tested = (
            Files(found, len(class_names), **options).spread(limit)  # type: ignore[arg-type]
            for found, limit in zip(indices, (limit_train, limit_test), strict=True)
        )
        return DataSet(name, class_names, trained, tested, in_channels=3)
    if name == "digits":
        train, test = digits()
        class_names = tuple(map(str, range(10)))
    else:
        arrays, class_names = cifar.read(name, data_dir, download=download), cifar.CLASS_NAMES[name]
        train, test = (Split(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in arrays)
    train, test = train.first(limit_train), test.first(limit_test)
    known = partial(replace, num_classes=len(class_names), pixel_mean=train.mean_image())
    train, test = (known(split).to(torch.device(device)) for split in (train, test))
    return DataSet(name, class_names, train, test, train.in_channels)


def load_for(config: Config) -> DataSet:
    """The data of a run."""
    return load(
        config.data,
        config.data_dir,
        config.device,
        config.limit_train,
        config.limit_test,
        download=config.download,
        splits=(config.train_split, config.val_split),
        workers=config.workers,
        on_bad_image=config.on_bad_image,
    )
