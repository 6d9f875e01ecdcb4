"""Images of files: the index of folders and shards, views, colours, worker processes, damaged images."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from image_helpers import CLASSES, add, damage, data_of, photographs
from PIL import Image

from fused_preact.train.config import Recipe
from fused_preact.train.data import Batches, colour, files, index, memory, plain_batches, views
from fused_preact.train.data.files import Unreadable
from fused_preact.train.loop import logits_of
from fused_preact.train.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = replace(
    RECIPES["imagenet-resnet18-torch"], img_size=24, val_img_size=16, batch_size=16, crop_pct=0.8
)
PAPER = replace(
    RECIPES["imagenet-resnet18"], img_size=24, val_img_size=24, short_side=(28, 60), batch_size=16
)


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


# --- which images ------------------------------------------------------------------------------------------


def test_folders_are_indexed_in_the_order_of_their_names(tree: Path) -> None:
    data = data_of(tree / "folders")
    assert (data.class_names, data.in_channels, data.num_classes) == (CLASSES, 3, 3)
    expected = list(photographs("train", 40))
    assert len(data.train) == len(expected) == 120
    for number, (name, label, content) in enumerate(expected):
        assert data.train.index.name(number) == str(tree / "folders" / "train" / name)
        assert data.train.index.read(number) == content
        assert data.train.index.labels[number] == label


def test_shards_hold_the_same_images(tree: Path) -> None:
    data = data_of(tree / "shards")
    assert data.class_names == CLASSES
    for number, (_, label, content) in enumerate(photographs("train", 40)):
        assert data.train.index.read(number) == content
        assert data.train.index.labels[number] == label
    assert "train-000001.tar at byte" in data.train.index.name(119)


def test_a_limit_keeps_the_classes(tree: Path) -> None:
    data = data_of(tree / "folders", limit_train=9, limit_test=3)
    assert np.bincount(data.train.index.labels).tolist() == [3, 3, 3]
    assert data.test.index.labels.tolist() == [0, 1, 2]
    assert memory.evenly(5, 9).tolist() == [0, 1, 2, 3, 4]


def test_many_shards_keep_few_files_open(tmp_path: Path) -> None:
    images = list(photographs("train", 30))[:70]
    for number, (_, label, content) in enumerate(images):
        with tarfile.open(tmp_path / f"train-{number:03d}.tar", "w") as tar:
            add(tar, "a.jpg", content)
            add(tar, "a.cls", str(label).encode())
    shards = index.read_shards(sorted(map(str, tmp_path.glob("*.tar"))))
    for _ in range(2):
        assert [shards.read(number) for number in range(70)] == [content for _, _, content in images]
    assert len(shards._files) == 64
    for descriptor in shards._files.values():
        os.close(descriptor)


# --- which pixels ------------------------------------------------------------------------------------------


def test_training_boxes_have_the_area_and_the_aspect() -> None:
    chance, areas, aspects = random.Random(0), [], []
    for _ in range(2000):
        left, upper, right, lower = views.training_box(400, 400, RECIPE, chance)
        assert 0 <= left < right <= 400
        assert 0 <= upper < lower <= 400
        areas.append((right - left) * (lower - upper) / 160_000)
        aspects.append((right - left) / (lower - upper))
    assert 0.078 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1
    assert 0.74 < min(aspects) < 0.76
    assert 1.32 < max(aspects) < 1.36
    assert abs(np.mean(np.log(aspects))) < 0.03, "as often wide as high"
    thin = {views.training_box(1000, 10, replace(RECIPE, scale=(0.9, 1.0)), chance) for _ in range(20)}
    assert thin == {(495, 0, 505, 10)}, "no box fits: the centred square"


def test_the_papers_boxes_are_squares_of_a_random_scale() -> None:
    chance, sides = random.Random(0), []
    recipe = RECIPES["imagenet-resnet200"]
    for _ in range(1000):
        left, upper, right, lower = views.training_box(640, 512, recipe, chance)
        assert -1e-9 <= left <= right <= 640 + 1e-9
        assert -1e-9 <= upper <= lower <= 512 + 1e-9
        sides.append(224 * 512 / (lower - upper))
        assert right - left == pytest.approx(lower - upper, rel=0.01)
    assert 255.9 <= min(sides) < 260
    assert 476 < max(sides) <= 480.1


def test_test_boxes_are_the_centre_and_the_corners() -> None:
    recipe = replace(RECIPES["imagenet-resnet50-torch"], ten_crop=True)  # 224 of 256
    found = views.test_boxes(512, 1024, recipe)
    assert found == [
        (32, 288, 480, 736),
        (0, 0, 448, 448),
        (64, 0, 512, 448),
        (0, 576, 448, 1024),
        (64, 576, 512, 1024),
    ]
    assert views.test_boxes(320, 320, RECIPES["imagenet-resnet200"]) == [(0, 0, 320, 320)]


def test_a_view_is_the_resized_and_cropped_image() -> None:
    """One resize of a box against the whole image resized, then cropped; with a JPEG decoded smaller at once."""
    from sklearn.datasets import load_sample_image

    whole = Image.fromarray(load_sample_image("flower.jpg"))
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=95)
    decoder = views.Decoder(file.getvalue())
    recipe = replace(RECIPE, val_img_size=64, crop_pct=0.8)
    (found,) = decoder.views(views.test_boxes(640, 427, recipe), 64, "bicubic")
    assert decoder.image.size < (640, 427), "a large JPEG is not decoded in full"
    scaled = whole.resize((120, 80), Image.Resampling.BICUBIC)
    expected, shifted = (np.asarray(scaled.crop((28 + x, 8, 92 + x, 72))).astype(int) for x in (0, 1))
    assert np.abs(found - expected).mean() < np.abs(shifted - expected).mean() / 4


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode: str) -> None:
    file = io.BytesIO()
    source = (
        Image.new("I;16", (20, 30)) if mode == "I;16" else Image.new("RGB", (20, 30), "red").convert(mode)
    )
    source.save(file, {"CMYK": "JPEG"}.get(mode, "PNG"))
    found = views.Decoder(file.getvalue()).views([(0, 0, 20, 30)], 8, "bilinear")
    assert found.shape == (1, 8, 8, 3)
    if mode in ("CMYK", "RGBA", "P"):
        assert np.abs(found[0, 0, 0].astype(int) - (255, 0, 0)).max() < 5


def test_a_faster_decoder_serves_where_it_is_and_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def decode_jpeg(content: bytes, colorspace: str, *, min_width: int, min_height: int) -> np.ndarray:
        asked.append((colorspace, min_width, min_height))
        if len(asked) > 1:
            raise ValueError("CMYK")
        return np.full((60, 80, 3), 7, dtype=np.uint8)

    monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(decode_jpeg=decode_jpeg))
    file = io.BytesIO()
    Image.new("RGB", (160, 120), "white").save(file, "JPEG")
    for colour_ in (7, 255):
        found = views.Decoder(file.getvalue()).views([(0, 0, 160, 120)], 30, "bilinear")
        assert (found == colour_).all()
    assert asked == [("RGB", 40, 30)] * 2, "a quarter is enough for 30 of 120 pixels"


def jitter_by_hand(image: np.ndarray, recipe: Recipe, chance: random.Random) -> np.ndarray:
    """The augmentation as fb.resnet.torch has it, an image at a time."""

    def blend(a: np.ndarray, b: Any, alpha: float) -> np.ndarray:
        return alpha * a + (1 - alpha) * b

    def grey(a: np.ndarray) -> np.ndarray:
        return (0.299 * a[..., 0] + 0.587 * a[..., 1] + 0.114 * a[..., 2])[..., None]

    for kind in chance.sample(("brightness", "contrast", "saturation"), 3):
        alpha = 1 + chance.uniform(-recipe.color_jitter, recipe.color_jitter)
        other = {"brightness": 0.0, "contrast": grey(image).mean(), "saturation": grey(image)}[kind]
        image = blend(image, other, alpha)
    alphas = [chance.gauss(0, recipe.lighting) for _ in range(3)]
    for channel in range(3):
        image[..., channel] += 255 * sum(
            colour.EIGENVECTORS[channel, i] * alphas[i] * colour.EIGENVALUES[i] for i in range(3)
        )
    return (image - recipe.mean) / recipe.std


@pytest.mark.parametrize("seed", range(5))
def test_one_map_a_pixel_is_the_jitter_step_by_step(seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    maps = np.stack([colour.draw(RECIPE, one.mean((0, 1)), random.Random(seed)) for one in image])
    found = colour.apply(torch.from_numpy(image), torch.from_numpy(maps), RECIPE)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for one, result in zip(image, found, strict=True):
        expected = jitter_by_hand(one.astype(np.float64), RECIPE, random.Random(seed))
        np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), expected, rtol=0, atol=2e-5)


# --- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [RECIPE, PAPER, replace(RECIPE, cutmix=1.0)], ids=["torch", "paper", "cutmix"]
)
def test_folders_shards_ranks_and_workers_give_the_same_batches(recipe: Recipe, tree: Path) -> None:
    data = data_of(tree / "folders")
    whole = [*Batches(data.train, recipe, seed=7).epoch(2)]
    assert [tuple(images.shape) for images, _ in whole] == [(16, 3, 24, 24)] * 7 + [(8, 3, 24, 24)]
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in whole)
    shards = data_of(tree / "shards", workers=2)
    assert same(Batches(shards.train, recipe, seed=7).epoch(2), whole)
    assert same(Batches(shards.train, recipe, seed=7).epoch(2, start=5), whole[5:])
    ranks = [Batches(data_of(tree / "folders").train, recipe, 7, rank=r, world=2) for r in (0, 1)]
    for both, one in zip(zip(*(rank.epoch(2) for rank in ranks), strict=True), whole, strict=True):
        assert same([map(torch.cat, zip(*both, strict=True))], [one])
    other = next(Batches(data.train, recipe, seed=8).epoch(2))
    assert not torch.equal(other[0], whole[0][0])
    assert not same(Batches(data.train, recipe, seed=7).epoch(3), whole)


def test_an_image_is_augmented_anew_in_every_epoch_and_place(tree: Path) -> None:
    source, parts = data_of(tree / "folders").train, [slice(0, 16)]
    made = {
        (epoch, turn): next(source.augmented(RECIPE, 7, epoch, torch.arange(16).roll(turn), parts))[0].roll(
            -turn, 0
        )
        for epoch in (0, 1)
        for turn in (0, 3)
    }
    for a, one in made.items():
        for b, other in made.items():
            alike = (one == other).flatten(1).all(1)
            assert alike.all() if a == b else not alike.any(), (a, b)


def test_the_models_random_stream_is_left_alone(tree: Path) -> None:
    data, before = data_of(tree / "folders", workers=1), torch.get_rng_state()
    next(Batches(data.train, RECIPE, seed=0).epoch(0))
    next(plain_batches(data.test, RECIPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_test_has_the_centres_and_ten_crops_the_mirror_images_too(tree: Path) -> None:
    data = data_of(tree / "folders")
    one = list(plain_batches(data.test, RECIPE))
    assert torch.cat([labels for _, labels in one]).tolist() == [0] * 10 + [1] * 10 + [2] * 10
    ten = list(plain_batches(data.test, replace(RECIPE, ten_crop=True)))
    images, crops = (torch.cat([images for images, _ in batches]) for batches in (one, ten))
    assert crops.shape == (30, 10, 3, 16, 16)
    assert torch.equal(torch.cat([labels for _, labels in ten]), torch.cat([labels for _, labels in one]))
    assert torch.equal(crops[:, 0], images)
    assert torch.equal(crops[:, 5:], crops[:, :5].flip(-1))
    assert not torch.equal(crops[:, 1], crops[:, 4])
    logits = logits_of(lambda x: x.mean((2, 3)), ten[0][0])
    torch.testing.assert_close(logits, ten[0][0].mean((1, 3, 4)))
    shared = [
        list(plain_batches(data.test, replace(RECIPE, ten_crop=True, batch_size=290), rank=r, world=2))
        for r in (0, 1)
    ]
    assert [len(labels) for rank in shared for _, labels in rank] == [15, 1, 14, 0]
    assert shared[1][-1][0].shape == (0, 10, 3, 16, 16)


def test_a_pass_that_another_one_has_ended_says_so(tree: Path) -> None:
    batches = Batches(data_of(tree / "folders").train, RECIPE, seed=0)
    first = batches.epoch(0)
    next(first)
    next(batches.epoch(1))
    with pytest.raises(RuntimeError, match="a new pass over these images began"):
        next(first)


# --- worker processes --------------------------------------------------------------------------------------


def workers_of(source: files.Files) -> list[Any]:
    assert source._made is not None
    return source._made._iterator._workers


def test_workers_stay_ignore_ctrl_c_and_a_death_is_one_line(tree: Path) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    source = data_of(tree / "folders", workers=2).train
    batches = Batches(source, RECIPE, seed=0)
    whole = list(batches.epoch(0))
    pids = [worker.pid for worker in workers_of(source)]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert same(batches.epoch(0), whole)
    assert [worker.pid for worker in workers_of(source)] == pids
    assert signal.getsignal(signal.SIGCHLD) is before, "PyTorch's handler raises in the middle of anything"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        ChildProcessError, match=r"a process that decodes images has died.*--workers \(now 2\)"
    ):
        list(batches.epoch(1))


# --- images that cannot be read ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_replaced_by_the_next_and_counted(workers: int, folders: Path) -> None:
    paths = damage(folders)
    data = data_of(folders, workers=workers)
    batches = Batches(data.train, RECIPE, seed=0)
    found = list(batches.epoch(0))
    assert data.notes() == [f"train: {data.train.note()}"]
    assert data.train.note().startswith(f"3 images could not be read, others took their place: {paths[0]}: ")
    assert data.test.note() is None
    # The same as if the next good one stood in their place.
    for path in paths:
        shutil.copy(sorted((folders / "train" / "flower").iterdir())[5], path)
    assert same(Batches(data_of(folders).train, RECIPE, seed=0).epoch(0), found)


def test_unreadable_images_are_an_error_if_asked_for(folders: Path) -> None:
    paths = damage(folders)
    batches = Batches(data_of(folders, on_bad_image="error").train, RECIPE, seed=0)
    with pytest.raises(Unreadable, match=r"train/flower/.*JPEG: .*--on-bad-image skip") as caught:
        list(batches.epoch(0))
    assert any(str(path) in str(caught.value) for path in paths)


def test_a_tree_of_nothing_readable_ends(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "TRIES", 5)
    for path in (folders / "val").rglob("*.JPEG"):
        path.write_bytes(b"no image")
    with pytest.raises(Unreadable, match=r"5 images in a row cannot be read: .*val/china/"):
        list(plain_batches(data_of(folders).test, RECIPE))


def test_an_image_that_unpacks_to_gigabytes_is_unreadable(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    file = io.BytesIO()
    Image.new("RGB", (200, 150)).save(file, "PNG")
    (folders / "train" / "china" / "china_0003.JPEG").write_bytes(file.getvalue())
    data = data_of(folders)
    list(Batches(data.train, RECIPE, seed=0).epoch(0))
    assert "decompression bomb" in data.train.note()
