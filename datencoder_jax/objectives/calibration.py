"""Calibration of attention (DisenDiff, Zhang et al. 2024, arXiv 2403.18551): concepts of one picture keep apart.

Of a prompt with a modifier `m_i` and a class word `c_i` for each of `k` concepts, let `A_p [h, w]` be the mean of the
cross-attention maps of position `p` over heads and layers. With each map brought to [0, 1] and smoothed,

    S(A) = gaussian * (A - min A) / (max A - min A + 1e-8)         3 x 3, sigma 0.5, edges mirrored  (1)
    M_i = S(A_{m_i}),    C_i = S(A_{c_i})^2                         the square suppresses what is weak  (2)
    IoU(P, Q) = (sum P Q + 1) / (sum P + sum Q - sum P Q + 1)                                        (3)
    L = sum_i (1 - IoU(stop C_i, M_i)) + mean_{i < j} IoU(C_i, C_j)                                  (4)

The first term of (4) binds modifiers to their class words, which have no gradient from it, the second separates the
class words. Smoothing, constants and stopped gradients are those of the authors' code, which weighs `L` by 0.01 and
takes the maps of 16 x 16 pixels.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.runtime.precision import exact_products

_SIGMA = 0.5


def calibration_loss(maps: jax.Array, slots: jax.Array, concepts: int) -> jax.Array:
    """Equation (4) for every sample, `[batch]` float32.

    Args:
        maps: `A`, `[batch, h, w, l]`.
        slots: int `[batch, l]`: `2 i` where the prompt holds `m_i`, `2 i + 1` where it holds `c_i`.
        concepts: `k`.
    """
    here = (slots[:, :, None] == jnp.arange(2 * concepts)[None, None]).astype(jnp.float32)
    here = here / jnp.maximum(here.sum(axis=1, keepdims=True), 1.0)
    with exact_products():
        positions = jnp.einsum("bhwl,bln->bnhw", maps.astype(jnp.float32), here)
    smooth = _smoothed(positions)  # (1)
    modifiers, classes = smooth[:, ::2], smooth[:, 1::2] ** 2  # (2)
    bound = (1.0 - _overlap(jax.lax.stop_gradient(classes), modifiers)).sum(axis=1)
    pairs = np.array(list(itertools.combinations(range(concepts), 2)), int).reshape(-1, 2)
    if not len(pairs):
        return bound
    return bound + _overlap(classes[:, pairs[:, 0]], classes[:, pairs[:, 1]]).mean(axis=1)


def _smoothed(maps: jax.Array) -> jax.Array:
    """Equation (1) for `[batch, n, h, w]`."""
    low, high = (f(maps, axis=(2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    padded = jnp.pad((maps - low) / (high - low + 1e-8), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    side = np.exp(-0.5 / _SIGMA**2)
    outer, inner = np.float32(side / (1 + 2 * side)), np.float32(1 / (1 + 2 * side))
    rows = outer * (padded[:, :, :-2] + padded[:, :, 2:]) + inner * padded[:, :, 1:-1]
    return outer * (rows[..., :-2] + rows[..., 2:]) + inner * rows[..., 1:-1]


def _overlap(one: jax.Array, other: jax.Array) -> jax.Array:
    """Equation (3) for `[batch, n, h, w]`: `[batch, n]`."""
    both, either = (one * other).sum(axis=(2, 3)), (one + other).sum(axis=(2, 3))
    return (both + 1.0) / (either - both + 1.0)
