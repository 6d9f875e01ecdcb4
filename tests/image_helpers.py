"""A tree of real photographs for the tests of ImageNet's data: crops of the two that scikit-learn ships."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from fused_preact.train.data import load

CLASSES = ("china", "flower", "mirror")  # the third: upside-down flowers


def photographs(split: str, per_class: int) -> Iterator[tuple[str, int, bytes]]:
    """(class/name, label, JPEG) of crops between 40 and 120 pixels, other ones for each split."""
    china, flower = load_sample_images().images
    rng = np.random.default_rng({"train": 0, "val": 1}[split])
    for label, (name, source) in enumerate(zip(CLASSES, (china, flower, flower[::-1]), strict=True)):
        for number in range(per_class):
            height, width = rng.integers(40, 120, 2)
            top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
            file = io.BytesIO()
            Image.fromarray(source[top : top + height, left : left + width]).save(file, "JPEG", quality=85)
            yield f"{name}/{name}_{number:04d}.JPEG", label, file.getvalue()


def write_folders(root: Path, train: int = 40, val: int = 10) -> Path:
    for split, count in (("train", train), ("val", val)):
        for name, _, content in photographs(split, count):
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, train: int = 40, val: int = 10) -> Path:
    """The same images in the same order in two shards a split."""
    root.mkdir(exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        images = list(photographs(split, count))
        half = len(images) // 2
        for shard, part in enumerate((images[:half], images[half:])):
            with tarfile.open(root / f"{split}-{shard:06d}.tar", "w") as tar:
                for number, (name, label, content) in enumerate(part):
                    key = f"{shard:03d}{number:05d}"
                    add(tar, f"{key}.cls", str(label).encode())
                    add(tar, f"{key}.jpg", content)
                    add(tar, f"{key}.json", f'{{"name": "{name}"}}'.encode())
    (root / "classnames.txt").write_text("\n".join(CLASSES))
    return root


def data_of(root: Path, **options: Any) -> Any:
    return load("imagenet", str(root), **options)


def damage(root: Path) -> list[Path]:
    paths = sorted((root / "train" / "flower").iterdir())[2:5]
    paths[0].write_bytes(paths[0].read_bytes()[:700])
    paths[1].write_text("<html>not found</html>")
    paths[2].write_bytes(b"")
    return paths
