"""Pictures of the toy world: `render(instance, context, seed, size)`, a pure function of its arguments.

Everything is drawn with Pillow on a canvas four times the size and averaged down, which is antialiasing enough and
several times faster at 32 pixels than signed distances in numpy. Styles are applied to the small picture.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from datencoder_jax.toyworld.canvas import Pen, Sheet
from datencoder_jax.toyworld.objects import BUILDERS, add_accessory, add_trim
from datencoder_jax.toyworld.scenes import SCENERY
from datencoder_jax.toyworld.world import Context, Draws, Instance

SUPERSAMPLE = 4
PAPER = np.array([250, 247, 238], np.float32)


def render(instance: Instance, context: Context, seed: int, size: int = 32) -> np.ndarray:
    """One picture.

    Args:
        instance: what is drawn.
        context: scene, style, prompt accessory and count.
        seed: position, size, mirroring and the scene's variation; non-negative.
        size: side in pixels; a multiple of 2, 16 or more.

    Returns:
        uint8 `[size, size, 3]`, RGB.
    """
    return _render([instance] * context.count, context, seed, size)


def render_pair(first: Instance, second: Instance, context: Context, seed: int, size: int = 32) -> np.ndarray:
    """One picture of two individuals beside each other, the first on the left; arguments otherwise as for `render`."""
    return _render([first, second], replace(context, count=2), seed, size)


def coverage(instance: Instance, context: Context, seed: int, size: int = 32) -> np.ndarray:
    """How much of each pixel of `render`'s picture the individual and what it wears cover, without its shadow.

    Args:
        instance, context, seed, size: as for `render`.

    Returns:
        float32 `[size, size]` in [0, 1].
    """
    side = size * SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    for placement in _placements(_draws(seed), context):
        _pen(instance, context, placement, side).stencil(mask, side * _ink(context))
    return np.asarray(mask.reduce(SUPERSAMPLE)).astype(np.float32) / 255.0


def _render(instances: Sequence[Instance], context: Context, seed: int, size: int) -> np.ndarray:
    d = _draws(seed)
    placements = _placements(d, context)
    side = size * SUPERSAMPLE
    sheet = Sheet(side, (255, 255, 255))
    shadow = SCENERY[context.scene](sheet, d)
    for instance, placement in zip(instances, placements, strict=True):
        x, y, half, _ = placement
        sheet.shade(x, y + half * 0.95, half * 0.95, half * 0.13, shadow)
        _pen(instance, context, placement, side).paint(sheet.image, side * _ink(context))
    if context.style == "pixel":
        return _pixel(sheet.image, size)
    picture = np.asarray(sheet.image.reduce(SUPERSAMPLE))
    if context.style == "sketch":
        return _sketch(picture)
    if context.style == "watercolour":
        return _watercolour(sheet.image, picture, seed)
    return picture


_Placement = tuple[float, float, float, int]
"""(x, y, half side, flip) of an object, in fractions of the frame."""


def _draws(seed: int) -> Draws:
    return Draws(seed, 0x5EED, count=96)


def _ink(context: Context) -> float:
    """Thickness of outlines, as a share of the frame."""
    return {"sketch": 0.026, "pixel": 0.04}.get(context.style, 0.019)


def _pen(instance: Instance, context: Context, placement: _Placement, side: int) -> Pen:
    """All parts of one dressed object."""
    x, y, half, flip = placement
    pen = Pen(instance, x * side, y * side, half * side, flip)
    anchors = BUILDERS[instance.cls](pen)
    add_trim(pen, anchors)
    add_accessory(pen, anchors, context.accessory)
    return pen


def _placements(d: Draws, context: Context) -> list[_Placement]:
    scale, x, y = d.uniform(0.94, 1.06), d.uniform(-0.04, 0.04), d.uniform(-0.025, 0.025)
    flip, other = d.choice((-1, 1)), d.choice((-1, 1))
    drop = 0.045 if context.accessory == "hat" else 0.01  # room for the hat
    if context.count == 1:
        return [(0.5 + x, 0.53 + drop + y, 0.375 * scale, flip)]
    return [(0.27 + x / 2, 0.56 + y, 0.25 * scale, flip), (0.74 + x / 2, 0.62 - y, 0.25 * scale, other)]


@functools.lru_cache(maxsize=8)
def _hatching(size: int) -> np.ndarray:
    """Two layers of diagonal strokes, float32 `[2, size, size]` in 0..1."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    period = max(6.0, size / 10)
    one = ((x + y) % period < period * 0.34).astype(np.float32)
    two = ((x - y) % period < period * 0.34).astype(np.float32)
    return np.stack([one, two])


def _sketch(picture: np.ndarray) -> np.ndarray:
    """Pencil on paper: dark edges, hatching where the picture is dark, a trace of the colours."""
    rgb = picture.astype(np.float32)
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    padded = np.pad(grey, 1, mode="edge")
    edge = np.abs(padded[1:-1, 2:] - padded[1:-1, :-2]) + np.abs(padded[2:, 1:-1] - padded[:-2, 1:-1])
    line = np.clip((105 - grey) / 50, 0, 1) * np.clip((edge - 20) / 50, 0, 1)  # where ink meets something lighter
    stroke = np.clip((edge - 30) / 150, 0, 1) * 0.28 + 0.5 * line
    one, two = _hatching(picture.shape[0])
    tone = 0.16 * one * np.clip((150 - grey) / 40, 0, 1) + 0.16 * two * np.clip((90 - grey) / 40, 0, 1)
    light = PAPER.mean() - 0.30 * (255 - grey)
    ink = np.clip(1 - stroke - tone, 0.12, 1)[..., None]
    out = (light[..., None] + 0.34 * (rgb - grey[..., None])) * ink
    return np.clip(out, 0, 255).astype(np.uint8)


def _pixel(image: Image.Image, size: int) -> np.ndarray:
    """Blocks of two pixels (at 32) in few levels per channel."""
    blocks = min(size // 2, 24)
    small = np.asarray(image.resize((blocks, blocks), Image.Resampling.BOX)).astype(np.float32)
    small = (np.round(small / 42.5) * 42.5).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST))


def _watercolour(image: Image.Image, picture: np.ndarray, seed: int) -> np.ndarray:
    """Soft washes on paper: blurred colours let the paper through, unevenly, and leave a ragged white margin."""
    size = picture.shape[0]
    half = image.resize((size // 2, size // 2), Image.Resampling.BOX)
    soft = np.asarray(half.resize((size, size), Image.Resampling.BILINEAR)).astype(np.float32)
    rgb = 0.55 * soft + 0.45 * picture
    noise = np.random.Philox(key=np.array([seed, 0xA9], np.uint64)).random_raw(49).reshape(7, 7) / 2.0**64
    blotch = np.asarray(Image.fromarray(noise.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
    ramp = np.minimum(np.arange(size), np.arange(size)[::-1]).astype(np.float32) / size
    margin = np.clip((np.minimum(ramp[:, None], ramp[None, :]) - 0.10 * blotch) / 0.05, 0, 1)
    strength = (margin * (0.6 + 0.34 * blotch))[..., None]
    return np.clip(PAPER + (rgb - PAPER) * strength, 0, 255).astype(np.uint8)
