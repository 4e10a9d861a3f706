"""A concept's embedding as an encoder predicts it anew for every noisy latent: E4T's (arXiv 2302.12228).

    v*(z_t, t) = v + s mean_i E(I_i, z_t, t)                                                        (1)

with the word `v` that stands for the domain, the pictures `I_i` of the concept and `s = 0.1`. `E` sees `z_t` through
the encoder half of the frozen UNet under the empty prompt, without gradient. The mean over several pictures is ours.
"""

import jax
import jax.numpy as jnp

from datencoder_jax.encoder.features import denoiser_features
from datencoder_jax.models.module import Model
from datencoder_jax.typing import Added, Features, Reader


def read_again(
    reader: Reader, embeddings: jax.Array, unet: Model, latents: jax.Array, t: jax.Array, added: Added | None = None
) -> jax.Array:
    """Equation (1); differentiable in the reader's encoder, and in nothing else of it.

    Args:
        embeddings: `v`, `[n, d]`.
        latents: `z_t`, `[batch, h, w, c]`.
        t: `[batch]`, or a scalar.
        added: of the empty prompt, for XL.

    Returns:
        One set of vectors per latent, float32 `[batch, n, d]`.
    """
    count, pictures = len(latents), reader.classes.shape[-3]
    t = jnp.broadcast_to(t, (count,))
    context = jnp.broadcast_to(reader.context, (count, *reader.context.shape[1:]))
    pooled = denoiser_features(unet, latents, t, context.astype(unet.dtype), added)
    classes, patches = (_for_each_latent(jnp.asarray(x), count) for x in (reader.classes, reader.patches))
    seen = Features(classes, patches, jnp.tile(pooled, (pictures, 1)), jnp.tile(t, pictures))
    predicted = reader.encoder(jax.lax.stop_gradient(seen)).embeddings[:, 0]
    mean = predicted.reshape(pictures, count, -1).mean(axis=0)
    scale = jax.lax.stop_gradient(jnp.asarray(reader.scale))
    return jnp.asarray(embeddings)[None] + scale[None, :, None] * mean[:, None]


def _for_each_latent(states: jax.Array, count: int) -> jax.Array:
    """States `[pictures, n, d]`, or `[count, pictures, n, d]`, as `[pictures * count, n, d]`, pictures outermost."""
    states = jnp.broadcast_to(states, (count, *states.shape[-3:]))
    return states.swapaxes(0, 1).reshape(-1, *states.shape[-2:])
