"""Nearest-neighbour contrastive loss on predicted word embeddings (DATEncoder, arXiv 2307.06925, section 3).

It pulls every predicted embedding `v_i` towards real words, so that prompts around it stay editable, and away from the
embeddings of other concepts, so that all concepts do not become one word. With `u = v / |v|`, `w_n` the unit row `n` of
the token table, concept `c_i` and validity `m_i` of row `i`:

    N_i     = the k allowed words n of largest <u_i, w_n>, without gradient                     (1)
    P_i     = log sum_{n in N_i} exp(<u_i, w_n> / tau)                                          (2)
    S_ij    = <u_i, u_j> / tau                      where c_j != c_i and m_j, else -infinity    (3)
    Q_i     = log sum_j exp(S_ij)                                                               (4)
    L_i     = -log(exp P_i / (exp P_i + exp Q_i)) = log(1 + exp(Q_i - P_i))    if m_i, else 0   (5)

The paper states the loss in words; cosine similarity, `tau`, `k` and the treatment of repeated concepts are choices
made here. (3) takes the concept, not the row: two views of one concept are never each other's negatives. A batch with
one concept has no negatives and its loss is 0.

`j` runs over the global batch. `contrastive_dense` forms (3) at once, `[batch, batch]`. `contrastive_ring` is the same
function for a batch that is sharded over devices: the devices' rows travel around a ring and (4) is a running

    Q_i <- log(exp Q_i + sum_{j visiting} exp(S_ij))                                            (6)

For the gradient they travel around once more, now with their `Q_j` and the derivatives `g_j = dL / dQ_j`. Since `S` is
symmetric, each device gathers all that concerns its own rows, and nothing has to be kept of the first round:

    dL / du_i = sum_j (m_j g_i exp(S_ij - Q_i) + m_i g_j exp(S_ij - Q_j)) u_j / tau     over c_j != c_i     (7)

(1), (4) and (7) take some rows at a time, so a device holds its own rows, those of one visitor, and a few rows of `S`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from datencoder_jax.runtime.precision import exact_products

# Stands for -infinity: the exponential of anything minus it is 0, while differences of two of them are not NaN.
_NEVER = -1e30

# Of the ring: so many of a device's rows are compared with all words, or with all rows of a visitor, at a time.
_ROWS = 256


def contrastive_dense(
    embeddings: jax.Array,
    concept_ids: jax.Array,
    mask: jax.Array,
    table: jax.Array,
    allowed: jax.Array,
    *,
    temperature: float,
    neighbours: int,
) -> jax.Array:
    """The loss of each row, on one device or left to the compiler to partition; equations (1) to (5).

    Args:
        embeddings: `v` `[batch, d]`.
        concept_ids: `c` integer `[batch]`; rows with equal ids show the same concept.
        mask: `m` bool `[batch]`; rows that are False are padding: no loss, nobody's negative, content irrelevant.
        table: the text tower's token embeddings `[vocabulary, d]`; receives no gradient.
        allowed: bool `[vocabulary]`, the words that may be neighbours; at least `neighbours` of them.
        temperature: `tau`.
        neighbours: `k`.

    Returns:
        `[batch]` float32.
    """
    unit = _unit_rows(embeddings, mask)
    rows = (unit, concept_ids, mask)
    q = _negatives(rows, rows, temperature)
    ids, _ = nearest_words(unit, table, allowed, neighbours)
    return _loss(unit, mask, q, table[ids], temperature)


def contrastive_ring(
    embeddings: jax.Array,
    concept_ids: jax.Array,
    mask: jax.Array,
    table: jax.Array,
    allowed: jax.Array,
    *,
    temperature: float,
    neighbours: int,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
) -> jax.Array:
    """`contrastive_dense` with rows sharded over `axis` of `mesh`; differentiate it from outside. Equation (6).

    The batch must be a multiple of the number of devices along `axis` (pad with rows whose mask is False); the table is
    replicated. Other arguments and the result are those of `contrastive_dense`.
    """
    rows, replicated = PartitionSpec(axis), PartitionSpec()
    names = (axis,) if isinstance(axis, str) else axis
    devices = functools.reduce(int.__mul__, (mesh.shape[name] for name in names))
    negatives = _ring_negatives(temperature, axis, devices)

    def local(embeddings, concept_ids, mask, table, allowed):
        unit, inverse = _unit_rows(embeddings, mask), _inverse_norms(table)
        ids = _by_rows(lambda u: _nearest(u, table, inverse, allowed, neighbours)[0], unit)
        return _loss(unit, mask, negatives(unit, concept_ids, mask), table[ids], temperature)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, rows, replicated, replicated), out_specs=rows, check_vma=True
    )
    return jax.jit(sharded)(embeddings, concept_ids, mask, table, allowed)


def nearest_words(embeddings: jax.Array, table: jax.Array, allowed: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The `k` allowed words nearest to each embedding by cosine, nearest first, without gradient; equation (1).

    Args:
        embeddings: `[batch, d]`.
        table: `[vocabulary, d]`.
        allowed: bool `[vocabulary]`; at least `k` words.

    Returns:
        Token ids, int32 `[batch, k]`, and cosines, float32 `[batch, k]`.
    """
    return _nearest(_unit(embeddings), table, _inverse_norms(table), allowed, k)


def _nearest(unit, table, inverse, allowed, k: int) -> tuple[jax.Array, jax.Array]:
    """(1) for unit vectors: ids and cosines `[rows, k]`.

    The words' lengths are divided out of the cosines, not of the table, so that there is no second copy of it.
    """
    unit, table, inverse = jax.lax.stop_gradient((unit, table, inverse))
    cosines = _einsum("bd,vd->bv", unit, table.astype(jnp.float32)) * inverse[None, :, 0]
    cosines, ids = jax.lax.top_k(jnp.where(allowed[None], cosines, -jnp.inf), k)
    return ids, cosines


def _negatives(own: tuple, others: tuple, temperature: float) -> jax.Array:
    """The part of `Q_i` `[rows]` that these others contribute; (4). Both are `(unit, concept_ids, mask)`."""
    similarities, negative = _similarities(own, others, temperature)
    return jax.nn.logsumexp(jnp.where(negative & others[2][None, :], similarities, _NEVER), axis=1)


def _similarities(own: tuple, others: tuple, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(3): `S` `[rows, others]`, and where concepts differ."""
    (unit, concepts, *_), (other_unit, other_concepts, *_) = own, others
    return _einsum("id,jd->ij", unit, other_unit) / temperature, concepts[:, None] != other_concepts[None, :]


def _ring_negatives(temperature: float, axis: str | tuple[str, ...], devices: int):
    """A function of a device's `unit`, `concept_ids` and `mask` that gives its `Q`, with (7) as its derivative."""
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def around(own: tuple, merge, start):
        """Merges into `start` what each device's rows in turn, the own ones first, mean for the own rows."""

        def hop(carry, _):
            visiting, merged = carry
            visiting = jax.lax.ppermute(visiting, axis, to_next)
            return (visiting, merge(merged, visiting)), None

        (_, merged), _ = jax.lax.scan(hop, (own, merge(start, own)), length=devices - 1)
        return merged

    @jax.custom_vjp
    def negatives(unit, concept_ids, mask):
        own = (unit, concept_ids, mask)

        def merge(q, visiting):
            return jnp.logaddexp(q, _by_rows(lambda *rows: _negatives(rows, visiting, temperature), *own))  # (6)

        return around(own, merge, jnp.full_like(unit[:, 0], _NEVER))

    def forward(unit, concept_ids, mask):
        q = negatives(unit, concept_ids, mask)
        return q, (unit, concept_ids, mask, q)

    def backward(kept, g):
        own = (*kept, g)

        def merge(gradient, visiting):
            return gradient + _by_rows(lambda *rows: _pull(rows, visiting, temperature), *own)  # (7)

        return around(own, merge, jnp.zeros_like(kept[0])), None, None

    negatives.defvjp(forward, backward)
    return negatives


def _pull(own: tuple, others: tuple, temperature: float) -> jax.Array:
    """The part of (7) `[rows, d]` that these others contribute. Both are `(unit, concept_ids, mask, Q, g)`."""
    similarities, negative = _similarities(own, others, temperature)
    (_, _, mask, q, g), (other_unit, _, other_mask, other_q, other_g) = own, others

    def share(where, q):
        return jnp.exp(jnp.where(where, similarities - q, -jnp.inf))

    weights = g[:, None] * share(negative & other_mask[None, :], q[:, None])
    weights += other_g[None, :] * share(negative & mask[:, None], other_q[None, :])
    return _einsum("ij,jd->id", weights, other_unit) / temperature


def _einsum(subscripts: str, *factors: jax.Array) -> jax.Array:
    """Exact: similarities decide which word is nearest."""
    with exact_products():
        return jnp.einsum(subscripts, *factors)


def _by_rows(function, *arrays: jax.Array):
    """`function(*arrays)`, of which each row depends on the same row of the arrays, some rows at a time."""

    def row(values):
        return jax.tree.map(lambda x: x[0], function(*(value[None] for value in values)))

    return jax.lax.map(row, arrays, batch_size=_ROWS)


def _loss(unit, mask, q, words, temperature: float) -> jax.Array:
    """`L_i` `[rows]` from `Q_i` and the table's rows of the nearest words `[rows, k, d]`; (2) and (5)."""
    words = jax.lax.stop_gradient(_unit(words))
    p = jax.nn.logsumexp(_einsum("id,ind->in", unit, words) / temperature, axis=1)
    return jnp.where(mask, jax.nn.softplus(q - p), 0.0)


def _unit_rows(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """`u` `[rows, d]`; padding becomes zeros, so that not even its NaN can reach a gradient."""
    return _unit(jnp.where(mask[:, None], embeddings, 0))


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors `[..., d]` divided by their norms, in float32; a zero vector stays zero, with a finite gradient."""
    return vectors.astype(jnp.float32) * _inverse_norms(vectors)


def _inverse_norms(vectors: jax.Array) -> jax.Array:
    """`1 / |v|` `[..., 1]`, in float32; 1 for a zero vector."""
    squares = jnp.sum(jnp.square(vectors.astype(jnp.float32)), axis=-1, keepdims=True)
    return jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
