"""From a file's bytes to the pixels of one view: which part of the image, and how it is decoded and resized."""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import Recipe

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the stored image


def training_box(width: int, height: int, recipe: Recipe, chance: random.Random) -> Box:
    """The part of an image that becomes a crop of ``recipe.img_size`` pixels in a square.

    With ``short_side`` the shorter side becomes a random one of that range, and the crop is anywhere (the paper's
    scale augmentation). Else the area is uniform in ``scale`` and the aspect log-uniform in ``ratio``; where ten
    draws do not fit, the centred square.
    """
    size = recipe.img_size or 0
    if recipe.short_side:
        side = chance.randint(*recipe.short_side)
        scaled = _scaled(width, height, side)
        left, upper = (chance.randint(0, length - size) for length in scaled)
        return _box_of(left, upper, size, scaled, (width, height))
    least, most = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    for _ in range(10):
        area = width * height * chance.uniform(*recipe.scale)
        aspect = math.exp(chance.uniform(least, most))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = chance.randint(0, width - w), chance.randint(0, height - h)
            return left, upper, left + w, upper + h
    return centre(width, height)


def centre(width: int, height: int) -> Box:
    """The largest square in the middle."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def test_boxes(width: int, height: int, recipe: Recipe) -> list[Box]:
    """The centre, and with ``ten_crop`` the four corners, of the image with its shorter side resized."""
    size = recipe.val_img_size or 0
    scaled = _scaled(width, height, round(size / recipe.crop_pct))
    right, lower = scaled[0] - size, scaled[1] - size
    places = [((right + 1) // 2, (lower + 1) // 2)]
    if recipe.ten_crop:
        places += [(0, 0), (right, 0), (0, lower), (right, lower)]
    return [_box_of(left, upper, size, scaled, (width, height)) for left, upper in places]


def _scaled(width: int, height: int, side: int) -> tuple[int, int]:
    short = min(width, height)
    return max(round(width * side / short), side), max(round(height * side / short), side)


def _box_of(left: int, upper: int, size: int, scaled: tuple[int, int], stored: tuple[int, int]) -> Box:
    across, down = stored[0] / scaled[0], stored[1] / scaled[1]
    return left * across, upper * down, (left + size) * across, (upper + size) * down


class Decoder:
    """The encoded image ``content``: its size at once, its pixels when the boxes are known.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves every box as many pixels as it will have, which saves most
    of the time for large images. EXIF orientation is not applied, as in ImageNet's usual readers. Raises OSError,
    ValueError or another error of the decoder for what is no whole image.
    """

    def __init__(self, content: bytes) -> None:
        from PIL import Image

        self.content = content
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            self.image = Image.open(io.BytesIO(content))
        self.width, self.height = self.image.size

    def views(self, boxes: Sequence[Box], size: int, interpolation: str) -> np.ndarray:
        """uint8 [boxes,size,size,3]: each box resized with antialiasing."""
        from PIL import Image

        least = min(min(right - left, lower - upper) for left, upper, right, lower in boxes)
        image = self._pixels(max(least / size, 1.0))
        across, down = image.width / self.width, image.height / self.height
        filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
        made = []
        for left, upper, right, lower in boxes:
            # Rounding may leave a box a millionth outside.
            box = (
                left * across,
                upper * down,
                min(right * across, image.width),
                min(lower * down, image.height),
            )
            made.append(np.asarray(image.resize((size, size), filter_, box)))
        return np.stack(made)

    def _pixels(self, shrink: float) -> Any:
        """The whole image as RGB, at least 1/``shrink`` of its size: a PIL image."""
        from PIL import Image

        if self.image.format == "JPEG":
            size = math.ceil(self.width / shrink), math.ceil(self.height / shrink)
            fast = _simplejpeg(self.content, size)
            if fast is not None:
                return Image.fromarray(fast)
            self.image.draft("RGB", size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.image.load()
            return self.image if self.image.mode == "RGB" else self.image.convert("RGB")


def _simplejpeg(content: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """RGB [H,W,3] by libjpeg-turbo with its exact DCT; None where simplejpeg is missing or declines the image."""
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        return simplejpeg.decode_jpeg(content, "RGB", min_width=size[0], min_height=size[1])
    except ValueError:  # CMYK, damaged: Pillow reads the one and has words for the other
        return None
