"""Recipes by name, and mixup, cutmix and label smoothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_preact import models
from fused_preact.train import cli
from fused_preact.train.config import DATASETS, Config
from fused_preact.train.data import draws, mix
from fused_preact.train.recipes import DEFAULTS, RECIPES, families, recipe_for

# --- recipes -----------------------------------------------------------------------------------------------


def test_every_recipe_is_of_a_known_model_and_data_set() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.model in models.list_models()
        assert recipe.data in DATASETS
        assert Config.from_dict(Config(recipe.data, recipe).to_dict()) == Config(recipe.data, recipe)
    assert set(DEFAULTS) == set(DATASETS)


def test_the_names_are_shown_short() -> None:
    shown = families()
    assert shown.startswith("digits, cifar10-resnet20|56|110|164|1001[-torch], cifar100-")
    assert "imagenet-resnet18|34|50|101|152|200[-torch]" in shown


def test_the_papers_cifar_recipe() -> None:
    """0.1, 0.01 for the first 400 iterations, divided by 10 at 32k and 48k, 64k in all; 391 iterations an epoch."""
    recipe = RECIPES["cifar10-resnet164"]
    rates = [
        recipe.learning_rate((i + 0.5) / 391) for i in (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 64_000)
    ]
    assert rates == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert recipe.epochs * 391 >= 64_000 > (recipe.epochs - 1) * 391
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.nesterov) == (
        128,
        0.9,
        1e-4,
        False,
    )
    assert recipe.pixel_mean


def test_the_official_cifar_recipe() -> None:
    recipe = RECIPES["cifar10-resnet1001-torch"]
    rates = [recipe.learning_rate(epoch) for epoch in (0.001, 80.9, 81.1, 121.9, 122.1, 199.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (recipe.batch_size, recipe.epochs, recipe.nesterov, recipe.decay_norm) == (64, 200, True, True)
    assert RECIPES["cifar10-resnet110-torch"].batch_size == 128


def test_the_imagenet_recipes() -> None:
    paper, torch_ = RECIPES["imagenet-resnet200"], RECIPES["imagenet-resnet200-torch"]
    for recipe in (paper, torch_):
        rates = [recipe.learning_rate(epoch) for epoch in (0.0, 29.9, 30.0, 59.9, 60.0, 89.9)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
        assert (recipe.batch_size, recipe.img_size) == (256, 224)
    assert (paper.short_side, paper.val_img_size, paper.crop_pct) == ((256, 480), 320, 1.0)
    assert (torch_.val_img_size, torch_.val_img_size / torch_.crop_pct) == (224, 256)
    assert (torch_.color_jitter, torch_.lighting, torch_.scale) == (0.4, 0.1, (0.08, 1.0))


def test_a_rising_warm_up_begins_where_it_is_told() -> None:
    recipe = replace(RECIPES["digits"], warmup_epochs=2.0, warmup_lr=0.02)
    assert [recipe.learning_rate(epoch) for epoch in (0.0, 1.0, 2.0)] == pytest.approx([0.02, 0.06, 0.1])


def test_a_recipe_is_chosen_by_name_or_by_data() -> None:
    assert recipe_for().name == "digits"
    assert recipe_for("cifar10").name == "cifar10-resnet20-torch"
    assert recipe_for(None, "imagenet-resnet152").data == "imagenet"
    with pytest.raises(
        ValueError, match="recipe='cifar10-resnet21': unknown; allowed: digits, cifar10-resnet20, "
    ):
        recipe_for(None, "cifar10-resnet21")
    with pytest.raises(ValueError, match=r"unknown; allowed: imagenet-resnet18, (?!.*cifar)"):
        recipe_for("imagenet", "resnet50")
    with pytest.raises(ValueError, match="recipe='digits' is for --data digits, --data cifar10 was given"):
        recipe_for("cifar10", "digits")
    with pytest.raises(ValueError, match="data='digits': the recipe 'cifar10-resnet20' is for cifar10"):
        Config("digits", RECIPES["cifar10-resnet20"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recipe", "resnet50"], "recipe='resnet50': unknown; allowed: digits, "),
        (
            ["--data", "digits", "--recipe", "cifar10-resnet20"],
            "is for --data cifar10, --data digits was given",
        ),
        (["--smoothing", "1"], "smoothing=1.0: must be 0 to below 1"),
        (["--mixup", "-1"], "mixup=-1.0: must be finite"),
        (["--mixup-prob", "2"], "mixup_prob=2.0: must be 0 to 1"),
        (
            ["--recipe", "imagenet-resnet18", "--scale", "0.5", "0.1"],
            "scale=(0.5, 0.1): must be two rising numbers",
        ),
        (["--recipe", "imagenet-resnet18", "--img-size", "300"], "short_side=(256, 480)"),
        (["--recipe", "imagenet-resnet18", "--crop-pct", "1.5"], "crop_pct=1.5: must be 0.1 to 1"),
        (["--img-size", "8"], "img_size=8, val_img_size=None: both or neither"),
        (["--img-size", "8", "--val-img-size", "8"], "img_size=8: of --data imagenet only"),
        (["--color-jitter", "0.4"], "color_jitter=0.4: of --data imagenet only, this is digits"),
        (
            ["--recipe", "cifar10-resnet20", "--ten-crop"],
            "ten_crop=True: of --data imagenet only, this is cifar10",
        ),
        (["--recipe", "imagenet-resnet18", "--workers", "-1"], "workers=-1: must be 0 to 256"),
        (["--on-bad-image", "cry"], "--on-bad-image"),
    ],
)
def test_bad_recipes_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*flags, "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert shown.count("\n") == 1


# --- mixup, cutmix, smoothing ------------------------------------------------------------------------------


def batch(images: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one value each, so that a pixel tells whose it is."""
    values = torch.arange(1.0, images + 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 6).contiguous()
    return values, torch.arange(images) % 5


def mixed(seed: int, **change: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return mix.mixed(*batch(), 5, replace(RECIPES["digits"], **change), draws.generator(seed, "mix", 0, 0))


def test_mixup_is_the_convex_combination_of_a_pair() -> None:
    images, labels = batch()
    kept = []
    for seed in range(200):
        found, targets = mixed(seed, mixup=0.2)
        lam = ((found[0, 0, 0, 0] - 2) / (1 - 2)).item()
        kept.append(lam)
        for i, partner in enumerate([1, 0, 3, 2, 5, 4, 6]):
            torch.testing.assert_close(found[i], lam * images[i] + (1 - lam) * images[partner])
            expected = lam * F.one_hot(labels[i], 5) + (1 - lam) * F.one_hot(labels[partner], 5)
            torch.testing.assert_close(targets[i], expected.float())
    # Beta(0.2, 0.2) has mean 1/2 and variance 1 / (4 (0.4 + 1)) = 0.179.
    assert torch.tensor(kept).mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.tensor(kept).var().item() == pytest.approx(0.179, abs=0.03)


def test_cutmix_puts_a_box_of_the_partner_and_mixes_by_its_area() -> None:
    images, labels = batch()
    areas = []
    for seed in range(200):
        found, targets = mixed(seed, cutmix=1.0)
        foreign = found[0, 0] == 2
        rows, cols = foreign.any(1).nonzero().flatten(), foreign.any(0).nonzero().flatten()
        area = foreign.sum().item() / 48
        areas.append(area)
        if area:
            assert len(rows) * len(cols) == foreign.sum(), "a box"
            assert rows[-1] - rows[0] + 1 == len(rows)
            assert cols[-1] - cols[0] + 1 == len(cols)
        for i, partner in enumerate([1, 0, 3, 2, 5, 4, 6]):
            assert torch.equal(found[i], torch.where(foreign, images[partner], images[i]))
            expected = (1 - area) * F.one_hot(labels[i], 5) + area * F.one_hot(labels[partner], 5)
            torch.testing.assert_close(targets[i], expected.float())
    assert min(areas) == 0
    assert max(areas) > 0.6


def test_how_often_batches_are_mixed_and_by_which() -> None:
    untouched = cut = 0
    for seed in range(400):
        found, targets = mixed(seed, mixup=1.0, cutmix=1.0, mixup_prob=0.5, mixup_switch_prob=0.25)
        if torch.equal(found, batch()[0]) and torch.equal(targets, F.one_hot(batch()[1], 5).float()):
            untouched += 1
        elif set(found[0].flatten().tolist()) <= {1.0, 2.0}:
            cut += 1
    assert untouched == pytest.approx(200, abs=40)
    assert cut == pytest.approx(50, abs=25)


def test_smoothing_of_soft_labels_is_the_formula() -> None:
    """The loop gives both to PyTorch's cross-entropy: (1 - s) target + s / classes."""
    _, targets = mixed(3, mixup=1.0)
    logits = torch.randn(7, 5)
    found = F.cross_entropy(logits, targets, label_smoothing=0.1)
    expected = -((0.9 * targets + 0.1 / 5) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, expected)


def test_training_with_everything_on_learns(
    tmp_path: Any, tiny_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--mixup",
        "0.2",
        "--cutmix",
        "0.5",
        "--mixup-prob",
        "0.5",
        "--smoothing",
        "0.1",
        "--epochs",
        "12",
    ]
    assert cli.main([*flags, "--device", "cpu", "--out", str(tmp_path / "run"), "--plain"]) == 0
    last = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("test accuracy %, last")
    )
    assert float(last.split()[-1]) > 80
