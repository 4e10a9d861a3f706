"""Scores of pictures by the base model's own CLIP, where both of its towers project to their common space.

text    cos(u(picture), u(prompt))          does it show what was asked for
image   cos(u(picture), u(input))           does it show the thing that was given
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.data.images import to_float
from datencoder_jax.pipeline import Base, Pipeline

_AT_ONCE = 64


def can_score(pipeline: Pipeline) -> bool:
    """Whether the base model has both towers and their projections."""
    vision = pipeline.base.vision
    if vision is None or not vision.config.with_projection or not pipeline.base.text.config.with_projection:
        return False
    return vision.config.projection_dim == pipeline.base.text.config.projection_dim


def text_similarity(pipeline: Pipeline, pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Cosines of uint8 pictures `[n, H, W, 3]` with their prompts, `[n]`."""
    ids = pipeline.tokenizer.encode(prompts)
    return (_unit_pictures(pipeline, pictures) * _in_parts(_texts, pipeline.base, ids)).sum(axis=1)


def image_similarity(pipeline: Pipeline, pictures: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Mean cosines of uint8 pictures `[n, H, W, 3]` with given ones `[k, H, W, 3]`, `[n]`."""
    return (_unit_pictures(pipeline, pictures) @ _unit_pictures(pipeline, given).T).mean(axis=1)


def _unit_pictures(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    return _in_parts(_images, pipeline.base, pictures)


@jax.jit
def _images(base: Base, pictures: jax.Array) -> jax.Array:
    return _unit(base.eyes(base.vision_input(to_float(pictures))).projected)


@jax.jit
def _texts(base: Base, ids: jax.Array) -> jax.Array:
    return _unit(base.text(ids).projected)


def _unit(vectors: jax.Array) -> jax.Array:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _in_parts(program: Callable, base: Base, rows: np.ndarray) -> np.ndarray:
    """The program on a few rows at a time; the last few are filled up, so that all run the same program."""
    parts = [np.resize(np.arange(k, min(k + _AT_ONCE, len(rows))), _AT_ONCE) for k in range(0, len(rows), _AT_ONCE)]
    return np.concatenate([np.asarray(program(base, rows[part])) for part in parts])[: len(rows)]
