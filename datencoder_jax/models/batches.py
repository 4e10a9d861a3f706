"""Rows of a batch taken a few at a time, so that memory does not grow with their number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_PIXELS = 512 * 512
"""Pixels that go through a network at a time; at full size the VAE's inner states have 128 channels."""


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of that size are encoded or decoded together: many small ones, or a single one of 512 px."""
    return max(1, _PIXELS // (height * width))


def map_in_batches(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """Calls a function of a batch on at most `size` rows at a time, and joins its results.

    `jax.lax.map` with a `batch_size` vectorizes a function of a single row (`vmap`), for which fused attention has no
    rule where its lengths are odd.

    Args:
        function: `[batch, ...]` -> a pytree of arrays `[batch, ...]`.
        rows: an array `[n, ...]`, or a pytree of such.
        size: rows at a time.
    """
    count = len(jax.tree.leaves(rows)[0])
    size = min(size, count)
    whole = count // size * size
    batches = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), rows)
    results = jax.lax.map(function, batches)
    results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
    if whole < count:
        rest = function(jax.tree.map(lambda x: x[whole:], rows))
        results = jax.tree.map(lambda *both: jnp.concatenate(both), results, rest)
    return results
