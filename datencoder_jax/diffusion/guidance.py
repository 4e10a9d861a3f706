"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    guided = unconditional + s (conditional - unconditional)                (1)

(1) is linear, so it holds alike for predictions of epsilon, of v and of `x0`. At or below 1 there is no guidance, as in
diffusers: the prediction is the conditional one, and the other is not computed. That is what `s = 0` means on the cards
of distilled models.
"""

import jax
import jax.numpy as jnp


def guidance_scale(scale: float) -> jax.Array | None:
    """The scale as programs take it, a scalar; None where it asks for no guidance."""
    return None if scale <= 1.0 else jnp.float32(scale)


def guided(unconditional: jax.Array, conditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Predictions `[batch, ...]` combined at a guidance scale, a scalar or one per sample `[batch]`; equation (1)."""
    scale = jnp.asarray(scale, conditional.dtype)
    scale = scale.reshape(scale.shape + (1,) * (conditional.ndim - 1)) if scale.ndim else scale
    return unconditional + scale * (conditional - unconditional)
