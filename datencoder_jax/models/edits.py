"""Edits of linear projections `y = x W`: what personalization does to attention's q, k, v and out.

    low rank   y + (x A) B                                                                          (1)
    dense      y + x D                                                                              (2)
    removed    x (W - W Q Q'),  Q R = B:  low rank with A = -W Q and B = Q'                         (3)
               of several concepts one after the other, W_k = W_k-1 - W_k-1 Q_k Q_k':
               A = [-W_0 Q_1, -W_1 Q_2, ...] and B = [Q_1'; Q_2'; ...]
    gated      y - s (i W) + g o,  s = x u,  g = sigmoid((x d / e - beta) / tau)                    (4)
    residual   y + r_j  where position p of the context holds the concept's vector j                (5)

(1) is LoRA (arXiv 2106.09685), (3) PaRa, (4) Perfusion (arXiv 2305.01644), (5) Infusion (arXiv 2404.14007). In (4)
`i [k, d]` are the directions of k concepts, `d = i C^-1` their duals and `e_k = i_k . d_k`. `u = (i d')^+ d` takes from
`x` what lies along any of them: for one concept `d / e`, for several the projection onto all in the metric `C^-1`, as
with an orthonormal basis of them. The pseudo-inverse holds two concepts of one direction for one direction (ours).

Nothing is differentiated with respect to a gate: its directions follow the concept, they are not tuned.

Removal one after the other is PaRa's own way of joining concepts. One decomposition of all directions side by side
would remove more than they span where spans nearly coincide: `Q` has all its columns, those past the span arbitrary.
A LoRA of another program comes after what is removed, so where the weights hold its change `D` already, `W_0 = W - D`.

A concept keeps edits as they are trained. `ready` brings them into the forms that `apply` takes, once for many calls.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from datencoder_jax.errors import UserError
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.typing import (
    AnyArray,
    Dense,
    Edit,
    Gate,
    Gated,
    LowRank,
    Removed,
    Residual,
    SequentialRemoval,
)

_Key = TypeVar("_Key")

_ONE_DIRECTION = 1e-4
"""Two directions are one where the squared tangent of half their angle is below this."""
_BATCHED = 3
"""Axes of a low-rank factor with one per sample."""


class ReadyGated(NamedTuple):
    """Equation (4).

    Attributes:
        along: `u`, `[k, in]`.
        seen: `d_k / e_k`, `[k, in]`.
        removed: `i W`, `[k, out]`.
        output: `o`, `[k, out]`.
        bias, temperature: `beta` and `tau`, `[k]`.
    """

    along: jax.Array
    seen: jax.Array
    removed: jax.Array
    output: AnyArray
    bias: AnyArray
    temperature: AnyArray


class ReadyResidual(NamedTuple):
    """Equation (5): `added [batch, l, out]`, zero where there is no concept."""

    added: jax.Array


Ready = LowRank | Dense | ReadyGated | ReadyResidual


def ready(
    edits: Mapping[str, Edit],
    weights: Mapping[str, jax.Array],
    *,
    gate: Gate | None = None,
    slots: jax.Array | None = None,
) -> dict[str, Ready]:
    """The edits as `apply` takes them; differentiable in all of them, but not in the gate.

    Args:
        edits: by module path.
        weights: of the network, `<path>.weight` `[in, out]`.
        gate: what gated edits share.
        slots: int `[batch, l]`, which of the concept's vectors each position of the context holds, -1 for none.
    """

    with exact_products():
        bases = _removal_bases(edits)
        along = None if gate is None else _along(gate)

    def one(path: str, edit: Edit) -> Ready:
        if isinstance(edit, Removed | SequentialRemoval):
            weight = weights[f"{path}.weight"].astype(jnp.float32)
            kept = jax.lax.stop_gradient(edit.kept) if isinstance(edit, SequentialRemoval) else None
            downs = _removal_factors(weight, bases[path], kept)
            return LowRank(jnp.concatenate(downs, axis=1), jnp.concatenate([basis.T for basis in bases[path]]))
        if isinstance(edit, Gated):
            assert gate is not None and along is not None, "gated edits need their gate"
            return _gated(edit, gate, along, weights[f"{path}.weight"])
        if isinstance(edit, Residual):
            assert slots is not None, "residuals need to know where the concept stands"
            return ReadyResidual(jnp.where(slots[..., None] >= 0, edit.residual[slots], 0.0))
        return edit

    with exact_products():
        return {path: one(path, edit) for path, edit in edits.items()}


def _removal_bases(edits: Mapping[str, Edit]) -> dict[str, list[jax.Array]]:
    """The orthonormal bases of what each projection loses, in the order in which it loses them."""
    directions = {}
    for path, edit in edits.items():
        if isinstance(edit, Removed):
            directions[path] = (edit.directions,)
        elif isinstance(edit, SequentialRemoval):
            directions[path] = edit.directions
    flat = orthonormal_bases({(path, k): matrix for path, each in directions.items() for k, matrix in enumerate(each)})
    return {path: [flat[path, k] for k in range(len(each))] for path, each in directions.items()}


def _removal_factors(weight: Any, bases: Sequence[Any], kept: LowRank | None) -> list[Any]:
    """The factors `A_k = -W_k-1 Q_k` of equation (3), `[in, rank]` each, of arrays of NumPy or of JAX.

    Args:
        weight: `[in, out]`, with the change `kept` in it.
        bases: `Q_k`, `[out, rank]` each.
    """
    downs = []
    for basis in bases:
        down = -(weight @ basis)
        if kept is not None:
            down = down + kept.down @ (kept.up @ basis)
        for earlier, removed in zip(downs, bases, strict=False):
            down = down - earlier @ (removed.T @ basis)
        downs.append(down)
    return downs


def orthonormal_bases(directions: Mapping[_Key, AnyArray]) -> dict[_Key, jax.Array]:
    """`Q` of the decomposition of every matrix `[out, r]`, those of one shape decomposed together.

    A decomposition is a loop or a library call of its own on every device, and a UNet has 128 matrices of three shapes.
    """
    by_shape: dict[tuple, list[_Key]] = {}
    for path, matrix in directions.items():
        by_shape.setdefault(matrix.shape, []).append(path)
    bases = {}
    for paths in by_shape.values():
        stacked = jnp.linalg.qr(jnp.stack([jnp.asarray(directions[path]) for path in paths]))[0]
        bases |= dict(zip(paths, stacked, strict=True))
    return bases


def _along(gate: Gate) -> jax.Array:
    """`u` of equation (4), `[k, in]`, which all gated edits share."""
    gate = jax.lax.stop_gradient(gate)
    gram = gate.direction @ gate.dual.T
    # Scaled to a diagonal of ones, so that what counts as one direction does not depend on the concepts' lengths.
    length = jnp.sqrt(jnp.diagonal(gram)[:, None])
    inverse = jnp.linalg.pinv(gram / (length * length.T), rtol=_ONE_DIRECTION, hermitian=True) / (length * length.T)
    return inverse @ gate.dual


def _gated(edit: Gated, gate: Gate, along: jax.Array, weight: jax.Array) -> ReadyGated:
    gate = jax.lax.stop_gradient(gate)
    energy = jnp.einsum("kd,kd->k", gate.direction, gate.dual)[:, None]
    return ReadyGated(
        along=along,
        seen=jnp.asarray(gate.dual) / energy,
        removed=jnp.asarray(gate.direction) @ weight.astype(jnp.float32),
        output=edit.output,
        bias=gate.bias,
        temperature=gate.temperature,
    )


def paired(edits: Mapping[str, Ready] | None) -> dict[str, Ready] | None:
    """The edits for two streams in one batch, the second of which alone has the residuals; None where none is there."""
    if not any(isinstance(edit, ReadyResidual) for edit in (edits or {}).values()):
        return None

    def one(edit: Ready) -> Ready:
        if isinstance(edit, ReadyResidual):
            return ReadyResidual(jnp.concatenate([jnp.zeros_like(edit.added), edit.added]))
        # Those of one sample each go with both of its streams; others have no batch axis.
        return jax.tree.map(lambda x: jnp.concatenate([x, x]) if jnp.ndim(x) == _BATCHED else x, edit)

    return {path: one(edit) for path, edit in (edits or {}).items()}


def stack_offsets(offsets: Mapping[str, Ready] | None, modules: Sequence[str]) -> dict[str, Ready] | None:
    """The offsets of several modules of one kind, each array with a first axis for the module, by the first's paths.

    Args:
        modules: the modules' paths.

    Returns:
        An empty dictionary where no module has offsets, and None where they do not have them alike.
    """
    own = [_rename_module(offsets or {}, module, modules[0]) for module in modules]
    shapes = [jax.tree.map(jnp.shape, each) for each in own]
    if any(each != shapes[0] for each in shapes):
        return None
    return jax.tree.map(lambda *each: jnp.stack(each), *own)


def _rename_module(offsets: Mapping[str, Ready], module: str, name: str) -> dict[str, Ready]:
    """The offsets of one module alone, as those of a module of that name."""
    prefix = f"{module}."
    return {f"{name}.{path.removeprefix(prefix)}": edit for path, edit in offsets.items() if path.startswith(prefix)}


def follows_class(edits: Mapping[str, Edit], gate: Gate | None) -> bool:
    """Whether a gated concept has its keys from the prompt with the class word: it edits none itself."""
    return gate is not None and not any(path.endswith(".to_k") for path in edits)


def apply(edit: Ready, x: jax.Array, y: jax.Array) -> jax.Array:
    """`y = x W` with the edit, in `y`'s type; x `[batch, l, in]`, y `[batch, l, out]`."""
    if isinstance(edit, LowRank):
        return y + low_rank(x, edit)
    if isinstance(edit, Dense):
        return y + x @ edit.weight.astype(x.dtype)
    if isinstance(edit, ReadyGated):
        states = x.astype(jnp.float32)
        with exact_products():
            along, seen = states @ edit.along.T, states @ edit.seen.T
            open_ = jax.nn.sigmoid((seen - edit.bias[None, None]) / edit.temperature[None, None])
            return y + (open_ @ edit.output - along @ edit.removed).astype(y.dtype)
    return y + edit.added.astype(y.dtype)


def low_rank(x: jax.Array, offset: LowRank) -> jax.Array:
    """`(x A) B` in `x`'s type; per sample when the factors have a batch axis, shared when not."""
    down, up = jnp.asarray(offset.down).astype(x.dtype), jnp.asarray(offset.up).astype(x.dtype)
    return (x @ down) @ up


def as_low_rank(edits: Mapping[str, Edit], weights: Mapping[str, AnyArray]) -> dict[str, LowRank]:
    """The edits as low-rank offsets, which other programs load, on the host; exact.

    Dense ones have the rank of their matrix.

    Args:
        weights: of the network, as for `ready`; only those that something is removed from are read.

    Raises:
        UserError: a gated edit or a residual, which are no change of the weights.
    """
    found = {}
    for path, edit in tqdm(edits.items(), desc="low-rank factors", unit="layer", delay=2.0):
        if isinstance(edit, Gated | Residual):
            raise UserError(
                "this concept does not change weights but what they give where the concept stands, "
                "which no LoRA file can hold"
            )
        if isinstance(edit, Dense):
            left, values, right = np.linalg.svd(np.asarray(edit.weight, np.float64), full_matrices=False)
            rank = max(1, int((values > values[0] * 1e-7).sum()))
            edit = LowRank((left * values)[:, :rank].astype(np.float32), right[:rank].astype(np.float32))
        if isinstance(edit, Removed | SequentialRemoval):
            edit = _removal_on_host(edit, weights[f"{path}.weight"])
        found[path] = edit
    return found


def _removal_on_host(edit: Removed | SequentialRemoval, weight: AnyArray) -> LowRank:
    """Equation (3), computed in float64."""
    directions, kept = (edit.directions,), None
    if isinstance(edit, SequentialRemoval):
        directions, kept = edit.directions, edit.kept
    bases = [np.linalg.qr(np.asarray(each, np.float64))[0] for each in directions]
    if kept is not None:
        kept = LowRank(np.asarray(kept.down, np.float64), np.asarray(kept.up, np.float64))
    downs = _removal_factors(np.asarray(weight, np.float64), bases, kept)
    down, up = np.concatenate(downs, axis=1), np.concatenate([basis.T for basis in bases])
    return LowRank(down.astype(np.float32), np.ascontiguousarray(up, np.float32))
