"""What the tests of files for other programs share: a concept of a tiny base model, arrays in PyTorch's order."""

from dataclasses import replace

import numpy as np
import torch

from datencoder_jax.checkpoints.export import Target
from datencoder_jax.pipeline import Pipeline, attention_shapes
from datencoder_jax.typing import Concept, LowRank

TARGET = Target(widths=(12,), resolution=16)


def draw_offsets(shapes, seed=0, ranks=(2,)):
    """Offsets large enough to change a picture visibly; projections take turns in rank."""
    rng, offsets = np.random.default_rng(seed), {}
    for index, (path, (inputs, outputs)) in enumerate(shapes.items()):
        rank = ranks[index % len(ranks)]
        down = rng.standard_normal((rank, inputs), dtype=np.float32).T / np.float32(inputs**0.5)
        offsets[path] = LowRank(down, 0.3 * rng.standard_normal((rank, outputs), dtype=np.float32))
    return offsets


def tiny_concept(pipeline: Pipeline, vectors=2, **changes) -> Concept:
    rng = np.random.default_rng(1)
    concept = Concept(
        embeddings=0.3 * rng.standard_normal((vectors, sum(pipeline.base.widths)), dtype=np.float32),
        offsets=draw_offsets(attention_shapes(pipeline.base.unet)),
        token="S*",
        blend=0.3,
        base="tiny",
        fingerprint=pipeline.fingerprint,
        nearest_word="cat",
        metadata={"steps": "12"},
    )
    return replace(concept, **changes)


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)
