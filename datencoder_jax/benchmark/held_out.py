"""What encoders leave of the denoising loss, on individuals of the embedded world that nothing was trained on.

    l_j(E) = L_den of batch j with encoder E      equation (1) of `training.tuning_encoder`

All encoders see the same pictures, targets, timesteps and noises, most of which is the noise's, so a difference
`l_j(E) - l_j(E')` is far more certain than either: it tells encoders apart that were trained for minutes, whose
pictures do not differ yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.checkpoints.encoder_folder import read_encoder
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.toyworld.world import CLASSES, HELD_OUT
from datencoder_jax.training.encoder_stage import frozen_of
from datencoder_jax.training.pairs import Pairs, concept_views
from datencoder_jax.training.tuning_encoder import TuningEncoderTask, Weights

GROUPS = {"in domain": tuple(name for name in CLASSES if name not in HELD_OUT), "held out": HELD_OUT}
"""Kinds of things that the recipes' encoders are trained on, and those that they are not."""
BATCHES = 12
"""Of a group."""
_BATCH, _DRAWS, _SEED = 24, 4, 0


def open_groups(pipeline: Pipeline, recipe: Any) -> dict[str, Pairs]:
    """As many development individuals of every group as its batches have samples, drawn as the recipe draws them."""
    data = recipe.data.copy_and_resolve_references()
    data.concepts = BATCHES * _BATCH
    drawn = {"batch_size": _BATCH, "draws": _DRAWS, "share": recipe.pairs, "seed": _SEED}
    return {
        name: replace(concept_views(pipeline, "development", data, _SEED, kinds), **drawn)
        for name, kinds in GROUPS.items()
    }


def losses(pipeline: Pipeline, groups: Mapping[str, Pairs], recipe: Any, folder: Path) -> dict[str, list[float]]:
    """`l_j` of the encoder in a folder, of every group.

    Pixels beside the concept weigh what they weigh in the recipe, whatever the encoder was trained with.

    Raises:
        UserError: there is no encoder, or it is another base model's.
    """
    loss = _loss(pipeline, recipe, folder)
    return {
        name: [loss(pairs.batch(j, slice(None)), jax.random.key(j)) for j in range(BATCHES)]
        for name, pairs in groups.items()
    }


def _loss(pipeline: Pipeline, recipe: Any, folder: Path) -> Callable[[dict[str, np.ndarray], jax.Array], float]:
    encoder = read_encoder(folder, pipeline.fingerprint, pipeline.vision_fingerprint)
    frozen = frozen_of(pipeline)
    weights = Weights(**recipe.weights)
    task = TuningEncoderTask(encoder.config, frozen, None, None, batch_size=_BATCH, weights=weights, draws=_DRAWS)
    compiled = jax.jit(task.loss)

    def denoise(batch: dict[str, np.ndarray], key: jax.Array) -> float:
        return float(compiled(encoder.params, frozen, batch, key, jnp.zeros((), jnp.int32))[1]["denoise"])

    return denoise
