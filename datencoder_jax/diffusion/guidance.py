"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    guided = unconditional + s (conditional - unconditional)                (1)

`s = 1` is the conditional prediction, `s = 0` the unconditional one. (1) is linear, so it holds alike for predictions
of epsilon, of v and of `x0`.
"""

import jax
import jax.numpy as jnp


def guided(unconditional: jax.Array, conditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Predictions `[batch, ...]` combined at a guidance scale, a scalar or one per sample `[batch]`; equation (1)."""
    scale = jnp.asarray(scale, conditional.dtype)
    scale = scale.reshape(scale.shape + (1,) * (conditional.ndim - 1)) if scale.ndim else scale
    return unconditional + scale * (conditional - unconditional)
