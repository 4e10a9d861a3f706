"""The words of the toy world: classes, instances (the identity to personalize) and contexts (what a prompt asks for).

An `Instance` holds everything captions do not say; a `Context` holds everything they do. A picture is a pure function
of (instance, context, seed), so the same instance can be drawn in any context and every prompt has a true answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

CLASSES = ("creature", "robot", "teapot", "house", "car", "fish")
HELD_OUT = ("teapot",)
"""Classes the base model knows but encoder pretraining never sees."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (218, 44, 46),
    "orange": (247, 135, 32),
    "yellow": (252, 214, 52),
    "green": (52, 158, 70),
    "cyan": (78, 205, 214),
    "blue": (42, 88, 206),
    "purple": (132, 62, 172),
    "pink": (250, 146, 188),
    "brown": (128, 80, 44),
    "white": (248, 246, 240),
}
COLOURS = tuple(PALETTE)
PATTERNS = ("plain", "stripes", "dots", "checks")
TRIMS = ("none", "star", "bow", "flag")
"""What an instance always carries; never mentioned in a caption."""

SCENES = ("studio", "beach", "forest", "night", "snow", "city", "desert", "underwater")
STYLES = ("flat", "sketch", "pixel", "watercolour")
ACCESSORIES = ("none", "hat", "scarf")
"""What a prompt may ask for: "wearing a red hat", "with a blue scarf"."""

SPLITS: dict[str, range] = {
    "train": range(0, 1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
    "development": range(1_200_000, 1_300_000),
}
"""Instance ids of each split; `development` is for choosing learning rates and other settings."""

SHAPES = 4
PARTS = 4
VARIANTS = 4
_MIN_CONTRAST = 130.0  # RGB distance below which a pattern would not survive 32 pixels

T = TypeVar("T")


class Uniform(Protocol):
    """Anything with `random() -> float in [0, 1)`: `numpy.random.Generator`, `random.Random`, `Draws`."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


class Draws:
    """Uniform draws from Philox counters: a pure function of the key, stable across numpy versions, cheap to make."""

    def __init__(self, *key: int, count: int = 64):
        words = [int(k) & 0xFFFFFFFFFFFFFFFF for k in key]
        if len(words) > 2:
            raise ValueError(f"Draws takes at most two key words, got {len(words)}")
        raw = np.random.Philox(key=np.array([*words, 0][:2], np.uint64)).random_raw(count)
        self._values = (raw / 2.0**64).tolist()
        self._next = 0

    def random(self) -> float:
        """The next float in [0, 1); the sequence repeats after `count` draws."""
        value = self._values[self._next % len(self._values)]
        self._next += 1
        return value

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`, each equally likely."""
        return options[min(int(self.random() * len(options)), len(options) - 1)]


@dataclass(frozen=True)
class Instance:
    """One individual: a class and the attributes that make it this one.

    Attributes:
        id: its number, or -1 for a hand-made one.
        cls: one of `CLASSES`.
        main, second, accent: names in `PALETTE`, all different; the pattern is `second` on `main`.
        pattern: one of `PATTERNS`.
        upright: stripes run vertically instead of horizontally.
        shape: `SHAPES` proportions in [0, 1].
        parts: `PARTS` variants in 0..3 (ears, eyes, roof, tail ...: each class reads them its own way).
        trim: one of `TRIMS`.
    """

    id: int
    cls: str
    main: str
    second: str
    accent: str
    pattern: str
    upright: bool
    shape: tuple[float, ...]
    parts: tuple[int, ...]
    trim: str

    @staticmethod
    def from_id(id: int) -> Instance:
        """The instance with this number: a pure function; its class is `CLASSES[id % 6]`."""
        return _instance(int(id))

    def labels(self) -> dict[str, int]:
        """The attributes as class indices, for probes."""
        return {
            "class": CLASSES.index(self.cls),
            "main": COLOURS.index(self.main),
            "second": COLOURS.index(self.second),
            "accent": COLOURS.index(self.accent),
            "pattern": PATTERNS.index(self.pattern),
            "trim": TRIMS.index(self.trim),
        }


def contrast(a: str, b: str) -> float:
    """Euclidean RGB distance (0..441) between two palette colours."""
    return sum((x - y) ** 2 for x, y in zip(PALETTE[a], PALETTE[b], strict=True)) ** 0.5


@functools.lru_cache(maxsize=65536)
def _instance(id: int) -> Instance:
    if id < 0:
        raise ValueError(f"instance ids are not negative, got {id}")
    draws = Draws(id, 0x1D, count=24)
    main = draws.choice(COLOURS)
    second = draws.choice([c for c in COLOURS if contrast(c, main) > _MIN_CONTRAST])
    accent = draws.choice([c for c in COLOURS if c not in (main, second) and contrast(c, main) > 100])
    return Instance(
        id=id,
        cls=CLASSES[id % len(CLASSES)],
        main=main,
        second=second,
        accent=accent,
        pattern=draws.choice(PATTERNS),
        upright=draws.random() < 0.5,
        shape=tuple(draws.random() for _ in range(SHAPES)),
        parts=tuple(draws.choice(range(VARIANTS)) for _ in range(PARTS)),
        trim=draws.choice(TRIMS),
    )


@dataclass(frozen=True)
class Context:
    """What a prompt can ask for; position, size and mirroring come from the picture's seed.

    Attributes:
        scene: one of `SCENES`. style: one of `STYLES`. accessory: one of `ACCESSORIES`. count: 1 or 2 objects.
    """

    scene: str = "studio"
    style: str = "flat"
    accessory: str = "none"
    count: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scene", self.scene, SCENES),
            ("style", self.style, STYLES),
            ("accessory", self.accessory, ACCESSORIES),
            ("count", self.count, (1, 2)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")

    def labels(self) -> dict[str, int]:
        """The context as class indices, for probes."""
        return {
            "scene": SCENES.index(self.scene),
            "style": STYLES.index(self.style),
            "accessory": ACCESSORIES.index(self.accessory),
        }


def sample_context(rng: Uniform, *, flat: float = 0.7, bare: float = 0.65) -> Context:
    """A training context: scenes uniform, style flat with probability `flat`, no accessory with probability `bare`."""
    scene = SCENES[int(rng.random() * len(SCENES))]
    styled, which = rng.random() >= flat, rng.random()
    style = STYLES[1 + int(which * (len(STYLES) - 1))] if styled else "flat"
    dressed, which = rng.random() >= bare, rng.random()
    accessory = ACCESSORIES[1 + int(which * (len(ACCESSORIES) - 1))] if dressed else "none"
    return Context(scene, style, accessory)
