"""Scores of generated pictures: pure functions of what the judge reads, one value per picture.

    identity    1/R sum_r <u(picture), u(true_r)>      against R true renders of the individual in the asked context
    attributes  fraction of the individual's attributes that are read off the picture rightly
    prompt      whether the asked scene, style, accessory and the class are read
    copying     whether the scene of the *input* picture is read although another was asked for

Intervals come from resampling individuals (the pictures of one individual are not independent of each other), and
there are none of fewer than `MIN_SUBJECTS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from datencoder_jax.toyworld.world import SCENES, Context, Instance

ATTRIBUTES = ("main", "second", "accent", "pattern", "trim")
PROMPT = ("class", "scene", "style", "accessory")
MIN_SUBJECTS = 6
"""The fewest individuals that have an interval, and so a verdict.

Resampling can give no wider interval than the range of the values. With n independent values the median of their
distribution lies outside that range with a chance of 2 / 2^n, which is below 5 % from n = 6 on: intervals of fewer
would claim a coverage that no interval made of these values can have.
"""


class Interval(NamedTuple):
    """A mean and its 95 % interval (or another coverage), whose ends are NaN where there is none."""

    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether there is an interval, and not the mean alone."""
        return not math.isnan(self.low)


def identity(generated: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Mean cosine of each picture's embedding with those of its references.

    The same function gives the ceiling, when `generated` are true renders of other seeds than the references', and the
    floor, when they are renders of another individual of the class.

    Args:
        generated: unit vectors `[..., d]`.
        references: unit vectors `[..., R, d]` with the same leading axes, or axes that broadcast.

    Returns:
        `[...]`, in [-1, 1].
    """
    return np.einsum("...d,...d->...", generated, references.mean(axis=-2))


def attributes(read: Mapping[str, np.ndarray], instances: Sequence[Instance]) -> np.ndarray:
    """Fraction of `ATTRIBUTES` read rightly.

    Args:
        read: what the probes say, int `[n]` by name.
        instances: whom each of the `n` pictures should show.

    Returns:
        `[n]`, multiples of a fifth.
    """
    return np.mean([correct(read, name, [i.labels()[name] for i in instances]) for name in ATTRIBUTES], axis=0)


def prompt(
    read: Mapping[str, np.ndarray], instances: Sequence[Instance], contexts: Sequence[Context]
) -> dict[str, np.ndarray]:
    """Whether each of `PROMPT` is read as asked: 0 or 1, `[n]` by name.

    Args:
        read: what the probes say, int `[n]` by name.
        instances: whom each picture should show; only the class counts.
        contexts: what each picture's prompt asked for.
    """
    wanted = [i.labels() | c.labels() for i, c in zip(instances, contexts, strict=True)]
    return {name: correct(read, name, [row[name] for row in wanted]) for name in PROMPT}


def copying(read: Mapping[str, np.ndarray], asked: Sequence[Context], given: Sequence[Context]) -> np.ndarray:
    """1 where the input picture's scene is read though another was asked for, 0 where it is not: `[n]`.

    Args:
        read: what the probes say, int `[n]` by name.
        asked: what each picture's prompt asked for.
        given: the context of each picture's input picture; must have another scene, or it is a ValueError.
    """
    if any(a.scene == g.scene for a, g in zip(asked, given, strict=True)):
        raise ValueError("copying is told by the scene, so the prompt must ask for another one than the input's")
    return correct(read, "scene", [SCENES.index(context.scene) for context in given])


def correct(read: Mapping[str, np.ndarray], name: str, wanted: Sequence[int]) -> np.ndarray:
    """1.0 where the probe `name` reads the wanted answer, else 0.0: `[n]`."""
    return (np.asarray(read[name]) == np.asarray(wanted)).astype(np.float64)


def bootstrap(values: np.ndarray, n: int = 2000, seed: int = 0, coverage: float = 0.95) -> Interval:
    """Mean of `values` and its percentile bootstrap interval; of fewer than `MIN_SUBJECTS` the mean alone.

    Args:
        values: one value per individual, `[instances]`; for two methods on the same individuals give the differences.
        n: resamples, each of as many individuals drawn with replacement.
        seed: of the draws.
        coverage: of the interval.

    Returns:
        The mean and the ends, which are NaN where the values are too few.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap takes one value per individual, got shape {list(values.shape)}")
    if len(values) < MIN_SUBJECTS:
        return Interval(float(values.mean()), np.nan, np.nan)
    draws = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - coverage) / 2, (1 + coverage) / 2])
    return Interval(float(values.mean()), float(low), float(high))
