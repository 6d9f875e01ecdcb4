"""Data of the training script: the digits split, the CIFAR reader, the augmentation, the batches."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_preact.train.data import Batches, Split, augment, cifar, load, normalise, plain_batches
from fused_preact.train.recipes import RECIPES

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


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def archive_of(*members: tarfile.TarInfo) -> bytes:
    """A tar of ``members``, zeros in each as long as its size says."""
    buffer = io.BytesIO()
    for member in members:
        buffer.write(member.tobuf(tarfile.USTAR_FORMAT) if member.size >= 0 else negative(member))
        buffer.write(bytes(-(-max(member.size, 0) // 512) * 512))
    return buffer.getvalue() + bytes(1024)


def negative(member: tarfile.TarInfo) -> bytes:
    """A header whose size is below zero, which base 256 can say and tarfile's writer would not."""
    size, member.size = member.size, 0
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


WANTED = "cifar-10-batches-bin/test_batch.bin"
LARGE = 64 << 20


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member(WANTED, kind=tarfile.SYMTYPE, link="/etc/passwd")], f"{WANTED} is a link"),
        ([member(WANTED, kind=tarfile.LNKTYPE, link=WANTED)], f"{WANTED} is a link"),
        ([member(WANTED, kind=tarfile.FIFOTYPE)], f"{WANTED} is a link or no plain file"),
        ([member(WANTED, LARGE)], f"{WANTED} has {LARGE} bytes, expected 6146"),
        ([member(WANTED, -512)], "member 0 of -512 bytes"),
        ([member("pax", LARGE, tarfile.XHDTYPE), member(WANTED)], f"a header of {LARGE} bytes"),
        ([member("long", LARGE, tarfile.GNUTYPE_LONGNAME), member(WANTED)], f"a header of {LARGE} bytes"),
        ([member(f"member{i}") for i in range(cifar.MEMBERS + 1)], f"member {cifar.MEMBERS}"),
    ],
    ids=["symlink", "hardlink", "fifo", "large", "negative", "pax", "longname", "many"],
)
def test_cifar_refuses_members_before_reading_them(
    members: list[tarfile.TarInfo], said: str, tmp_path: Path, tiny_layouts: None
) -> None:
    path = tmp_path / TINY["cifar10"].archive
    path.write_bytes(gzip.compress(archive_of(*members), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{path.name}: truncated, damaged or not.*{said}"):
            load("cifar10", str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LARGE / 4


@pytest.mark.parametrize("packer", PACKERS)
def test_cifar_notices_every_damage_to_a_packed_archive(
    packer: str, tmp_path: Path, tiny_layouts: None
) -> None:
    write("cifar10", "archive", tmp_path)
    path = tmp_path / TINY["cifar10"].archive
    whole = PACKERS[packer](gzip.decompress(path.read_bytes()))
    path.write_bytes(whole)
    good, chance = cifar.read("cifar10", str(tmp_path)), random.Random(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[chance.randrange(len(whole)) :]
        else:
            for _ in range(trial % 3):
                damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = cifar.read("cifar10", str(tmp_path))
        except (ValueError, OSError):
            refused += 1
            continue
        for (images, labels), (good_images, good_labels) in zip(found, good, strict=True):
            np.testing.assert_array_equal(images, good_images)
            np.testing.assert_array_equal(labels, good_labels)
    assert refused > 280  # the rest hit a time stamp or the like


def test_cifar_compares_the_size_of_a_file_before_reading_it(tmp_path: Path, tiny_layouts: None) -> None:
    write("cifar10", "folder", tmp_path)
    with open(tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin", "r+b") as file:
        file.truncate(1 << 40)  # a terabyte of hole
    with pytest.raises(ValueError, match=rf"data_batch_1\.bin has {1 << 40} bytes, expected 9219"):
        load("cifar10", str(tmp_path))


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
    recipe = RECIPES["cifar10-resnet20-torch"]
    images = normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), recipe)
    corner = augment(images, 4, torch.tensor([[0, 0]]), None)
    assert torch.equal(corner[0, :, :4], torch.zeros(3, 4, 32))
    expected = (255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    torch.testing.assert_close(corner[0, :, 4, 4], expected)


def some(images: int, channels: int = 1, size: int = 8) -> Split:
    """Images of random bytes; the label of each is its number."""
    torch.manual_seed(images)
    bytes_ = torch.randint(0, 256, (images, channels, size, size), dtype=torch.uint8)
    return Split(bytes_, torch.arange(images), images)


def test_batches_cover_the_split_and_follow_seed_and_epoch() -> None:
    recipe = replace(RECIPES["digits"], batch_size=4)
    batches = Batches(some(10), recipe, seed=3)
    first = [labels for _, labels in batches.epoch(0)]
    assert [len(labels) for labels in first] == [4, 4, 2]
    assert [batches.count(step) for step in range(len(batches))] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    for other in (Batches(some(10), recipe, seed=4).epoch(0), batches.epoch(1)):
        assert not torch.equal(torch.cat(first), torch.cat([labels for _, labels in other]))


EVERYTHING = replace(
    RECIPES["cifar10-resnet20-torch"], batch_size=8, mixup=0.4, cutmix=1.0, mixup_prob=0.7, smoothing=0.1
)


@pytest.mark.parametrize("images", [37, 40, 44, 45])
@pytest.mark.parametrize("mixes", [False, True])
def test_all_ranks_together_see_what_one_process_sees(images: int, mixes: bool) -> None:
    recipe = EVERYTHING if mixes else replace(EVERYTHING, mixup=0.0, cutmix=0.0)
    split = some(images, 3, 6)
    for epoch in (0, 1):
        whole = list(Batches(split, recipe, seed=5).epoch(epoch))
        for world in (2, 4):
            ranks = [Batches(split, recipe, seed=5, rank=rank, world=world) for rank in range(world)]
            parts = list(zip(*(rank.epoch(epoch) for rank in ranks), strict=True))
            # Only a last batch of fewer than two images for each rank is left out.
            assert len(whole) - len(parts) == (0 < images % 8 < 2 * world)
            for step, (one, several) in enumerate(zip(whole, parts, strict=False)):
                assert ranks[0].count(step) == len(one[1])
                sizes = [len(labels) for _, labels in several]
                assert max(sizes) - min(sizes) <= (2 if mixes else 1)
                assert min(sizes) >= 1
                for found, expected in zip(map(torch.cat, zip(*several, strict=True)), one, strict=True):
                    assert torch.equal(found, expected)


def test_an_image_is_augmented_anew_in_every_epoch() -> None:
    split, recipe = some(32, 3, 16), RECIPES["cifar10-resnet20-torch"]
    first, second = (next(split.augmented(recipe, 5, e, torch.arange(32), [slice(0, 32)]))[0] for e in (0, 1))
    assert (first == second).flatten(1).all(1).sum() <= 2  # 9 x 9 places, mirrored or not


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_an_epoch_can_be_entered_anywhere(start: int) -> None:
    batches = Batches(some(37, 3, 6), EVERYTHING, seed=5)
    whole, rest = list(batches.epoch(3)), list(batches.epoch(3, start))
    assert len(rest) == len(whole) - start
    for (images, labels), (expected, targets) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)


@pytest.mark.parametrize(
    ("batch_size", "world", "mixup", "said"),
    [
        (64, 3, 0.0, "batch_size=64, world=3: .*multiples of 3 from 6"),
        (4, 4, 0.0, "batch_size=4, world=4: .*at least 2 images"),
        (66, 2, 0.4, "batch_size=66, world=2: .*in pairs for mixup and cutmix.*multiples of 4 from 4"),
    ],
)
def test_a_world_that_does_not_divide_the_batch(batch_size: int, world: int, mixup: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Batches(some(99), replace(RECIPES["digits"], batch_size=batch_size, mixup=mixup), 0, world=world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [1, 9, 12, 13])
def test_evaluation_takes_every_image_once_on_any_number_of_ranks(images: int, world: int) -> None:
    recipe, split = replace(RECIPES["digits"], batch_size=4), some(images)
    ranks = [list(plain_batches(split, recipe, rank=rank, world=world)) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {-(-images // 4)}, (
        "collectives need as many batches on every rank"
    )
    labels = torch.cat([labels for step in zip(*ranks, strict=True) for _, labels in step])
    assert torch.equal(labels, torch.arange(images))


def test_the_mean_image_is_subtracted_where_the_recipe_says_so() -> None:
    split = some(50, 3, 6)
    split = replace(split, pixel_mean=split.mean_image())
    recipe = replace(RECIPES["cifar10-resnet110"], batch_size=50)
    ((images, _),) = plain_batches(split, recipe)
    expected = split.images.double() - split.images.double().mean(0)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="pixel_mean=True"):
        next(plain_batches(replace(split, pixel_mean=None), recipe))


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (1297, 8, 162 * [8]),
        (9, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (3, 2, [2]),
        (2, 2, [2]),
    ],
)
def test_an_image_left_over_is_left_out(images: int, batch_size: int, sizes: list[int]) -> None:
    split = Split(torch.zeros(images, 1, 8, 8, dtype=torch.uint8), torch.arange(images))
    batches = Batches(split, replace(RECIPES["digits"], batch_size=batch_size), seed=0)
    epochs = [[labels for _, labels in batches.epoch(e)] for e in range(2)]
    assert [len(labels) for labels in epochs[0]] == sizes
    assert (len(batches), batches.images) == (len(sizes), sum(sizes))
    seen = [torch.cat(epoch) for epoch in epochs]
    assert all(len(labels.unique()) == batches.images for labels in seen)
    if images == 1297:
        assert seen[0].sum() != seen[1].sum(), "another one each epoch"


def test_fewer_images_than_a_batch_are_named() -> None:
    with pytest.raises(ValueError, match=r"train=9 images, batch_size=64: fewer images .*batches of up to 9"):
        Batches(some(9), RECIPES["digits"], seed=0)


@pytest.mark.parametrize("images", [0, 1])
def test_a_single_image_is_no_training_set(images: int) -> None:
    split = Split(torch.zeros(images, 1, 8, 8, dtype=torch.uint8), torch.arange(images))
    with pytest.raises(ValueError, match=f"train={images} images: .*at least 2"):
        Batches(split, RECIPES["digits"], seed=0)
