"""Prior preservation: pictures that the model draws of a class before it learns one of its kind (arXiv 2208.12242)."""

from dataclasses import dataclass
from math import isfinite

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from datencoder_jax import sampling, tuning
from datencoder_jax.bookkeeping import PRIOR
from datencoder_jax.diffusion.guidance import guidance_scale
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.errors import UserError
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.prompts import TEMPLATE

_STEPS = 25


@dataclass(frozen=True)
class PriorOptions:
    """Prior preservation: how many `pictures` the model draws of the class first, and the `weight` of its loss."""

    pictures: int = 16
    weight: float = 1.0

    def __post_init__(self):
        if self.pictures < 1 or not (isfinite(self.weight) and self.weight > 0):
            raise UserError(
                f"prior preservation needs pictures and a weight above 0, not {self.pictures}, {self.weight}"
            )


def draw_prior(pipeline: Pipeline, word: str, prior: PriorOptions, side: int, seed: int, quiet: bool) -> tuning.Prior:
    """Pictures that the model draws of a class, as latents of `side`."""
    base, prompt = pipeline.base, [TEMPLATE.format(word)]
    shape = (prior.pictures, side, side, base.unet.config.in_channels)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), PRIOR), shape)
    ids = jnp.asarray(pipeline.tokenizer.encode(prompt))
    negative = None if base.zero_empty else jnp.asarray(pipeline.tokenizer.encode([""]))
    plan, parts = make_plan("ddim", base.schedule, _STEPS), []
    at_once = min(pipeline.memory.batch, prior.pictures)
    for first in tqdm(range(0, prior.pictures, at_once), desc="prior pictures", disable=quiet):
        rows = jnp.asarray(np.resize(np.arange(first, min(first + at_once, prior.pictures)), at_once))
        request = sampling.Request(
            jnp.broadcast_to(ids, (at_once, ids.shape[1])),
            None,
            negative,
            noise[rows],
            guidance_scale(pipeline.guidance),
            jnp.float32(1.0),
        )
        networks = base.only("unet", "text", "text_2")
        parts.append(
            sampling.draw_latents(networks, plan, request, None, in_parts=pipeline.memory.in_parts, quiet=quiet)
        )
    latents = jnp.concatenate(parts)[: prior.pictures]
    read = tuning.read_prompt(base.only("text", "text_2"), ids, None, quiet=quiet)
    return tuning.Prior(latents, read, jnp.float32(prior.weight))
