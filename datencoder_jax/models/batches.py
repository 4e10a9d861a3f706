"""Rows of a batch taken a few at a time, so that memory does not grow with their number."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from datencoder_jax.runtime.target import batch_mesh

_PIXELS = 512 * 512
"""Pixels that go through a network at a time; at full size the VAE's inner states have 128 channels."""


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of that size are encoded or decoded together: many small ones, or a single one of 512 px."""
    return max(1, _PIXELS // (height * width))


def map_in_batches(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """Calls a function of a batch on at most `size` rows of every device at a time, and joins its results.

    `jax.lax.map` with a `batch_size` vectorizes a function of a single row (`vmap`), for which fused attention has no
    rule where its lengths are odd. It would also take the rows of one device after those of another, where a mesh
    shares them (`runtime.target.sharing_batch`); here every device is at its own rows all the time.

    Args:
        function: `[batch, ...]` -> a pytree of arrays `[batch, ...]`.
        rows: an array `[n, ...]`, or a pytree of such.
        size: rows at a time.
    """
    count, mesh = len(jax.tree.leaves(rows)[0]), batch_mesh()
    devices = mesh.size if mesh is not None and count % mesh.size == 0 else 1
    held = count // devices
    size = min(size, held)
    if size == held:
        return function(rows)
    split = partial(_split_rows, devices=devices, size=size)
    whole = jax.tree.map(lambda x: split(x)[0], rows)
    results = jax.tree.map(partial(_join_rows, devices=devices), jax.lax.map(function, whole))
    if held % size:
        rest = function(jax.tree.map(lambda x: split(x)[1], rows))
        results = jax.tree.map(partial(_append_rows, devices=devices), results, rest)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), results)


def _split_rows(x: jax.Array, devices: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Whole batches `[k, devices * size, ...]`, and what is left `[rest, ...]`, of every device's rows."""
    rows = x.reshape(devices, -1, *x.shape[1:])
    whole = rows.shape[1] // size * size
    batches = jnp.moveaxis(rows[:, :whole].reshape(devices, -1, size, *x.shape[1:]), 1, 0)
    return batches.reshape(-1, devices * size, *x.shape[1:]), rows[:, whole:].reshape(-1, *x.shape[1:])


def _join_rows(x: jax.Array, devices: int) -> jax.Array:
    """`[k, devices * size, ...]` -> `[devices, k * size, ...]`."""
    batches = x.reshape(len(x), devices, -1, *x.shape[2:])
    return jnp.moveaxis(batches, 0, 1).reshape(devices, -1, *x.shape[2:])


def _append_rows(x: jax.Array, rest: jax.Array, devices: int) -> jax.Array:
    return jnp.concatenate([x, rest.reshape(devices, -1, *rest.shape[1:])], axis=1)
