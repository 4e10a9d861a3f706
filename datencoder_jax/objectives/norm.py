"""A penalty on the norm of a predicted word embedding.

    L_b = |v_b|^2 / rho^2,      rho = mean over the vocabulary's words of |table_n|             (1)

A `v*` that grows without bound takes over the prompt. Token embeddings are short (about 0.4 in CLIP ViT-L/14), so the
norm is measured in units of `rho`: an embedding as long as an ordinary word costs 1. The unit is a choice made here.
"""

import jax
import jax.numpy as jnp


def norm_penalty(embeddings: jax.Array, reference_norm: jax.Array | float) -> jax.Array:
    """Squared norms of `embeddings` `[batch, d]` relative to `reference_norm` (scalar), `[batch]` float32; (1)."""
    relative = embeddings.astype(jnp.float32) / reference_norm
    return jnp.sum(jnp.square(relative), axis=-1)


def mean_norm(table: jax.Array, allowed: jax.Array) -> jax.Array:
    """`rho` of (1): mean norm of the rows of `table` `[vocabulary, d]` that `allowed` `[vocabulary]` marks; scalar.

    Infinite where it marks none, so that the penalty of any embedding is zero.
    """
    mean = jnp.mean(jnp.linalg.norm(table.astype(jnp.float32), axis=-1), where=allowed)
    return jnp.where(jnp.any(allowed), mean, jnp.inf)
