"""Mixup and cutmix of a batch: images and labels of neighbours, with the draws of the batch's place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe


def partners(images: int) -> list[int]:
    """Whom each image of a batch mixes with: its neighbour in the pair (0,1), (2,3), ...; an odd last one itself.

    A batch is a random sample in a random order, so neighbours are as good as a random pairing. Pairs lie in one
    rank's share of the batch, so a batch is mixed in the same way however many processes share it.
    """
    return [i ^ 1 if i ^ 1 < images else i for i in range(images)]


def mixed(
    images: Tensor, labels: Tensor, num_classes: int, recipe: Recipe, chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``images`` [N,C,H,W] and soft labels float32 [N,num_classes], mixed with probability ``recipe.mixup_prob``.

    Mixup (Zhang et al. 2018): ``l * a + (1 - l) * b`` of two images and of their one-hot labels, l ~ Beta(mixup,
    mixup). Cutmix (Yun et al. 2019): a box of b, of share 1 - l of the area and cut off at the border, stands in a,
    l ~ Beta(cutmix, cutmix); the labels mix by the area that is left. Where both are on, cutmix has the probability
    ``recipe.mixup_switch_prob``. One l and one box for the whole batch. ``images`` may be written to.
    """
    apply, switch = torch.rand(2, generator=chance, dtype=torch.float64).tolist()
    targets = F.one_hot(labels, num_classes).float()
    if apply >= recipe.mixup_prob:
        return images, targets
    cut = recipe.cutmix > 0 and (recipe.mixup == 0 or switch < recipe.mixup_switch_prob)
    kept = _beta(recipe.cutmix if cut else recipe.mixup, chance)
    index = torch.tensor(partners(len(labels)), device=images.device)
    if cut:
        height, width = images.shape[-2:]
        top, bottom, left, right = _box(height, width, kept, chance)
        images[:, :, top:bottom, left:right] = images[index, :, top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = images[index].lerp(images, kept)
    return images, targets[index].lerp(targets, kept)


def _beta(alpha: float, chance: torch.Generator) -> float:
    """Beta(alpha, alpha) of two gammas, which torch draws with a generator."""
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=chance)
    total = gammas.sum().item()
    return gammas[0].item() / total if total > 0 else 1.0  # both underflow where alpha is tiny


def _box(height: int, width: int, kept: float, chance: torch.Generator) -> tuple[int, int, int, int]:
    share = math.sqrt(1 - kept)
    rows, cols = int(height * share), int(width * share)
    row, col = (int(x) for x in torch.rand(2, generator=chance) * torch.tensor([height, width]))
    top, left = row - rows // 2, col - cols // 2
    return max(top, 0), min(top + rows, height), max(left, 0), min(left + cols, width)
