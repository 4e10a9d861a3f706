"""Drawing primitives on a supersampled Pillow canvas.

`Sheet` draws scenery in frame fractions (0..1); `Pen` collects an object's parts in object units (the object fills
[-1, 1] x [-1, 1], y pointing down) and paints them with one dark outline around the whole silhouette.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from datencoder_jax.toyworld.world import PALETTE, Instance

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (38, 30, 44)
_CIRCLE = [(math.cos(2 * math.pi * k / 28), math.sin(2 * math.pi * k / 28)) for k in range(28)]


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """The colour a fraction `t` of the way from `a` to `b`."""
    return (
        int(a[0] + (b[0] - a[0]) * t),
        int(a[1] + (b[1] - a[1]) * t),
        int(a[2] + (b[2] - a[2]) * t),
    )


def superellipse(x: float, y: float, rx: float, ry: float, power: float = 2.0, taper: float = 0.0) -> list[Point]:
    """Outline points of |u|^power + |v|^power = 1; `taper` > 0 makes the top narrower than the bottom."""
    e = 2.0 / power
    points = []
    for c, s in _CIRCLE:
        u = math.copysign(abs(c) ** e, c)
        v = math.copysign(abs(s) ** e, s)
        points.append((x + rx * u * (1 + taper * v), y + ry * v))
    return points


class Sheet:
    """The whole frame, in fractions of its side."""

    def __init__(self, side: int, ground: Colour):
        self.side = side
        self.image = Image.new("RGB", (side, side), ground)
        self.draw = ImageDraw.Draw(self.image)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """A filled rectangle between two corners."""
        s = self.side
        self.draw.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill)

    def disc(self, x: float, y: float, r: float, fill: Colour, ry: float | None = None) -> None:
        """A filled circle, or an ellipse when `ry` is given."""
        s, ry = self.side, r if ry is None else ry
        self.draw.ellipse(((x - r) * s, (y - ry) * s, (x + r) * s, (y + ry) * s), fill)

    def poly(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A polyline of the given width."""
        self.draw.line([(x * self.side, y * self.side) for x, y in points], fill, max(1, round(width * self.side)))

    def shade(self, x: float, y: float, rx: float, ry: float, strength: float) -> None:
        """Darkens an ellipse: the object's shadow on the ground."""
        s = self.side
        mask = Image.new("L", (s, s), 0)
        ImageDraw.Draw(mask).ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), int(255 * strength))
        self.image.paste((20, 18, 40), (0, 0, s, s), mask)


class Pen:
    """Collects the parts of one object, then paints them in order.

    Args:
        instance: gives `main`, `second`, `accent` and the pattern. A part filled with `None` shows the pattern.
        x, y, half: centre and half side of the object's box, in pixels of the supersampled canvas.
        flip: -1 mirrors left and right, 1 does not.
    """

    def __init__(self, instance: Instance, x: float, y: float, half: float, flip: int):
        self.instance = instance
        self.main = PALETTE[instance.main]
        self.second = PALETTE[instance.second]
        self.accent = PALETTE[instance.accent]
        self._x, self._y, self._half, self._flip = x, y, half, flip
        self._parts: list[tuple[str, list[float] | list[Point], Colour | None, float, bool]] = []

    def _map(self, x: float, y: float) -> Point:
        return self._x + self._flip * x * self._half, self._y + y * self._half

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[float]:
        (a, b), (c, d) = self._map(x0, y0), self._map(x1, y1)
        return [min(a, c), b, max(a, c), d]

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour | None, outlined: bool = True) -> None:
        """An ellipse around (x, y)."""
        self._parts.append(("ellipse", self._box(x - rx, y - ry, x + rx, y + ry), fill, 0.0, outlined))

    def rect(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        fill: Colour | None,
        radius: float = 0.0,
        outlined: bool = True,
    ) -> None:
        """A rectangle between two corners; `radius` rounds them."""
        self._parts.append(("rect", self._box(x0, y0, x1, y1), fill, radius * self._half, outlined))

    def poly(self, points: Sequence[Point], fill: Colour | None, outlined: bool = True) -> None:
        """A polygon."""
        self._parts.append(("poly", [self._map(*p) for p in points], fill, 0.0, outlined))

    def line(self, points: Sequence[Point], width: float, fill: Colour | None, outlined: bool = True) -> None:
        """A polyline with round ends; `width` in object units."""
        self._parts.append(("line", [self._map(*p) for p in points], fill, width * self._half, outlined))

    def paint(self, image: Image.Image, ink: float) -> None:
        """Paints all parts; `ink` is the outline's thickness in pixels of the canvas."""
        draw = ImageDraw.Draw(image)
        for part in self._parts:
            if part[4]:
                _paint(draw, part, INK, ink)
        cloth = None
        for part in self._parts:
            fill = part[2]
            if fill is not None:
                _paint(draw, part, fill, 0.0)
                continue
            cloth = cloth or self._cloth(image.size)
            mask = Image.new("L", image.size, 0)
            _paint(ImageDraw.Draw(mask), part, 255, 0.0)
            image.paste(cloth, (0, 0), mask)

    def stencil(self, mask: Image.Image, ink: float) -> None:
        """Paints what `paint` would cover as 255 in an image of mode "L"."""
        draw = ImageDraw.Draw(mask)
        for part in self._parts:
            _paint(draw, part, 255, ink if part[4] else 0.0)

    def _cloth(self, size: tuple[int, int]) -> Image.Image:
        """The pattern over the whole canvas, anchored to the object so that it moves and scales with it."""
        cloth = Image.new("RGB", size, self.main)
        draw, fill = ImageDraw.Draw(cloth), self.second
        pattern = self.instance.pattern
        if pattern == "stripes":
            for k in range(-3, 4):
                low, high = 0.52 * k - 0.13, 0.52 * k + 0.13
                box = (low, -1.4, high, 1.4) if self.instance.upright else (-1.4, low, 1.4, high)
                draw.rectangle(self._box(*box), fill)
        elif pattern == "dots":
            for j in range(-3, 4):
                for i in range(-3, 4):
                    x, y, r = 0.56 * (i + 0.5 * (j % 2)), 0.46 * j + 0.08, 0.17
                    draw.ellipse(self._box(x - r, y - r, x + r, y + r), fill)
        elif pattern == "checks":
            for j in range(-4, 4):
                for i in range(-4, 4):
                    if (i + j) % 2:
                        draw.rectangle(self._box(0.36 * i, 0.36 * j, 0.36 * (i + 1), 0.36 * (j + 1)), fill)
        return cloth


def _paint(draw: ImageDraw.ImageDraw, part: tuple, fill: Colour | int, grow: float) -> None:
    kind, data, _, extra, _ = part
    if kind in ("ellipse", "rect"):
        box = (data[0] - grow, data[1] - grow, data[2] + grow, data[3] + grow)
        if kind == "ellipse":
            draw.ellipse(box, fill)
        elif extra:
            draw.rounded_rectangle(box, extra + grow, fill)
        else:
            draw.rectangle(box, fill)
        return
    if kind == "poly":
        draw.polygon(data, fill)
        width, points = 2 * grow, [*data, data[0]]
    else:
        width, points = extra + 2 * grow, data
    if width < 1:
        return
    draw.line(points, fill, round(width))
    r = width / 2 - 0.5
    if r > 1.5:  # round joints and ends
        for x, y in points:
            draw.ellipse((x - r, y - r, x + r, y + r), fill)
