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
function for a batch that is sharded over devices: blocks of `u_j` travel around a ring and (4) is a running

    Q_i <- log(exp Q_i + sum_{j in block} exp(S_ij))                                            (6)

so that a device holds one `[batch / devices, batch / devices]` block at a time, in the backward pass too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Stands for -infinity: the exponential of anything minus it is 0, while differences of two of them are not NaN.
_NEVER = -1e30

# Similarities decide which word is nearest; the faster float32 products of accelerators keep only 8 to 11 bits.
_einsum = functools.partial(jnp.einsum, precision="highest")


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
    block = (unit, concept_ids, mask)
    q = _negatives(block, block, temperature)
    return _loss(unit, mask, q, table, allowed, temperature, neighbours)


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
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    # Without rematerialization the scan would keep every block of similarities for the backward pass.
    negatives = jax.checkpoint(functools.partial(_negatives, temperature=temperature))

    def local(embeddings, concept_ids, mask, table, allowed):
        unit = _unit_rows(embeddings, mask)
        own = (unit, concept_ids, mask)

        def hop(carry, _):
            visiting, q = carry
            visiting = jax.lax.ppermute(visiting, axis, to_next)
            return (visiting, jnp.logaddexp(q, negatives(own, visiting))), None  # (6)

        (_, q), _ = jax.lax.scan(hop, (own, negatives(own, own)), length=devices - 1)
        return _loss(unit, mask, q, table, allowed, temperature, neighbours)

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
    embeddings, table = jax.lax.stop_gradient((embeddings, table))
    cosines = _einsum("bd,vd->bv", _unit(embeddings), _unit(table))
    cosines, ids = jax.lax.top_k(jnp.where(allowed[None], cosines, -jnp.inf), k)
    return ids, cosines


def _negatives(own: tuple, others: tuple, temperature: float) -> jax.Array:
    """The part of `Q_i` `[rows]` that these others contribute; (3) and (4). Both are `(unit, concept_ids, mask)`."""
    (unit, concepts, _), (other_unit, other_concepts, other_mask) = own, others
    similarities = _einsum("id,jd->ij", unit, other_unit) / temperature
    negative = (concepts[:, None] != other_concepts[None, :]) & other_mask[None, :]
    return jax.nn.logsumexp(jnp.where(negative, similarities, _NEVER), axis=1)


def _loss(unit, mask, q, table, allowed, temperature: float, neighbours: int) -> jax.Array:
    """`L_i` `[rows]` from `Q_i`; (1), (2) and (5)."""
    ids, _ = nearest_words(unit, table, allowed, neighbours)
    words = jax.lax.stop_gradient(_unit(table[ids]))
    p = jax.nn.logsumexp(_einsum("id,ind->in", unit, words) / temperature, axis=1)
    return jnp.where(mask, jax.nn.softplus(q - p), 0.0)


def _unit_rows(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """`u` `[rows, d]`; padding becomes zeros, so that not even its NaN can reach a gradient."""
    return _unit(jnp.where(mask[:, None], embeddings, 0))


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors `[..., d]` divided by their norms, in float32; a zero vector stays zero, with a finite gradient."""
    vectors = vectors.astype(jnp.float32)
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
