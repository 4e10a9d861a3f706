"""The backgrounds. Each fills the frame; colours and placements vary a little with the picture's draws."""

from __future__ import annotations

from collections.abc import Callable

from datencoder_jax.toyworld.canvas import Colour, Sheet, mix
from datencoder_jax.toyworld.world import Draws

WALLS: tuple[Colour, ...] = ((226, 220, 210), (214, 222, 230), (232, 224, 226), (220, 228, 216))


def studio(sheet: Sheet, d: Draws) -> float:
    """A pastel wall and a floor."""
    wall = d.choice(WALLS)
    horizon = d.uniform(0.74, 0.8)
    sheet.rect(0, 0, 1, 1, wall)
    sheet.rect(0, horizon, 1, 1, mix(wall, (120, 110, 110), 0.25))
    return 0.3


def beach(sheet: Sheet, d: Draws) -> float:
    """Sky, sun, sea and sand."""
    sky, sea = (146, 214, 248), (32, 138, 196)
    shore, sun = d.uniform(0.56, 0.64), d.choice((0.12, 0.88))
    sheet.rect(0, 0, 1, 1, sky)
    sheet.disc(sun, 0.13, 0.11, (255, 232, 110))
    sheet.rect(0, shore - 0.2, 1, shore, sea)
    sheet.rect(0, shore, 1, shore + 0.03, (240, 250, 252))
    sheet.rect(0, shore + 0.03, 1, 1, (242, 214, 148))
    for _ in range(5):
        sheet.disc(d.random(), d.uniform(0.84, 0.98), 0.018, (214, 178, 112))
    return 0.3


def forest(sheet: Sheet, d: Draws) -> float:
    """Firs over grass."""
    sheet.rect(0, 0, 1, 1, (168, 212, 158))
    step = d.uniform(-0.05, 0.05)
    for k, x in enumerate((0.0, 0.2, 0.42, 0.62, 0.84, 1.02)):
        x, top = x + step, (0.02, 0.16)[k % 2] + d.uniform(-0.05, 0.05)
        green = ((30, 96, 52), (44, 122, 60))[k % 2]
        sheet.rect(x - 0.025, 0.6, x + 0.025, 0.76, (96, 62, 38))
        sheet.poly([(x - 0.15, 0.68), (x, top), (x + 0.15, 0.68)], green)
    sheet.rect(0, 0.72, 1, 1, (84, 146, 60))
    for _ in range(6):
        x, y = d.random(), d.uniform(0.82, 0.99)
        sheet.poly([(x - 0.03, y), (x, y - 0.08), (x + 0.03, y)], (54, 112, 44))
    return 0.35


def night(sheet: Sheet, d: Draws) -> float:
    """Moon, stars and dark hills."""
    sheet.rect(0, 0, 1, 1, (24, 26, 72))
    moon = d.choice((0.14, 0.86))
    sheet.disc(moon, 0.14, 0.1, (250, 244, 206))
    sheet.disc(moon + 0.045, 0.115, 0.085, (24, 26, 72))
    for k in range(11):
        sheet.disc((k + d.random()) / 11, d.uniform(0.03, 0.66), 0.017, (255, 248, 200))
    sheet.disc(d.uniform(0.1, 0.3), 0.98, 0.5, (44, 48, 92), 0.22)
    sheet.disc(d.uniform(0.7, 0.9), 1.0, 0.55, (52, 56, 102), 0.24)
    return 0.4


def snow(sheet: Sheet, d: Draws) -> float:
    """White hills, firs and falling flakes."""
    sheet.rect(0, 0, 1, 1, (166, 190, 216))
    for x in (d.uniform(0.02, 0.14), d.uniform(0.86, 0.98)):
        sheet.poly([(x - 0.16, 0.74), (x, 0.24), (x + 0.16, 0.74)], (88, 128, 132))
        sheet.poly([(x - 0.08, 0.5), (x, 0.24), (x + 0.08, 0.5)], (250, 252, 255))
    sheet.disc(d.uniform(0.2, 0.4), 1.02, 0.7, (250, 252, 255), 0.34)
    sheet.disc(d.uniform(0.8, 1.0), 1.02, 0.6, (238, 244, 252), 0.36)
    for k in range(13):
        sheet.disc((k + d.random()) / 13, d.uniform(0.02, 0.72), 0.022, (255, 255, 255))
    return 0.22


def city(sheet: Sheet, d: Draws) -> float:
    """Houses with lit windows behind a road."""
    sheet.rect(0, 0, 1, 1, (226, 204, 196))
    x = d.uniform(-0.12, 0.0)
    k = int(d.random() * 3)
    while x < 1:
        w, top = d.uniform(0.17, 0.25), d.uniform(0.06, 0.36)
        wall = ((112, 116, 138), (140, 136, 152), (92, 98, 122))[k % 3]
        sheet.rect(x, top, x + w, 0.8, wall)
        for row in range(5):
            for column in range(2):
                wx, wy = x + w * (0.18 + 0.4 * column), top + 0.05 + 0.12 * row
                sheet.rect(wx, wy, wx + w * 0.24, wy + 0.055, (250, 224, 140))
        x, k = x + w, k + 1
    sheet.rect(0, 0.78, 1, 1, (74, 74, 82))
    shift = d.uniform(-0.2, 0.1)
    for j in range(5):
        sheet.rect(shift + 0.28 * j, 0.92, shift + 0.28 * j + 0.16, 0.95, (240, 236, 220))
    return 0.45


def desert(sheet: Sheet, d: Draws) -> float:
    """A low sun, dunes and cacti."""
    sheet.rect(0, 0, 1, 1, (252, 196, 128))
    sheet.disc(d.uniform(0.25, 0.75), 0.12, 0.1, (255, 244, 190))
    sheet.disc(d.uniform(0.0, 0.3), 0.92, 0.6, (222, 140, 74), 0.36)
    sheet.disc(d.uniform(0.7, 1.0), 0.98, 0.7, (204, 116, 60), 0.38)
    for x in (d.uniform(0.05, 0.12), d.uniform(0.88, 0.95)):
        top, green = d.uniform(0.3, 0.42), (46, 118, 74)
        sheet.rect(x - 0.03, top, x + 0.03, 0.76, green)
        side = 1 if x > 0.5 else -1
        sheet.rect(min(x, x - side * 0.09), top + 0.18, max(x, x - side * 0.09), top + 0.23, green)
        sheet.rect(x - side * 0.09 - 0.022, top + 0.08, x - side * 0.09 + 0.022, top + 0.23, green)
    return 0.35


def underwater(sheet: Sheet, d: Draws) -> float:
    """Water that darkens downwards, weeds and bubbles."""
    for k in range(6):
        sheet.rect(0, k / 6, 1, 1, mix((70, 186, 216), (10, 70, 142), k / 5))
    sheet.disc(d.uniform(0.2, 0.8), 1.06, 0.9, (196, 178, 122), 0.2)
    for x in (d.uniform(0.03, 0.1), d.uniform(0.14, 0.22), d.uniform(0.8, 0.86), d.uniform(0.9, 0.97)):
        top = d.uniform(0.4, 0.62)
        wave = [(x + (0.025 if j % 2 else -0.025), 0.94 - (0.94 - top) * j / 5) for j in range(6)]
        sheet.line(wave, 0.04, (28, 122, 78))
    for k in range(8):
        x = d.uniform(0.02, 0.22) if k % 2 else d.uniform(0.78, 0.98)
        sheet.disc(x, d.uniform(0.04, 0.6), d.uniform(0.018, 0.034), (206, 242, 250))
    return 0.2


SCENERY: dict[str, Callable[[Sheet, Draws], float]] = {
    "studio": studio,
    "beach": beach,
    "forest": forest,
    "night": night,
    "snow": snow,
    "city": city,
    "desert": desert,
    "underwater": underwater,
}
"""Each draws its scene and returns the strength (0..1) of the shadow an object casts there."""
