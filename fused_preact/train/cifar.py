"""Reader of the standard binary CIFAR archives: the packed ``.tar.gz`` or the folder unpacked from it."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Where the records are, how many each file holds, and the label bytes before each image."""

    archive: str
    folder: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    label_bytes: int  # the last one is the class; CIFAR-100 puts its coarse class before it
    num_classes: int


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

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N,3,32,32], labels int64 [N]


def read(name: str, data_dir: str | None) -> tuple[Arrays, Arrays]:
    """(train, test) of ``cifar10`` or ``cifar100``.

    ``data_dir`` holds the archive, or the folder unpacked from it, or is that folder.
    Raises FileNotFoundError for a missing file and ValueError for a truncated or damaged one.
    """
    layout = LAYOUTS[name]
    if data_dir is None:
        raise ValueError(f"data_dir=None: --data {name} needs --data-dir, a folder with {layout.archive}")
    root = Path(data_dir)
    files = {**layout.train, **layout.test}
    for folder in (root / layout.folder, root):
        # One file is enough to choose the folder: the others must then be there too.
        if any((folder / file).exists() for file in files):
            raw = {file: _read_file(folder / file) for file in files}
            return _decode(raw, layout.train, layout, str(folder)), _decode(
                raw, layout.test, layout, str(folder)
            )
    archive = root / layout.archive
    if archive.exists():
        raw = _read_archive(archive, layout)
        return _decode(raw, layout.train, layout, str(archive)), _decode(
            raw, layout.test, layout, str(archive)
        )
    raise FileNotFoundError(
        f"data_dir={data_dir!r}: no {layout.archive}, no {layout.folder}/ and no .bin files in it; get the "
        f"*binary* version from https://www.cs.toronto.edu/~kriz/{layout.archive}"
    )


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"data_dir={str(path.parent)!r}: {path.name} is missing")
    return path.read_bytes()


def _read_archive(archive: Path, layout: Layout) -> dict[str, bytes]:
    """The wanted members, read in place: nothing is unpacked to disk, so no member name can do harm."""
    wanted = {f"{layout.folder}/{file}": file for file in (*layout.train, *layout.test)}
    raw: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                stream = tar.extractfile(member) if name in wanted else None
                if stream is not None:
                    raw[wanted[name]] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        size = archive.stat().st_size
        raise ValueError(f"{archive}: truncated or damaged archive of {size} bytes ({error})") from error
    missing = [name for name, file in wanted.items() if file not in raw]
    if missing:
        raise FileNotFoundError(f"{archive}: {', '.join(missing)} missing from the archive")
    return raw


def _decode(raw: Mapping[str, bytes], files: Mapping[str, int], layout: Layout, where: str) -> Arrays:
    record = layout.label_bytes + IMAGE_BYTES
    parts = []
    for file, count in files.items():
        if len(raw[file]) != count * record:
            raise ValueError(
                f"{where}: {file} has {len(raw[file])} bytes, expected {count * record} "
                f"({count} records of {record}); truncated, or not the binary version"
            )
        parts.append(np.frombuffer(raw[file], dtype=np.uint8).reshape(count, record))
    records = np.concatenate(parts)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.num_classes:
        raise ValueError(f"{where}: label {labels.max()} found, allowed: 0 to {layout.num_classes - 1}")
    return records[:, layout.label_bytes :].reshape(-1, *IMAGE_SHAPE), labels
