"""The model whose speed is measured: Stable Diffusion 1.5's sizes with random weights, or the embedded model on a CPU.

The random weights are 0.02 times normal draws, of norms one and of biases zero, so that every number stays finite. They
are one block of draws repeated, since drawing 1.7 billion of them would take longer than what is measured.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from datencoder_jax import api, memory
from datencoder_jax.models.module import Model
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.plan.dry_run import hollow_pipeline, tokenizer_folders
from datencoder_jax.plan.shapes import stable_diffusion, tuning_encoder
from datencoder_jax.runtime.target import Target, current_target

_SCALE = 0.02
_OUTPUT_SCALE = 0.001
"""Scale of the weights of the tuning-encoder's last layers, whose outputs are low-rank factors."""
_BLOCK = 2**24 - 3
"""Draws that are repeated; no multiple of a weight's size."""


class Workload:
    """The pipeline that is measured, made when it is first asked for.

    Attributes:
        is_small: whether it is the embedded model.
    """

    def __init__(self, target: Target | None = None):
        self.is_small = (target or current_target()).platform == "cpu"

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model."""
        return api.load() if self.is_small else make_random_pipeline()

    @property
    def image(self) -> np.ndarray:
        """An image of the model's resolution, uint8 noise."""
        side = self.pipeline.resolution
        return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


def make_random_pipeline() -> Pipeline:
    """Stable Diffusion 1.5 with OpenCLIP's ViT-H/14 and a tuning-encoder, in bfloat16, with random weights."""
    target = current_target()
    base, settings = stable_diffusion("1.5", "bfloat16", target, vision=True), memory.choose(True, target)
    encoder, folders = tuning_encoder(base), tokenizer_folders(base)
    hollow = hollow_pipeline(base, folders, settings, name="Stable Diffusion 1.5, random weights", encoder=encoder)
    place: Any = np.asarray if settings.in_parts else jnp.asarray
    networks = {
        name: fill_randomly(getattr(hollow.base, name), place, target.compute_dtype("bfloat16"))
        for name in ("unet", "vae", "text", "vision")
    }
    constants = {
        "words": place(np.ones(hollow.base.words.shape, bool)),
        "word_norm": place(np.float32(_SCALE * sum(hollow.base.widths) ** 0.5)),
        "pixel_mean": place(np.full(3, 0.45, np.float32)),
        "pixel_std": place(np.full(3, 0.27, np.float32)),
    }
    return replace(hollow, base=replace(hollow.base, **networks, **constants), encoder=fill_randomly(encoder, place))


def fill_randomly(model: Model, place: Callable[[np.ndarray], Any] = jnp.asarray, compute: str = "float32") -> Model:
    """A model of shapes, or of hollow arrays, with random weights and the type of its computations.

    Args:
        place: puts an array where it belongs.
    """
    params: dict[str, Any] = {}
    for index, (name, shape) in enumerate(model.params.items()):
        if len(shape.shape) < 2:
            values = np.full(shape.shape, name.endswith("weight"), shape.dtype)
        else:
            scale = _OUTPUT_SCALE if "_heads." in name else _SCALE
            values = _random_values(shape.shape, np.dtype(shape.dtype), scale, seed=index)
        params[name] = place(values)
    return replace(model, params=params, dtype=compute)


def _random_values(shape: tuple[int, ...], dtype: np.dtype, scale: float, seed: int) -> np.ndarray:
    """A piece of the block of draws, from a place that the seed says; the block again and again for large shapes."""
    block, count = _random_block(dtype, scale), math.prod(shape)
    start = 7919 * seed % (len(block) // 2)
    values = block[start : start + count] if start + count <= len(block) else np.resize(block, count)
    return values.reshape(shape)


@functools.cache
def _random_block(dtype: np.dtype, scale: float) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal(_BLOCK, np.float32)).astype(dtype)
