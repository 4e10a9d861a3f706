"""The labelled sheet of samples: what was given on the left, and on the right a row of pictures under each prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datencoder_jax.data.reading import fit_square

_SMALL, _LARGE = 128, 512  # the sides between which pictures are shown as they are
_MAX_LINES = 6
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (128, 132, 138)


def labelled_sheet(input_images: Sequence[np.ndarray], prompts: Sequence[str], images: np.ndarray) -> Image.Image:
    """Everything one run was given and made, on one white sheet.

    Pictures under 128 pixels are enlarged by an integer factor without smoothing, those over 512 are shrunk to that.

    Args:
        input_images: uint8 `[H, W, 3]` each, any size; shown one below the other; may be none.
        prompts: one for each row; long ones are wrapped.
        images: uint8 `[len(prompts), num, H, W, 3]`, square.
    """
    rows, columns, side = images.shape[:3]
    if rows != len(prompts):
        raise ValueError(f"{len(prompts)} prompts do not label {rows} rows of pictures")
    cell = min(side * max(1, _SMALL // side), _LARGE)
    size = max(14, min(24, cell // 9))
    margin, gap, font = round(size * 1.75), max(6, cell // 20), ImageFont.load_default(size=size)
    line = round(size * 1.3)
    left = margin + (cell + margin if len(input_images) else 0)
    width = max(columns * (cell + gap) - gap, 3 * cell if cell <= _LARGE // 2 else cell)

    labels = [_wrap(prompt, font, width) for prompt in prompts]
    tops, y = [], margin
    for label in labels:
        y += len(label) * line + size // 2
        tops.append(y)
        y += cell + margin
    first = tops[0] if tops else margin + line + size // 2
    y = max(y, first + len(input_images) * (cell + gap) - gap + margin)

    sheet = Image.new("RGB", (left + width + margin, y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if len(input_images):
        caption = "input" if len(input_images) == 1 else "inputs"
        draw.text((margin, first - line - size // 2), caption, _FAINT, font)
        for index, image in enumerate(input_images):
            sheet.paste(_cell(image, cell), (margin, first + index * (cell + gap)))
        draw.line([(margin + cell + margin // 2, margin), (margin + cell + margin // 2, y - margin)], (224, 226, 230))
    for label, top, row in zip(labels, tops, images, strict=True):
        for index, text in enumerate(label):
            draw.text((left, top - (len(label) - index) * line - size // 2), text, _INK, font)
        for index, image in enumerate(row):
            sheet.paste(_cell(image, cell), (left + index * (cell + gap), top))
    return sheet


def _cell(image: np.ndarray, cell: int) -> Image.Image:
    """A picture as a square of `cell` pixels; enlarged without smoothing where the factor is an integer."""
    length = min(image.shape[:2])
    square = fit_square(image, length if cell % length == 0 else cell)
    return Image.fromarray(square).resize((cell, cell), Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces where that is possible; at least one line."""
    lines, current = [], ""
    for word in text.split():
        joined = f"{current} {word}".strip()
        if font.getlength(joined) <= width:
            current = joined
            continue
        if current:
            lines.append(current)
        current = word
        while font.getlength(current) > width and len(current) > 1 and len(lines) <= _MAX_LINES:
            end = bisect_right(range(len(current)), width, key=lambda n, text=current: font.getlength(text[:n])) - 1
            lines.append(current[: max(end, 1)])
            current = current[max(end, 1) :]
        if len(lines) > _MAX_LINES:
            break
    lines.append(current)
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while last and font.getlength(last + " ...") > width:
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], last + " ..."]
