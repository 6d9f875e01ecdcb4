"""Reader of the standard binary CIFAR archives: the packed ``.tar.gz`` or the folder unpacked from it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from .archive import PIECE, Pieces, check_plain
from .download import ARCHIVES, fetch

IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32
MEMBERS = 1000  # the published archives have nine; a header costs memory even where its member is not wanted


@dataclass(frozen=True)
class Layout:
    """Where the records are, how many each file holds, and the label bytes before each image."""

    archive: str
    folder: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    label_bytes: int  # the last one is the class; CIFAR-100 puts its coarse class before it
    num_classes: int

    @property
    def record(self) -> int:
        """Bytes of a labelled image."""
        return self.label_bytes + IMAGE_BYTES


LAYOUTS: Mapping[str, Layout] = {
    "cifar10": Layout(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        test={"test_batch.bin": 10_000},
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": Layout(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train={"train.bin": 50_000},
        test={"test.bin": 10_000},
        label_bytes=2,
        num_classes=100,
    ),
}

# In the order of the labels: batches.meta.txt and fine_label_names.txt of the archives.
_NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
_NAMES_100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASS_NAMES: Mapping[str, tuple[str, ...]] = {
    "cifar10": tuple(_NAMES_10.split()),
    "cifar100": tuple(_NAMES_100.split()),
}

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N,3,32,32], labels int64 [N]


def read(name: str, data_dir: str | None, *, download: bool = False) -> tuple[Arrays, Arrays]:
    """(train, test) of ``cifar10`` or ``cifar100``.

    ``data_dir`` holds the archive, or the folder unpacked from it, or is that folder; with ``download`` the archive
    is fetched into it where it holds neither, and one that is there must be the published one.
    Raises FileNotFoundError for a missing file, another OSError for one that cannot be opened, and ValueError for a
    truncated or damaged one, or one that holds something else. Sizes are compared before that much is read.
    """
    layout = LAYOUTS[name]
    if data_dir is None:
        raise ValueError(f"data_dir=None: --data {name} needs --data-dir, a folder with {layout.archive}")
    root = Path(data_dir)
    files = {**layout.train, **layout.test}
    for folder in (root / layout.folder, root):
        # One file is enough to choose the folder: the others must then be there too.
        if any((folder / file).exists() for file in files):
            raw = {file: _read_file(folder / file, count, layout) for file, count in files.items()}
            return _decode(raw, layout.train, layout, str(folder)), _decode(
                raw, layout.test, layout, str(folder)
            )
    archive = root / layout.archive
    if download:
        fetch(ARCHIVES[name], archive)
    if archive.exists():
        raw = _read_archive(archive, layout)
        return _decode(raw, layout.train, layout, str(archive)), _decode(
            raw, layout.test, layout, str(archive)
        )
    raise FileNotFoundError(
        f"data_dir={data_dir!r}: no {layout.archive}, no {layout.folder}/ and no .bin files in it; --download gets "
        f"{ARCHIVES[name].url}, the *binary* version"
    )


def _check_size(where: str, file: str, found: int, count: int, layout: Layout) -> None:
    if found != count * layout.record:
        raise ValueError(
            f"{where}: {file} has {found} bytes, expected {count * layout.record} "
            f"({count} records of {layout.record}); truncated, or not the binary version"
        )


def _read_file(path: Path, count: int, layout: Layout) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"data_dir={str(path.parent)!r}: {path.name} is missing")
    _check_size(str(path.parent), path.name, path.stat().st_size, count, layout)
    return path.read_bytes()


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """``file`` behind the decompressor that its first bytes name."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    return file


def _read_archive(archive: Path, layout: Layout) -> dict[str, bytes]:
    """The wanted members, read in place: nothing is unpacked to disk, so no member name can do harm."""
    counts = {**layout.train, **layout.test}
    wanted = {f"{layout.folder}/{file}": file for file in counts}
    raw: dict[str, bytes] = {}
    with open(archive, "rb") as packed:
        try:
            stream = _unpacked(packed)
            with tarfile.open(fileobj=Pieces(stream), mode="r:") as tar:
                for number, member in enumerate(tar):
                    if number == MEMBERS or member.size < 0:
                        raise tarfile.ReadError(f"member {number} of {member.size} bytes")
                    name = member.name.removeprefix("./")
                    if name in wanted:
                        raw[wanted[name]] = _read_member(tar, member, counts[wanted[name]] * layout.record)
            while stream.read(PIECE):  # the checksum of what was read stands at the very end
                pass
        except Exception as error:  # tarfile and the decompressors raise a dozen kinds over damaged bytes
            size = archive.stat().st_size
            raise ValueError(
                f"{archive}: truncated, damaged or not the binary version, {size} bytes ({error})"
            ) from error
    missing = [name for name, file in wanted.items() if file not in raw]
    if missing:
        raise FileNotFoundError(f"{archive}: {', '.join(missing)} missing from the archive")
    return raw


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
    check_plain(member)
    if member.size != size:
        raise tarfile.ReadError(f"{member.name} has {member.size} bytes, expected {size}")
    stream = tar.extractfile(member)
    assert stream is not None  # of a plain file
    with stream:
        return b"".join(iter(lambda: stream.read(PIECE), b""))


def _decode(raw: Mapping[str, bytes], files: Mapping[str, int], layout: Layout, where: str) -> Arrays:
    parts = []
    for file, count in files.items():
        _check_size(where, file, len(raw[file]), count, layout)
        parts.append(np.frombuffer(raw[file], dtype=np.uint8).reshape(count, layout.record))
    records = np.concatenate(parts)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.num_classes:
        raise ValueError(f"{where}: label {labels.max()} found, allowed: 0 to {layout.num_classes - 1}")
    return records[:, layout.label_bytes :].reshape(-1, *IMAGE_SHAPE), labels
