"""The gradient of a loss that couples the samples of a batch, computed for a part of the batch at a time.

For samples `i = 1 .. B` with inputs `f_i` that are not trained, predictions `x_i = E(f_i; theta)` and a vector `v_i` in
each of them,

    L(theta) = 1/B sum_i d(x_i, f_i)  +  1/B sum_i c_i(v_1, ..., v_B)                              (1)

`d` is what takes the memory and sees one sample alone; `c` sees them all, but of each no more than its `v`. So a first
pass computes `f_i` and `v_i` without gradient, part by part, and from all of them at once

    g_i = d/dv_i  1/B sum_j c_j                                                                    (2)

which is held fixed in a second pass, that adds up part by part

    grad L = sum_parts  d/dtheta  sum_{i in part} [ d(x_i, f_i) / B + <g_i, v_i> ]                 (3)

(2) and (3) are the gradient of (1) exactly, by the chain rule (Gao et al. 2021, arXiv 2101.06983).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from datencoder_jax.typing import Params


@dataclass(frozen=True)
class CoupledLoss:
    """The functions of equation (1); samples, inputs and predictions are pytrees with an axis for the samples first.

    Attributes:
        prepare: `samples -> f`.
        predict: `(params, f) -> x`.
        vectors: `x -> v [b, d]`.
        each: `(x, f) -> (d [b], {name: [b]})`, with values to log.
        coupled: `(v [B, d], samples) -> (c [B], {name: scalar})`, of the whole batch.
    """

    prepare: Callable[[Any], Any]
    predict: Callable[[Params, Any], Any]
    vectors: Callable[[Any], jax.Array]
    each: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
    coupled: Callable[[jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]


def value_and_grad(
    loss: CoupledLoss, params: Params, samples: Any, parts: int = 1
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
    """`(L, values to log), gradient` of equation (1).

    Args:
        params: `theta`.
        samples: the whole batch.
        parts: how many parts the batch is taken in; its size must be a multiple of it.
    """
    if parts == 1:
        inputs = loss.prepare(samples)

        def total(params: Params):
            x = loss.predict(params, inputs)
            each, values = loss.each(x, inputs)
            coupled, more = loss.coupled(loss.vectors(x), samples)
            return each.mean() + coupled.mean(), _means(values) | more

        return jax.value_and_grad(total, has_aux=True)(params)

    def first(part: Any) -> tuple[Any, jax.Array]:
        inputs = loss.prepare(part)
        return inputs, loss.vectors(loss.predict(params, inputs))

    inputs, vectors = jax.lax.map(first, _split(samples, parts))

    def mean_coupled(vectors: jax.Array):
        coupled, values = loss.coupled(vectors, samples)
        return coupled.mean(), values

    (coupled, values), pull = jax.value_and_grad(mean_coupled, has_aux=True)(_joined(vectors))  # (2)

    def second(grads: Params, part: tuple[Any, jax.Array]) -> tuple[Params, Any]:
        inputs, pull = part

        def total(params: Params):  # (3)
            x = loss.predict(params, inputs)
            each, values = loss.each(x, inputs)
            share = each.mean() / parts
            return share + (pull * loss.vectors(x)).sum(), (share, _means(values))

        more, said = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, more), said

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (shares, said) = jax.lax.scan(second, zeros, (inputs, _split(pull, parts)))
    return (shares.sum() + coupled, _means(said) | values), grads


def _split(tree: Any, parts: int) -> Any:
    """`[B, ...] -> [parts, B / parts, ...]`, every `parts`-th row to a part: each device keeps its own rows."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def _joined(tree: Any) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _means(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value.mean() for name, value in values.items()}
