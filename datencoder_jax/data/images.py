"""Arrays of pictures: conversion between uint8 and [-1, 1], and grids."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image


def to_float(images) -> jnp.ndarray:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images) -> np.ndarray:
    """Floats in [-1, 1] -> uint8 in 0..255, clipped, any shape, on the host."""
    return np.asarray(jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8))


def grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = 2) -> Image.Image:
    """uint8 pictures `[n, h, w, 3]` row by row on white, enlarged by an integer `scale` without smoothing."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height * scale + gap)
        left = gap + index % columns * (width * scale + gap)
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


def write_grid(path: Path, images: np.ndarray, columns: int, *, scale: int = 1) -> None:
    """Writes `grid(...)` as a PNG."""
    grid(images, columns, scale=scale).save(path)
