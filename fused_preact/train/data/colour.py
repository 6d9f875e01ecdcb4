"""Colour augmentation as one affine map a pixel: drawn beside the decoder, applied on the device."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from ..config import Recipe

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as FB and Pillow have it
# Principal components of ImageNet's RGB values, 0 to 1 (AlexNet; the numbers of fb.resnet.torch).
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def draw(recipe: Recipe, mean: np.ndarray, chance: random.Random) -> np.ndarray:
    """The map ``x -> m[:, :3] @ x + m[:, 3]`` [3,4] float32 of an RGB image of bytes with the mean colour ``mean``.

    Brightness ``a x``, contrast ``a x + (1 - a) mean(grey)`` and saturation ``a x + (1 - a) grey``, each with its own
    a uniform in 1 - color_jitter to 1 + color_jitter, in random order, then PCA noise: every one is affine in x, and
    the mean that contrast needs is the map so far at ``mean``. Values are not cut off at 0 and 255 in between.
    """
    scale, shift = np.eye(3), np.zeros(3)
    if recipe.color_jitter > 0:
        for kind in chance.sample(("brightness", "contrast", "saturation"), 3):
            a = 1 + chance.uniform(-recipe.color_jitter, recipe.color_jitter)
            if kind == "saturation":
                step, constant = a * np.eye(3) + (1 - a) * GREY, np.zeros(3)
            else:
                grey = GREY @ (scale @ mean + shift) if kind == "contrast" else 0.0
                step, constant = a * np.eye(3), np.full(3, (1 - a) * grey)
            scale, shift = step @ scale, step @ shift + constant
    if recipe.lighting > 0:
        alphas = np.array([chance.gauss(0, recipe.lighting) for _ in range(3)])
        shift = shift + 255 * EIGENVECTORS @ (alphas * EIGENVALUES)
    return np.concatenate([scale, shift[:, None]], axis=1).astype(np.float32)


def apply(images: Tensor, maps: Tensor, recipe: Recipe) -> Tensor:
    """uint8 [N,H,W,3] through ``maps`` [N,3,4], then ``(x - mean) / std``: float32 [N,3,H,W], channels_last."""
    mean = torch.tensor(recipe.mean, device=images.device)
    std = torch.tensor(recipe.std, device=images.device)
    scale = maps[:, :, :3] / std[:, None]
    shift = (maps[:, :, 3] - mean) / std
    pixels = images.flatten(1, 2).float()
    return torch.baddbmm(shift[:, None], pixels, scale.mT).view(images.shape).permute(0, 3, 1, 2)
