"""Arrays of pictures: conversion between uint8 and [-1, 1], and grids."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datencoder_jax.data.reading import enlarge


def to_float(images) -> jnp.ndarray:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images) -> np.ndarray:
    """Floats in [-1, 1] -> uint8 in 0..255, clipped, any shape, on the host."""
    return np.asarray(jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8))


def grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = 2, labels: Sequence[str] = ()) -> Image.Image:
    """uint8 pictures `[n, h, w, 3]` row by row on white, enlarged by an integer `scale` without smoothing.

    Args:
        images: the pictures.
        columns: how many are in a row.
        scale: how many times they are enlarged.
        gap: pixels between them and around them.
        labels: texts above the columns, which begin again after the last.
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    letters = _fitting_size(labels, width * scale)
    top, font = round(1.5 * letters) if labels else 0, ImageFont.load_default(size=letters)
    size = columns * (width * scale + gap) + gap, top + rows * (height * scale + gap) + gap
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left = gap + column * (width * scale + gap)
        sheet.paste(Image.fromarray(enlarge(image, scale)), (left, top + gap + row * (height * scale + gap)))
        if row == 0 and labels:
            ImageDraw.Draw(sheet).text((left, gap), labels[column % len(labels)], "black", font)
    return sheet


def _fitting_size(labels: Sequence[str], width: int) -> int:
    """The largest size of letters, of 8 to 20 pixels, at which every label fits into so many; 8 if none does."""
    for size in range(20, 8, -1):
        font = ImageFont.load_default(size=size)
        if all(font.getlength(text) <= width for text in labels):
            return size
    return 8


def write_grid(path: Path, images: np.ndarray, columns: int, *, scale: int = 1, labels: Sequence[str] = ()) -> None:
    """Writes `grid(...)` as a PNG."""
    grid(images, columns, scale=scale, labels=labels).save(path)
