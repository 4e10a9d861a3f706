"""Prompts to pictures, one program: text, denoising with guidance along both paths, decoding.

At every step the UNet runs once on a batch of two halves, the negative prompt and the prompt, and

    prediction = u + g (c - u)                                                                     (1)

with guidance scale `g`. With a concept both halves have the offsets on and are blended with the hard path; the hard
path of the negative half reads the negative prompt too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from datencoder_jax.compilation import Program
from datencoder_jax.diffusion.guidance import guided
from datencoder_jax.diffusion.samplers import Plan, sample
from datencoder_jax.pipeline import Base
from datencoder_jax.typing import Variables

_DECODE_PIXELS = 512 * 512
"""Pixels decoded at a time: one 512 px picture, or many small ones."""


class Request(NamedTuple):
    """What to draw, one row per picture.

    Attributes:
        soft_ids, hard_ids: prompts with the placeholder and with the nearest word, `[batch, L]`; `hard_ids` is None
            without a concept.
        negative_ids: `[1, L]`.
        noise: `[batch, h, w, c]`, standard normal.
        guidance: `g`, scalar.
        blend: weight of the soft path, scalar.
    """

    soft_ids: jax.Array
    hard_ids: jax.Array | None
    negative_ids: jax.Array
    noise: jax.Array
    guidance: jax.Array
    blend: jax.Array


def _generate(base: Base, plan: Plan, request: Request, variables: Variables | None) -> jax.Array:
    latents = sample_latents(base, plan, request, variables)
    return decode(base, latents)


def sample_latents(base: Base, plan: Plan, request: Request, variables: Variables | None) -> jax.Array:
    """Scaled clean latents `[batch, h, w, c]` of a request; `variables` are the concept's, None for none."""
    count = len(request.soft_ids)
    negative = base.text(request.negative_ids).last_hidden
    negative = jnp.broadcast_to(negative, (count, *negative.shape[1:]))

    def both(ids, concept=None):
        return jnp.concatenate([negative, base.text(ids, concept).last_hidden])

    if variables is None:
        context, paths = both(request.soft_ids), {}
    else:
        context = both(request.soft_ids, variables.embeddings)
        paths = {"offsets": variables.offsets, "hard_context": both(request.hard_ids), "blend": request.blend}

    def predict(latents, t):
        halves = base.unet(jnp.concatenate([latents, latents]), t, context, **paths)
        unconditional, conditional = jnp.split(halves, 2)
        return guided(unconditional, conditional, request.guidance)

    return sample(plan, predict, request.noise)


def decode(base: Base, latents: jax.Array) -> jax.Array:
    """Latents `[batch, h, w, c]` -> uint8 pictures `[batch, H, W, 3]`, a few at a time."""
    vae = base.vae.bind()
    factor = base.vae.config.factor
    at_once = max(1, _DECODE_PIXELS // (latents.shape[1] * latents.shape[2] * factor**2))

    def picture(z):
        pixels = vae.to_images(z[None])[0]
        return jnp.round((pixels + 1.0) * 127.5).astype(jnp.uint8)

    return jax.lax.map(picture, latents, batch_size=min(at_once, len(latents)))


generate = Program("sampling", _generate)
"""`generate(base, plan, request, variables) -> uint8 [batch, H, W, 3]`, compiled per batch size and sampler length."""
