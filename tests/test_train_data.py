"""Data of the training script: the digits split, the CIFAR reader, the augmentation, the batches."""

from __future__ import annotations

import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_preact.train import cifar
from fused_preact.train.config import RECIPES
from fused_preact.train.data import Batches, Split, augment, load, normalise

TINY = {
    "cifar10": replace(
        cifar.LAYOUTS["cifar10"],
        train={"data_batch_1.bin": 3, "data_batch_2.bin": 2},
        test={"test_batch.bin": 2},
    ),
    "cifar100": replace(cifar.LAYOUTS["cifar100"], train={"train.bin": 4}, test={"test.bin": 2}),
}


@pytest.fixture
def tiny_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "LAYOUTS", TINY)


def fake_files(name: str) -> dict[str, tuple[bytes, np.ndarray, np.ndarray]]:
    """Per file: its bytes, and the images and labels that a reader must find in them."""
    layout, rng, made = TINY[name], np.random.default_rng(0), {}
    for file, count in {**layout.train, **layout.test}.items():
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, layout.num_classes, count, dtype=np.uint8)
        coarse = np.full((count, layout.label_bytes - 1), 99 % layout.num_classes, dtype=np.uint8)
        raw = np.concatenate([coarse, labels[:, None], images.reshape(count, -1)], axis=1)
        made[file] = raw.tobytes(), images, labels
    return made


def write(name: str, form: str, root: Path) -> dict[str, tuple[bytes, np.ndarray, np.ndarray]]:
    layout, files = TINY[name], fake_files(name)
    if form == "archive":
        with tarfile.open(root / layout.archive, "w:gz") as tar:
            for file, (raw, _, _) in files.items():
                info = tarfile.TarInfo(f"{layout.folder}/{file}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        return files
    folder = root / layout.folder if form == "folder" else root
    folder.mkdir(exist_ok=True)
    for file, (raw, _, _) in files.items():
        (folder / file).write_bytes(raw)
    return files


@pytest.mark.parametrize("form", ["archive", "folder", "inside"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_reads_what_was_written(name: str, form: str, tmp_path: Path, tiny_layouts: None) -> None:
    files = write(name, form, tmp_path)
    data = load(name, str(tmp_path))
    assert data.num_classes == TINY[name].num_classes
    assert data.in_channels == 3
    for split, names in ((data.train, TINY[name].train), (data.test, TINY[name].test)):
        np.testing.assert_array_equal(split.images, np.concatenate([files[file][1] for file in names]))
        np.testing.assert_array_equal(split.labels, np.concatenate([files[file][2] for file in names]))


def test_cifar_names_the_truncated_file_with_its_sizes(tmp_path: Path, tiny_layouts: None) -> None:
    write("cifar10", "folder", tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 6145 bytes, expected 6146"):
        load("cifar10", str(tmp_path))


def test_cifar_names_the_truncated_archive(tmp_path: Path, tiny_layouts: None) -> None:
    write("cifar100", "archive", tmp_path)
    file = tmp_path / "cifar-100-binary.tar.gz"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"cifar-100-binary\.tar\.gz: truncated"):
        load("cifar100", str(tmp_path))


def test_cifar_names_what_is_missing(tmp_path: Path, tiny_layouts: None) -> None:
    with pytest.raises(ValueError, match="--data-dir"):
        load("cifar10")
    with pytest.raises(FileNotFoundError, match=r"data_dir=.*cifar-10-binary\.tar\.gz"):
        load("cifar10", str(tmp_path))
    write("cifar10", "folder", tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin is missing"):
        load("cifar10", str(tmp_path))


def test_cifar_refuses_impossible_labels(tmp_path: Path, tiny_layouts: None) -> None:
    write("cifar10", "folder", tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(b"\x0b" + file.read_bytes()[1:])
    with pytest.raises(ValueError, match="label 11 found, allowed: 0 to 9"):
        load("cifar10", str(tmp_path))


def test_published_layouts_have_the_published_sizes() -> None:
    for layout in cifar.LAYOUTS.values():
        assert sum(layout.train.values()) == 50_000
        assert sum(layout.test.values()) == 10_000
    assert next(iter(cifar.LAYOUTS["cifar10"].train.values())) * 3073 == 30_730_000  # bytes on disk


def test_digits_split_is_fixed_stratified_and_complete() -> None:
    data = load("digits")
    assert data.train.images.shape == (1297, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert len(data.test) == 500
    whole = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert whole.sum() == 1797
    share = torch.bincount(data.test.labels) - whole * 500 / 1797
    assert share.abs().max() < 1
    # Every scan is in exactly one split: the pixels' total is that of the source.
    from sklearn.datasets import load_digits

    assert data.train.images.sum() + data.test.images.sum() == int(load_digits().images.sum())
    assert torch.equal(load("digits").test.images, data.test.images)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"fused_preact\[train\]"):
        load("digits")


def test_unknown_data_set_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"data='mnist'.*digits, cifar10, cifar100"):
        load("mnist")


def test_augment_equals_flip_pad_crop_one_by_one() -> None:
    images = torch.randn(7, 3, 6, 5)
    offsets = torch.randint(0, 5, (7, 2))
    flips = torch.tensor([True, False, True, True, False, False, True])
    found = augment(images, 2, offsets, flips)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for i, (row, col) in enumerate(offsets.tolist()):
        image = images[i].flip(-1) if flips[i] else images[i]
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        torch.testing.assert_close(found[i], padded[:, row : row + 6, col : col + 5], rtol=0, atol=0)


def test_padding_is_the_mean_colour() -> None:
    """Zeros go in after normalisation: where the crop leaves the image, the value is 0 and not -mean/std."""
    recipe = RECIPES["cifar10"]
    images = normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), recipe)
    corner = augment(images, 4, torch.tensor([[0, 0]]), None)
    assert torch.equal(corner[0, :, :4], torch.zeros(3, 4, 32))
    expected = (255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    torch.testing.assert_close(corner[0, :, 4, 4], expected)


def test_batches_cover_the_split_and_follow_their_generator() -> None:
    recipe = replace(RECIPES["digits"], batch_size=4)
    split = Split(torch.randint(0, 17, (10, 1, 8, 8), dtype=torch.uint8), torch.arange(10))
    batches = Batches(split, recipe, seed=3)
    first = [labels for _, labels in batches.epoch()]
    assert [len(labels) for labels in first] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    state = batches.generator.get_state()
    second = [images for images, _ in batches.epoch()]
    batches.generator.set_state(state)
    for a, b in zip(second, batches.epoch(), strict=True):
        assert torch.equal(a, b[0])
    other = [labels for _, labels in Batches(split, recipe, seed=4).epoch()]
    assert not torch.equal(torch.cat(first), torch.cat(other))
