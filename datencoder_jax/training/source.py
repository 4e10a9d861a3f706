"""Pre-rendered toyworld pictures in memory, drawn as a pure function of the step."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Source:
    """Pictures and their labels.

    Attributes:
        images: uint8 `[n, h, w, 3]`.
        captions: one caption per picture.
        instance_id: `[n]`, which inhabitant is shown.
        labels: further integer labels `[n]` by name (scene, style, accessory ...).
        seed: of the drawing order.
    """

    images: np.ndarray
    captions: list[str]
    instance_id: np.ndarray
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, step: int, count: int) -> np.ndarray:
        """Indices of the pictures of a step, the same whenever they are asked for."""
        return np.random.default_rng([self.seed, step]).integers(len(self), size=count)
