"""What personalizing and drawing share: a seed's streams of draws, the seconds that stages take, the blend."""

import time

from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model

PERSONALIZE, GENERATE, FRESH, PRIOR, FOCUS = 0, 1, 2, 3, 4
"""Streams of a seed's draws: pictures must not start from the noise their concept was seen under."""

START_AT_WORD = 3
"""The stream of an ablation's low-rank start. Its number is that of `PRIOR`, which belongs to other methods: what
starts there takes no prior. It stays, as reports have been written under it."""

SHIPPED_SEEDS = frozenset({0, 3, 5})
"""Seeds of recipes of the shipped weights. Some streams of training had tags in common with others. Under these seeds
they still have, which did no harm, so that the weights can be made again; under others each has a tag of its own."""


def blend_of(encoder: Model | None, blend: float | None) -> float:
    """The weight of the soft path: as asked for, or the encoder's, or 1 where there is none."""
    if blend is None:
        return encoder.config.blend if encoder else 1.0
    if not 0.0 <= blend <= 1.0:
        raise UserError(f"blend must lie between 0 and 1, not {blend}")
    return float(blend)


class Clock:
    """Adds a block's seconds to `seconds[name]`, but those its programs spent compiling to `seconds["compile"]`."""

    def __init__(self, seconds: dict[str, float], name: str, *programs):
        self.seconds, self.name, self.programs = seconds, name, programs

    def __enter__(self):
        self._before, self._start = self._compiling(), time.perf_counter()

    def __exit__(self, *_):
        compiling = self._compiling() - self._before
        self.seconds[self.name] = time.perf_counter() - self._start - compiling
        self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiling

    def _compiling(self) -> float:
        return sum(program.seconds for program in self.programs)
