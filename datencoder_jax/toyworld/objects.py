"""How each class is put together: parts in object units ([-1, 1] both ways, y down), facing right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from datencoder_jax.toyworld.canvas import INK, Colour, Pen, Point, mix, superellipse

EYE: Colour = (255, 255, 255)
GLASS: Colour = (190, 228, 246)
LAMP: Colour = (255, 240, 150)
HAT: Colour = (226, 30, 36)
SCARF: Colour = (36, 84, 214)


@dataclass(frozen=True)
class Anchors:
    """Where things go: hat (x, y, half width), scarf (two ends), star or bow, foot of the flag pole."""

    hat: tuple[float, float, float]
    neck: tuple[Point, Point]
    badge: Point
    pole: Point


def _eye(pen: Pen, x: float, y: float, r: float, look: float = 0.25) -> None:
    pen.ellipse(x, y, r, r, EYE, outlined=False)
    pen.ellipse(x + look * r, y + 0.1 * r, 0.56 * r, 0.56 * r, INK, outlined=False)


def creature(pen: Pen) -> Anchors:
    """A round monster: ears or horns, one to three eyes, a patterned body."""
    s, p = pen.instance.shape, pen.instance.parts
    w, top = 0.62 + 0.22 * s[0], -0.62 - 0.14 * s[1]
    mid, h = (top + 0.84) / 2, (0.84 - top) / 2
    ears, a = p[1], pen.accent
    tip = top - 0.22
    for side in (-1, 1):
        x = side * w * 0.62
        if ears == 0:
            pen.ellipse(x, top + 0.12, 0.24, 0.24, a)
        elif ears == 1:
            pen.poly([(x - 0.24, top + 0.34), (x + side * 0.12, tip - 0.06), (x + 0.24, top + 0.34)], a)
        elif ears == 2:
            pen.line([(side * 0.2, top + 0.2), (side * 0.36, tip + 0.08)], 0.1, a)
            pen.ellipse(side * 0.38, tip + 0.06, 0.14, 0.14, a)
        else:
            pen.ellipse(side * 0.34, top - 0.02, 0.15, 0.36, a)
    for side in (-1, 1):
        pen.ellipse(side * w * 0.5, 0.88, 0.26, 0.13, pen.second)
        pen.line([(side * w * 0.85, 0.2), (side * (w + 0.2), 0.02 if p[3] % 2 else 0.4)], 0.2, pen.second)
    if p[0] == 3:
        body = superellipse(0, mid, w, h, 3.6)
    else:
        body = superellipse(0, mid, w, h, (2.0, 2.0, 2.6)[p[0]], (0.0, 0.24, -0.12)[p[0]])
    pen.poly(body, None)
    ey = top + 0.42
    if p[2] == 0:
        _eye(pen, 0.0, ey, 0.29)
    elif p[2] == 1:
        for x in (-0.24, 0.24):
            _eye(pen, x, ey, 0.21)
    elif p[2] == 2:
        for x in (-0.36, 0.0, 0.36):
            _eye(pen, x, ey - 0.08 * (x == 0), 0.17)
    else:
        for x in (-0.24, 0.24):
            pen.ellipse(x, ey, 0.21, 0.21, EYE, outlined=False)
            pen.ellipse(x + 0.05, ey + 0.04, 0.12, 0.12, INK, outlined=False)
            pen.rect(x - 0.22, ey - 0.23, x + 0.22, ey - 0.05, pen.accent, outlined=False)
    my = ey + 0.42
    if p[3] == 0:
        pen.line(
            [(-0.24, my - 0.06), (-0.1, my + 0.05), (0.1, my + 0.05), (0.24, my - 0.06)], 0.09, INK, outlined=False
        )
    elif p[3] == 1:
        pen.ellipse(0, my, 0.17, 0.14, INK, outlined=False)
    elif p[3] == 2:
        pen.rect(-0.26, my - 0.08, 0.26, my + 0.1, INK, outlined=False)
        pen.rect(-0.2, my - 0.08, 0.2, my + 0.02, EYE, outlined=False)
    else:
        pen.poly([(-0.17, my - 0.12), (0.17, my - 0.12), (0, my + 0.14)], pen.accent, outlined=False)
    neck = my + 0.24
    return Anchors(
        (0, top + 0.08, 0.46), ((-w * 0.86, neck), (w * 0.86, neck)), (0.02, 0.56), (-min(w + 0.06, 0.8), 0.4)
    )


def robot(pen: Pen) -> Anchors:
    """A head with its own colour, a patterned chest, legs or tracks."""
    s, p = pen.instance.shape, pen.instance.parts
    hw, bw = 0.4 + 0.2 * s[0], 0.5 + 0.18 * s[1]
    top, chin, hip = -0.78, -0.2 - 0.06 * s[2], 0.62
    a, b = pen.accent, pen.second
    if p[2] in (0, 1):
        for x in (0.0,) if p[2] == 0 else (-hw * 0.6, hw * 0.6):
            pen.line([(x, top + 0.05), (x * 1.3, top - 0.17)], 0.1, INK)
            pen.ellipse(x * 1.3, top - 0.2, 0.14, 0.14, a)
    elif p[2] == 2:
        for side in (-1, 1):
            pen.rect(side * hw - 0.14, -0.64, side * hw + 0.14, -0.34, a, 0.05)
    else:
        pen.rect(-0.16, top - 0.16, 0.16, top + 0.1, a, 0.04)
    if p[3] == 0:  # tracks instead of legs
        pen.rect(-bw * 0.95, 0.6, bw * 0.95, 0.96, INK, 0.17)
        for x in (-0.56, 0.0, 0.56):
            pen.ellipse(x * bw / 0.68, 0.78, 0.12, 0.12, b, outlined=False)
    else:
        for side in (-1, 1):
            pen.rect(side * bw * 0.52 - 0.15, 0.5, side * bw * 0.52 + 0.15, 0.96, b, 0.05)
    for side in (-1, 1):
        up = side == 1 and p[3] == 2
        end = (side * (bw + 0.27), -0.2 if up else 0.42)
        pen.line([(side * bw * 0.9, 0.0), (side * (bw + 0.2), 0.1 if up else 0.06), end], 0.17, b)
        pen.ellipse(*end, 0.15, 0.15, a)
    pen.rect(-bw, chin + 0.08, bw, hip, None, 0.16 if p[1] % 2 else 0.04)
    if p[0] == 3:
        pen.poly(superellipse(0, (top + chin) / 2, hw, (chin - top) / 2 + 0.02, 2.2), pen.main)
    else:
        pen.rect(-hw, top, hw, chin, pen.main, (0.04, 0.22, 0.12)[p[0]])
    ey = (top + chin) / 2 - 0.06
    if p[1] == 0:
        pen.rect(-hw * 0.76, ey - 0.15, hw * 0.76, ey + 0.15, INK, 0.12, outlined=False)
        pen.rect(-hw * 0.36, ey - 0.08, hw * 0.52, ey + 0.08, a, outlined=False)
    elif p[1] == 1:
        for x in (-hw * 0.46, hw * 0.46):
            _eye(pen, x, ey, 0.17)
    elif p[1] == 2:
        _eye(pen, 0, ey, 0.22)
    else:
        for x in (-hw * 0.46, hw * 0.46):
            pen.rect(x - 0.14, ey - 0.14, x + 0.14, ey + 0.14, EYE, outlined=False)
            pen.rect(x - 0.05, ey - 0.06, x + 0.12, ey + 0.1, INK, outlined=False)
    pen.line([(-hw * 0.4, chin - 0.12), (hw * 0.4, chin - 0.12)], 0.08, INK, outlined=False)
    neck = chin + 0.06
    return Anchors((0, top + 0.04, hw), ((-hw, neck), (hw, neck)), (0, 0.28), (-bw - 0.27, 0.4))


def teapot(pen: Pen) -> Anchors:
    """A patterned belly with spout, handle, lid and knob."""
    s, p = pen.instance.shape, pen.instance.parts
    w, h = 0.58 + 0.12 * s[0], 0.56 + 0.14 * s[1]
    cy = 0.82 - h
    top = cy - h
    a, b = pen.accent, pen.second
    if p[0] == 3:  # angular handle
        loop = [(-w * 0.7, cy - 0.26), (-0.98, cy - 0.26), (-0.98, cy + 0.3), (-w * 0.7, cy + 0.3)]
    else:
        r = 0.3 + 0.06 * p[0]
        turns = [math.pi * (0.5 + k / 8) for k in range(9)]
        loop = [(-w * 0.82 + 0.36 * math.cos(t), cy + r * math.sin(t)) for t in turns]
    pen.line(loop, 0.17, a)
    tip = cy - 0.36 - 0.2 * s[2]
    if p[1] < 2:
        spout = [(w * 0.55, cy + 0.34), (0.86, tip), (1.04, tip + 0.06), (w * 0.9, cy - 0.22 + 0.3 * p[1])]
        pen.poly([spout[0], (1.02, tip + 0.06), (0.8, tip - 0.04), (w * 0.6, cy - 0.14)], b)
    else:
        pen.line([(w * 0.7, cy + 0.2), (w + 0.2, cy + 0.06), (w + 0.22, tip + 0.1), (w + 0.34, tip)], 0.24, b)
    pen.rect(-w * 0.55, 0.7, w * 0.55, 0.9, b, 0.06)
    lid = w * (0.56 + 0.1 * s[3])
    pen.poly(superellipse(0, top + 0.1, lid, 0.22, 2.0), b)
    if p[2] % 2:
        pen.ellipse(0, top - 0.2, 0.15, 0.14, a)
    else:
        pen.poly([(-0.15, top - 0.06), (0, top - 0.36), (0.15, top - 0.06)], a)
    power, taper = ((2.0, 0.0), (2.8, 0.1), (2.3, -0.16), (2.1, 0.22))[p[3]]
    pen.poly(superellipse(0, cy, w, h, power, taper), None)
    return Anchors(
        (0, top - 0.06, 0.4), ((-w * 0.86, cy - 0.26), (w * 0.86, cy - 0.26)), (0, cy + 0.16), (-0.7, cy - 0.2)
    )


def house(pen: Pen) -> Anchors:
    """Patterned walls under one of four roofs, with door, windows and mostly a chimney."""
    s, p = pen.instance.shape, pen.instance.parts
    w, eaves = 0.62 + 0.2 * s[0], -0.2 + 0.12 * s[1]
    a, b = pen.accent, pen.second
    peak = -0.92 + 0.12 * s[2]
    if p[2] != 3:
        x = (-0.46, 0.46, 0.3)[p[2]]
        pen.rect(x - 0.13, -0.94, x + 0.13, eaves, b)
    pen.rect(-w, eaves - 0.1, w, 0.92, None)
    over = w + 0.14
    if p[0] == 0:
        pen.poly([(-over, eaves), (0, peak), (over, eaves)], a)
    elif p[0] == 1:
        pen.poly([(-over, eaves), (-w * 0.6, peak + 0.12), (w * 0.6, peak + 0.12), (over, eaves)], a)
    elif p[0] == 2:
        dome = [
            (over * math.cos(t), eaves + (peak - eaves) * math.sin(t)) for t in (k * math.pi / 12 for k in range(13))
        ]
        pen.poly(dome, a)
    else:
        pen.poly([(-over, eaves), (-over, eaves - 0.2), (w, peak), (over, eaves)], a)
    dx = (-0.38, 0.0, 0.38, 0.0)[p[1]] * w / 0.7
    if p[1] == 3:
        for r, fill in ((0.22, INK), (0.16, b)):
            pen.ellipse(dx, 0.46, r, r, fill, outlined=False)
            pen.rect(dx - r, 0.46, dx + r, 0.92, fill, outlined=False)
    else:
        pen.rect(dx - 0.21, 0.3, dx + 0.21, 0.92, INK, outlined=False)
        pen.rect(dx - 0.15, 0.36, dx + 0.15, 0.92, b, outlined=False)
    glow = GLASS if p[3] % 2 else LAMP
    spots = [(-0.46 * w / 0.7, 0.16), (0.46 * w / 0.7, 0.16)]
    if p[1] == 0:
        spots = [(0.3 * w / 0.7, 0.3)]
    elif p[1] == 2:
        spots = [(-0.3 * w / 0.7, 0.3)]
    for x, y in spots:
        if p[3] < 2:
            pen.rect(x - 0.19, y - 0.19, x + 0.19, y + 0.19, INK, outlined=False)
            pen.rect(x - 0.13, y - 0.13, x + 0.13, y + 0.13, glow, outlined=False)
        else:
            pen.ellipse(x, y, 0.2, 0.2, INK, outlined=False)
            pen.ellipse(x, y, 0.14, 0.14, glow, outlined=False)
    top = {0: peak + 0.14, 1: peak + 0.14, 2: peak + 0.06, 3: eaves - 0.42}[p[0]]
    return Anchors(
        (0, top, 0.42), ((-w, eaves + 0.06), (w, eaves + 0.06)), (0, (peak + eaves) / 2 + 0.16), (-w - 0.02, eaves)
    )


def car(pen: Pen) -> Anchors:
    """A patterned body with cabin, windows and wheels: saloon, van, beetle or pick-up."""
    s, p = pen.instance.shape, pen.instance.parts
    roof, sill = -0.64 - 0.16 * s[0], -0.1 - 0.08 * s[1]
    a, b = pen.accent, pen.second
    kind = p[0]
    if kind == 0:
        cabin = [(-0.66, sill + 0.1), (-0.42, roof), (0.3, roof), (0.62, sill + 0.1)]
        panes = [
            [(-0.48, sill), (-0.34, roof + 0.16), (-0.08, roof + 0.16), (-0.08, sill)],
            [(0.06, sill), (0.06, roof + 0.16), (0.24, roof + 0.16), (0.44, sill)],
        ]
    elif kind == 1:  # van
        cabin = [(-0.94, sill + 0.1), (-0.9, roof), (0.42, roof), (0.72, sill + 0.1)]
        panes = [
            [(-0.74, sill), (-0.74, roof + 0.16), (-0.2, roof + 0.16), (-0.2, sill)],
            [(-0.04, sill), (-0.04, roof + 0.16), (0.34, roof + 0.16), (0.52, sill)],
        ]
    elif kind == 2:  # round
        cabin = [
            (0.72 * math.cos(t), sill + 0.1 + (roof - sill - 0.1) * math.sin(t))
            for t in (k * math.pi / 12 for k in range(13))
        ]
        panes = [
            [(-0.48, sill), (-0.36, roof + 0.22), (-0.07, roof + 0.16), (-0.07, sill)],
            [(0.07, sill), (0.07, roof + 0.16), (0.36, roof + 0.22), (0.48, sill)],
        ]
    else:  # pick-up
        cabin = [(-0.08, sill + 0.1), (0.0, roof), (0.44, roof), (0.66, sill + 0.1)]
        panes = [[(0.1, sill), (0.12, roof + 0.16), (0.36, roof + 0.16), (0.48, sill)]]
    pen.poly(cabin, b)
    for pane in panes:
        pen.poly(pane, GLASS, outlined=False)
    if p[1] == 1:
        pen.rect(-0.34, roof - 0.12, 0.26, roof, a, 0.04)
    elif p[1] == 2:
        pen.poly([(-0.98, sill - 0.28), (-0.66, sill - 0.22), (-0.7, sill + 0.1), (-0.9, sill + 0.1)], a)
    floor = 0.56
    pen.rect(-0.98, sill, 0.98, floor, None, 0.1 + 0.16 * s[2])
    pen.ellipse(0.88, sill + 0.22, 0.11, 0.13, LAMP, outlined=False)
    if p[2] % 2:
        pen.rect(-1.0, floor - 0.14, 1.0, floor, a, 0.05)
    r = 0.28 + 0.06 * s[3]
    for x in (-0.54, 0.54):
        pen.ellipse(x, floor + 0.06, r, r, INK)
        pen.ellipse(x, floor + 0.06, r * 0.62, r * 0.62, a, outlined=False)
        if p[3] == 1:
            pen.ellipse(x, floor + 0.06, r * 0.25, r * 0.25, INK, outlined=False)
    top_x = 0.22 if kind == 3 else -0.1
    return Anchors((top_x, roof + 0.02, 0.42), ((-0.96, sill + 0.06), (0.9, sill + 0.06)), (0.02, 0.24), (-0.7, sill))


def fish(pen: Pen) -> Anchors:
    """A patterned body with one of four tails and four back fins."""
    s, p = pen.instance.shape, pen.instance.parts
    rx, ry = 0.62 + 0.1 * s[0], 0.46 + 0.22 * s[1]
    cx, cy = 0.2, 0.05
    a, b = pen.accent, pen.second
    t, back = -0.98, cx - rx + 0.14
    if p[0] == 0:
        pen.poly([(back, cy - 0.1), (t, cy - 0.52), (t + 0.2, cy), (t, cy + 0.52), (back, cy + 0.1)], a)
    elif p[0] == 1:
        pen.poly([(back, cy - 0.1), (t, cy - 0.5), (t, cy + 0.5), (back, cy + 0.1)], a)
    elif p[0] == 2:
        pen.ellipse(t + 0.24, cy - 0.2, 0.25, 0.24, a)
        pen.ellipse(t + 0.24, cy + 0.2, 0.25, 0.24, a)
        pen.rect(t + 0.3, cy - 0.12, back + 0.1, cy + 0.12, a)
    else:
        pen.ellipse(t + 0.28, cy, 0.3, 0.46, a)
    up = cy - ry
    if p[1] == 0:
        pen.poly([(cx - 0.4, up + 0.2), (cx - 0.34, up - 0.28), (cx + 0.34, up + 0.14)], b)
    elif p[1] == 1:
        for k in (-0.28, 0.02, 0.32):
            pen.poly(
                [(cx + k - 0.18, up + 0.2), (cx + k - 0.06, up - 0.24 + abs(k) * 0.3), (cx + k + 0.18, up + 0.2)], b
            )
    elif p[1] == 2:
        pen.ellipse(cx - 0.04, up + 0.06, 0.4, 0.24, b)
    else:
        pen.poly([(cx - 0.3, up + 0.2), (cx - 0.52, up - 0.16), (cx + 0.2, up - 0.16), (cx + 0.36, up + 0.2)], b)
    pen.poly([(cx - 0.14, cy + ry - 0.14), (cx - 0.34, cy + ry + 0.24), (cx + 0.2, cy + ry - 0.08)], b)
    power, taper = ((2.0, 0.0), (2.5, 0.0), (2.0, 0.12), (1.7, 0.0))[p[2]]
    pen.poly(superellipse(cx, cy, rx, ry, power, taper), None)
    pen.poly([(cx - 0.02, cy + 0.02), (cx - 0.36, cy - 0.08), (cx - 0.36, cy + 0.32)], a, outlined=False)
    _eye(pen, cx + rx * 0.52, cy - 0.14, 0.2 if p[3] < 3 else 0.26)
    mx = cx + rx * 0.84
    if p[3] == 0:
        pen.line([(mx - 0.14, cy + 0.2), (mx, cy + 0.16)], 0.09, INK, outlined=False)
    elif p[3] == 1:
        pen.ellipse(cx + rx * 0.96, cy + 0.1, 0.11, 0.13, a)
    else:
        pen.line([(mx - 0.16, cy + 0.14), (mx - 0.08, cy + 0.22), (mx + 0.02, cy + 0.14)], 0.08, INK, outlined=False)
    nx = cx + rx * 0.1
    return Anchors(
        (cx + 0.16, up + 0.1, 0.38),
        ((nx, cy - ry * 0.94), (nx, cy + ry * 0.94)),
        (cx - 0.02, cy + 0.1),
        (cx - 0.4, up + 0.1),
    )


BUILDERS: dict[str, Callable[[Pen], Anchors]] = {
    "creature": creature,
    "robot": robot,
    "teapot": teapot,
    "house": house,
    "car": car,
    "fish": fish,
}


def add_trim(pen: Pen, anchors: Anchors) -> None:
    """Adds what the instance always carries (`Instance.trim`)."""
    trim, (x, y) = pen.instance.trim, anchors.badge
    ribbon = pen.main if pen.instance.cls == "house" else pen.accent  # a house wears it on its accent-coloured roof
    if trim == "star":
        points = []
        for k in range(10):
            r = 0.27 if k % 2 == 0 else 0.12
            points.append((x + r * math.sin(k * math.pi / 5), y - r * math.cos(k * math.pi / 5)))
        pen.ellipse(x, y, 0.3, 0.3, INK, outlined=False)
        pen.poly(points, (255, 220, 60), outlined=False)
    elif trim == "bow":
        for side in (-1, 1):
            pen.poly([(x, y), (x + side * 0.34, y - 0.22), (x + side * 0.34, y + 0.22)], INK, outlined=False)
            pen.poly(
                [(x + side * 0.05, y), (x + side * 0.28, y - 0.14), (x + side * 0.28, y + 0.14)], ribbon, outlined=False
            )
        pen.ellipse(x, y, 0.1, 0.1, ribbon, outlined=False)
    elif trim == "flag":
        px, py = anchors.pole
        pen.line([(px, py), (px, -1.0)], 0.08, INK, outlined=False)
        pen.poly([(px, -1.06), (px - 0.36, -0.9), (px, -0.7)], pen.accent)


def add_accessory(pen: Pen, anchors: Anchors, accessory: str) -> None:
    """Adds what the prompt asks for: a red hat or a blue scarf."""
    if accessory == "hat":
        x, y, w = anchors.hat
        w = min(w, 0.5)
        pen.rect(x - w * 0.72, y - 0.44, x + w * 0.72, y, HAT, 0.1)
        pen.rect(x - w - 0.14, y - 0.1, x + w + 0.14, y + 0.04, HAT, 0.06)
        pen.rect(x - w * 0.72, y - 0.2, x + w * 0.72, y - 0.1, mix(HAT, INK, 0.6), outlined=False)
    elif accessory == "scarf":
        (x0, y0), (x1, y1) = anchors.neck
        tx, ty = x0 + 0.72 * (x1 - x0), y0 + 0.72 * (y1 - y0)
        dark = mix(SCARF, INK, 0.7)
        for points in ([(tx, ty), (tx + 0.06, ty + 0.48)], [(x0, y0), (x1, y1)]):
            pen.line(points, 0.32, dark)
            pen.line(points, 0.22, SCARF, outlined=False)
