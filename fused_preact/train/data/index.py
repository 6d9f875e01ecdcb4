"""Where the encoded images of a split are: class folders, or webdataset shards read at their members' offsets."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from .archive import Pieces, check_plain
from .memory import evenly

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
CLASS_FILE = "classnames.txt"  # beside shards: a line for each class, in the order of the numbers in .cls


class Index(Protocol):
    """The images of a split in a fixed order; small enough to send to a process that decodes."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str: ...

    def read(self, number: int) -> bytes: ...

    def spread(self, images: int) -> Index: ...


@dataclass(frozen=True)
class Folders:
    """Files of ``root``/class/.../name. One buffer of names: a list of a million strings costs ten times as much."""

    root: str
    names: np.ndarray
    """uint8: the names below ``root`` one after the other."""
    ends: np.ndarray
    starts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        """The file's path."""
        name = os.fsdecode(self.names[self.starts[number] : self.ends[number]].tobytes())
        return os.path.join(self.root, name)

    def read(self, number: int) -> bytes:
        """The file's bytes."""
        with open(self.name(number), "rb") as file:
            return file.read()

    def spread(self, images: int) -> Folders:
        """``images`` of them at equal distances."""
        chosen = evenly(len(self), images)
        return replace(self, starts=self.starts[chosen], ends=self.ends[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class Shards:
    """Members of plain tar files: which file, where in it, how long."""

    paths: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray
    _files: dict[int, int] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # a descriptor is worth nothing in another process

    def name(self, number: int) -> str:
        """The shard and the place in it."""
        return f"{self.paths[self.shard[number]]} at byte {self.offset[number]}"

    def read(self, number: int) -> bytes:
        """The member's bytes, read at its place: no position is moved, so forked processes can share the file."""
        shard = int(self.shard[number])
        if shard not in self._files:
            if len(self._files) >= 64:  # of thousands of shards; 1024 open files are a usual limit
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        size = int(self.size[number])
        content = os.pread(self._files[shard], size, int(self.offset[number]))
        if len(content) != size:
            raise OSError(f"{len(content)} of {size} bytes are there")
        return content

    def spread(self, images: int) -> Shards:
        """``images`` of them at equal distances."""
        chosen = evenly(len(self), images)
        arrays = {name: getattr(self, name)[chosen] for name in ("shard", "offset", "size", "labels")}
        return replace(self, **arrays, _files={})


def find(data_dir: str | None, splits: Sequence[str]) -> tuple[list[Index], tuple[str, ...]]:
    """The images of each of ``splits`` in ``data_dir``, and the names of the classes that they share.

    A split is a folder of class folders ``data_dir/split/class/``, searched to any depth, or the shards
    ``data_dir/split-*.tar`` with the members ``key.jpg`` and ``key.cls``, the class's number. Sorted by name.
    Raises FileNotFoundError for a missing folder and ValueError for an empty one, for classes that differ between
    the splits, and for a shard that is damaged, packed, or lacks a label.
    """
    if data_dir is None:
        raise ValueError(
            f"data_dir=None: --data imagenet needs --data-dir, a folder with {splits[0]}/ and {splits[1]}/, or with "
            f"{splits[0]}-*.tar and {splits[1]}-*.tar"
        )
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir={data_dir!r}: no such folder")
    if all((root / split).is_dir() for split in splits):
        return _find_folders(root, splits)
    shards = [sorted(str(path) for path in root.glob(f"{split}-*.tar")) for split in splits]
    for split, paths in zip(splits, shards, strict=True):
        if not paths:
            there = sorted(entry.name for entry in os.scandir(root))
            shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
            raise FileNotFoundError(
                f"data_dir={data_dir!r}: no folder {split}/ and no shards {split}-*.tar in it; it holds: "
                f"{shown or 'nothing'}"
            )
    indices = [read_shards(paths) for paths in shards]
    count = 1 + max(int(index.labels.max()) for index in indices)
    return list(indices), _shard_classes(root / CLASS_FILE, count)


def _find_folders(root: Path, splits: Sequence[str]) -> tuple[list[Index], tuple[str, ...]]:
    classes = [_class_folders(root / split) for split in splits]
    for split, names in zip(splits[1:], classes[1:], strict=True):
        for here, there, missing in (
            (splits[0], split, sorted(set(classes[0]) - set(names))),
            (split, splits[0], sorted(set(names) - set(classes[0]))),
        ):
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(
                    f"data_dir={str(root)!r}: the class folders differ: {here}/{missing[0]}{more} not in {there}/"
                )
    return [read_folders(root / split, classes[0]) for split in splits], tuple(classes[0])


def _class_folders(split: Path) -> list[str]:
    names = sorted(e.name for e in os.scandir(split) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ValueError(f"data_dir={str(split.parent)!r}: no class folders in {split.name}/")
    return names


def read_folders(split: Path, classes: Sequence[str]) -> Folders:
    """The images below ``split``/class for each of ``classes``; ValueError for a class without any."""
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        before, root = len(names), os.path.join(split, "")
        for folder, below, files in os.walk(split / name, followlinks=True):
            below.sort()
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                    names.append(os.fsencode(os.path.join(folder, file).removeprefix(root)))
        if len(names) == before:
            raise ValueError(
                f"{split / name}: a class without images; allowed are files that end in {', '.join(EXTENSIONS)}"
            )
        labels += [label] * (len(names) - before)
    ends = np.cumsum([len(name) for name in names])
    starts = np.concatenate([[0], ends[:-1]])
    return Folders(
        str(split), np.frombuffer(b"".join(names), np.uint8), ends, starts, np.array(labels, np.int64)
    )


def read_shards(paths: Sequence[str]) -> Shards:
    """The members of ``paths``: only headers and labels are read."""
    found = [_read_shard(path) for path in paths]
    shard = np.concatenate([np.full(len(part), number) for number, part in enumerate(found)])
    rows = np.array([row for part in found for row in part], dtype=np.int64).reshape(-1, 3)
    if not len(rows):
        raise ValueError(f"{paths[0]}: no images in this shard and the {len(paths) - 1} others")
    return Shards(tuple(paths), shard, rows[:, 0], rows[:, 1], rows[:, 2])


def _read_shard(path: str) -> list[tuple[int, int, int]]:
    """(offset, size, label) of each image, in the order of the archive."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    length = os.path.getsize(path)
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=Pieces(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, suffix = f"{folder}/{stem}", "." + extension.lower()
                if suffix not in (".cls", *EXTENSIONS):
                    continue
                check_plain(member)
                if member.size < 0 or member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if key in (labels if suffix == ".cls" else images):
                    raise tarfile.ReadError(f"{member.name}: a second one of its key")
                if suffix == ".cls":
                    labels[key] = _read_label(file, member)
                else:
                    images[key] = member.offset_data, member.size
            file.seek(max(length - 512, 0))
            if any(file.read(512)):
                raise tarfile.ReadError("the end is missing")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: truncated, damaged or no plain tar file, {length} bytes ({error})"
        ) from error
    for ours, others, lacks in ((images, labels, "label (.cls)"), (labels, images, "image")):
        for key in ours:
            if key not in others:
                raise ValueError(f"{path}: {key.lstrip('/')} has no {lacks}")
    return [(*images[key], labels[key]) for key in images]


def _read_label(file: BinaryIO, member: tarfile.TarInfo) -> int:
    if member.size > 20:
        raise tarfile.ReadError(f"{member.name} has {member.size} bytes, expected a number")
    file.seek(member.offset_data)  # tarfile seeks before it reads, too
    text = file.read(member.size).strip()
    if not text.isdigit() or int(text) >= 10**6:
        raise tarfile.ReadError(f"{member.name} holds {text!r}, expected a class number from 0")
    return int(text)


def _shard_classes(file: Path, count: int) -> tuple[str, ...]:
    if not file.exists():
        return tuple(map(str, range(count)))
    names = file.read_text(encoding="utf-8").splitlines()
    if len(names) < count:
        raise ValueError(f"{file}: {len(names)} names, but class {count - 1} is in the shards")
    return tuple(names)
