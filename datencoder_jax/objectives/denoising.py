"""The denoising loss: the base model's own objective.

    L_b = w_b mean_over_elements (prediction_b - target_b)^2                (1)

with `target` from `diffusion.schedule.target` and an optional weight such as `diffusion.schedule.snr_weight`.
"""

import jax
import jax.numpy as jnp


def denoising_loss(prediction: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean squared error per example, in float32; equation (1).

    Args:
        prediction, target: `[batch, ...]`.
        weight: `[batch]`; None for 1.

    Returns:
        `[batch]`.
    """
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    loss = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return loss if weight is None else weight * loss
