"""Two views of one picture, for the VAE and for CLIP's vision tower, from one decoding and the same crop.

Of what is to be shown of a picture (all of it, or its item's box), h pixels high and w wide, a view shows a square

    side  = s min(h, w),            s uniform in [crop, 1]
    top   = y (h - side),           y uniform in [0, 1]
    left  = x (w - side),           x uniform in [0, 1]

mirrored or not, at the size that the VAE sees. Sides are real numbers: pixels at the edges count in part. The vision
tower's view is made from the VAE's view, as it is in personalization (`base.vision_input`), and both by one filter,
`reading.resample`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from datencoder_jax.data.items import DamagedItem, Item
from datencoder_jax.data.reading import MIN_SIDE, DamagedPicture, decode, resample


class Crop(NamedTuple):
    """Which square of a picture is shown; the equations' s, y and x, and whether it is mirrored."""

    side: float
    top: float
    left: float
    mirrored: bool


def draw_crop(rng: np.random.Generator, crop: float, flip: bool) -> Crop:
    """A random crop with a side of at least `crop`, mirrored in one half of the cases if `flip`."""
    side, top, left, mirrored = rng.random(4).tolist()
    return Crop(1 - (1 - crop) * side, top, left, flip and mirrored < 0.5)


def decode_item(item: Item, least: int) -> Image.Image:
    """An item's picture in mode RGB.

    Args:
        item: the item.
        least: the shorter side of what is shown of it has to keep this many pixels, if it has them.

    Raises:
        DamagedItem: it cannot be used.
    """
    if isinstance(item.picture, np.ndarray):
        picture = item.picture
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DamagedItem(item.key, "no picture")
        if min(picture.shape[:2]) < MIN_SIDE:
            raise DamagedItem(item.key, "too small")
        return Image.fromarray(picture)
    top, left, bottom, right = _box(item)
    try:
        return decode(item.picture, item.key, least=math.ceil(least / min(bottom - top, right - left)))
    except DamagedPicture as error:
        raise DamagedItem(item.key, error.reason) from error


def least_side(crop: Crop, sizes: tuple[int, ...], min_side: int) -> int:
    """How many pixels what is shown needs a side, before it is cropped, so that no view has to be enlarged."""
    return max(math.ceil(max(sizes) / crop.side), min_side)


def square(item: Item, picture: Image.Image, crop: Crop, min_side: int) -> tuple[float, float, float, float]:
    """Where the crop lies in the decoded picture: left, top, right, bottom in pixels.

    Raises:
        DamagedItem: what is to be shown has a side of fewer than `min_side` pixels.
    """
    top, left, bottom, right = _box(item)
    height, width = (bottom - top) * picture.height, (right - left) * picture.width
    if min(height, width) < max(min_side, 1):
        raise DamagedItem(item.key, "too small")
    side = crop.side * min(height, width)
    y = top * picture.height + crop.top * (height - side)
    x = left * picture.width + crop.left * (width - side)
    return x, y, min(x + side, picture.width), min(y + side, picture.height)


def show(
    picture: Image.Image, place: tuple[float, float, float, float], sizes: tuple[int, ...], mirrored: bool
) -> list[np.ndarray]:
    """A part of a picture at the first size, and that view at the others: uint8 `[size, size, 3]` of each."""
    first = resample(picture, sizes[0], place)
    first = first.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else first
    return [np.asarray(first), *(np.asarray(resample(first, size, gap=None)) for size in sizes[1:])]


def make_views(item: Item, crop: Crop, sizes: tuple[int, ...], min_side: int) -> list[np.ndarray]:
    """The views of an item.

    Args:
        item: the item.
        crop: the square to show.
        sizes: of the views, in pixels.
        min_side: what is shown of the picture has at least this many pixels a side before it is cropped.

    Returns:
        uint8 `[size, size, 3]` for each of `sizes`.

    Raises:
        DamagedItem: it cannot be used.
    """
    picture = decode_item(item, least_side(crop, sizes, min_side))
    place = square(item, picture, crop, min_side)
    return show(picture, place, sizes, crop.mirrored)


def _box(item: Item) -> tuple[float, float, float, float]:
    if item.box is None:
        return 0.0, 0.0, 1.0, 1.0
    top, left, bottom, right = (min(max(float(share), 0.0), 1.0) for share in item.box)
    if not (top < bottom and left < right):  # not numbers end here too
        raise DamagedItem(item.key, "empty box")
    return top, left, bottom, right
