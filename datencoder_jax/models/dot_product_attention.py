"""Scaled dot-product attention, `softmax(q k^T / sqrt(d)) v`, by the implementation that suits shapes and target.

Every attention layer of every model calls `attend`; nothing else does. Its implementations compute the same function:

    xla      two matrix products with the softmax in float32 between them; any shape, type and device
    blocks   xla over blocks of queries, whose scores the backward pass recomputes: `O(block * keys)` memory
    heads    the same for one head of one row of the batch after the other: a block's scores stay in a CPU's caches
    cudnn    cuDNN's fused attention on NVIDIA GPUs, forward and backward; no scores in memory (arXiv 2205.14135)
    flash    JAX's Pallas kernels for TPUs, forward and backward; likewise
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from datencoder_jax.runtime.target import Target, batch_mesh, current_target

IMPLEMENTATIONS = ("xla", "blocks", "heads", "cudnn", "flash")

_BLOCK_QUERIES = 1024
"""Queries per step of "blocks" and "heads"; peak memory is `_BLOCK_QUERIES * keys`, of "blocks" `batch * heads` times
that."""
_BLOCKS_FROM = 4096 * 4096
"""Queries times keys from which on scores are not kept in memory at once."""
_HEADS_FROM = 1024 * 1024
"""Queries times keys from which on a CPU computes head by head in half the time, and a third from 4,096 on; with 77
keys, or 256 queries, all heads at once are as fast or faster."""
_FLASH_FROM = 1024
"""Queries and keys from which on the TPU kernels move less memory than XLA does (docs/performance.md)."""
_FLASH_BLOCKS = (512, 256, 128)
"""Rows per block of the TPU kernels; the first that divides the sequence length."""
_LANES = 128
"""The TPU kernels' sequence lengths and head dimensions are multiples of this."""
_CUDNN_MAX_HEAD_DIM = 128
"""From Hopper on cuDNN takes 256, but JAX traces that only where it finds a Hopper, so that no such program could be
compiled for an absent one. Of 1.5, whose deepest levels have 160, these are layers of at most 256 queries."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, implementation: str = "auto"
) -> jax.Array:
    """Attention of `q` to `k` and `v`, with the softmax in float32.

    By default the implementation is chosen for the target that the program is lowered for, the first row that fits:

    | target                        | type      | head dim           | queries and keys              | implementation |
    |-------------------------------|-----------|--------------------|-------------------------------|----------------|
    | NVIDIA GPU from Ampere on     | 16 bits   | <= 128, 8 divides  | any                           | cudnn          |
    | TPU                           | bfloat16  | any                | both >= 1024                  | flash          |
    | CPU                           | float32   | any                | queries * keys >= 1024 * 1024 | heads          |
    | any                           | any       | any                | queries * keys >= 4096 * 4096 | blocks         |
    | any                           | any       | any                | any                           | xla            |

    Causal attention (CLIP's text towers, 77 tokens) is always "xla". In `sharing_batch(mesh)` "heads", "cudnn"
    and "flash" run on each device's rows, and are chosen if the mesh divides the batch.

    Args:
        q: `[batch, queries, heads, head_dim]`.
        k, v: `[batch, keys, heads, head_dim]`.
        causal: a query sees only keys at or before its own position.
        implementation: one of `IMPLEMENTATIONS`, or "auto".

    Returns:
        `[batch, queries, heads, head_dim]` in `q`'s type.

    Raises:
        ValueError: there is no such implementation, or it has no causal mask.
    """
    if implementation == "auto":
        implementation = choose_implementation(q, k, causal, current_target())
    if implementation == "xla":
        return _attend_xla(q, k, v, causal)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is not known; choose one of: {', '.join(IMPLEMENTATIONS)}")
    if causal:
        raise ValueError(f"attention {implementation!r} has no causal mask")
    if implementation == "blocks":
        return _attend_blocks(q, k, v)
    kernels = {"heads": _attend_heads, "cudnn": _attend_cudnn, "flash": _attend_flash}
    return _per_device(kernels[implementation])(q, k, v)


def choose_implementation(q: jax.Array, k: jax.Array, causal: bool, target: Target) -> str:
    """The implementation of the table in `attend`, from shapes and types alone."""
    (batch, queries, _, head_dim), keys, mesh = q.shape, k.shape[1], batch_mesh()
    if causal:
        return "xla"
    if mesh is None or batch % mesh.size == 0:
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if target.is_ampere_or_newer and half and head_dim <= _CUDNN_MAX_HEAD_DIM and head_dim % 8 == 0:
            return "cudnn"
        if target.platform == "tpu" and q.dtype == jnp.bfloat16 and min(queries, keys) >= _FLASH_FROM:
            return "flash"
        if target.platform == "cpu" and q.dtype == jnp.float32 and queries * keys >= _HEADS_FROM:
            return "heads"
    return "blocks" if queries * keys >= _BLOCKS_FROM else "xla"


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`q k^T / sqrt(d)` in float32: `[batch, queries, heads, head_dim]` and keys -> `[batch, heads, queries, keys]`.

    In half precision the gradient of the scores is rounded to the type of `q` and `k`, as the kernels do: products of
    float32 and bfloat16, which JAX makes of it, are computed in float32.
    """
    multiply = _multiply if q.dtype == jnp.float32 else _multiply_in_half_precision
    return multiply(q, k) * (q.shape[-1] ** -0.5)


def _multiply(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)


_multiply_in_half_precision = jax.custom_vjp(_multiply)


def _multiply_backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = factors
    gradient = gradient.astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", gradient, k), jnp.einsum("bhqk,bqhd->bkhd", gradient, q)


_multiply_in_half_precision.defvjp(lambda q, k: (_multiply(q, k), (q, k)), _multiply_backward)


def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    scores = attention_scores(q, k)
    if causal:
        visible = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    batch, queries, heads, head_dim = q.shape
    size = min(_BLOCK_QUERIES, queries)
    padded = _pad(q, (1, -queries % size))
    blocks = jnp.moveaxis(padded.reshape(batch, -1, size, heads, head_dim), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: _attend_xla(block, k, v)), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :queries]


def _attend_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    batch, queries, heads, head_dim = q.shape
    size = min(_BLOCK_QUERIES, queries)
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, -1, head_dim) for x in (_pad(q, (1, -queries % size)), k, v))

    @jax.checkpoint
    def attend_block(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * (head_dim**-0.5)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    def attend_head(rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = rows
        return jax.lax.map(lambda block: attend_block(block, k, v), q.reshape(-1, size, head_dim)).reshape(q.shape)

    out = jax.lax.map(attend_head, (q, k, v))
    return out.reshape(batch, heads, -1, head_dim).swapaxes(1, 2)[:, :queries]


def _attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's gradient takes even sequence lengths alone, so 77 keys are 78 of which the last is masked."""
    queries, keys = q.shape[1], k.shape[1]
    lengths = None, None
    if queries % 2 or keys % 2:
        lengths = jnp.full(len(q), queries, jnp.int32), jnp.full(len(q), keys, jnp.int32)
        q, k, v = _pad(q, (1, queries % 2)), _pad(k, (1, keys % 2)), _pad(v, (1, keys % 2))
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1], implementation="cudnn"
    )
    return out[:, :queries]


def _attend_flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The kernels take `[batch, heads, length, head_dim]` in whole blocks; padding is a segment of its own."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    (batch, queries, _, head_dim), keys = q.shape, k.shape[1]

    def prepare(x: jax.Array) -> jax.Array:
        return _pad(x, (1, -x.shape[1] % _LANES), (3, -head_dim % _LANES)).swapaxes(1, 2)

    padded_q, padded_k, padded_v = prepare(q), prepare(k), prepare(v)
    padded_queries, padded_keys = padded_q.shape[2], padded_k.shape[2]
    segments = None
    if (padded_queries, padded_keys) != (queries, keys):
        segments = tpu.SegmentIds(
            *(
                jnp.broadcast_to((jnp.arange(padded) >= length).astype(jnp.int32), (batch, padded))
                for padded, length in ((padded_queries, queries), (padded_keys, keys))
            )
        )
    out = tpu.flash_attention(
        padded_q,
        padded_k,
        padded_v,
        segment_ids=segments,
        sm_scale=head_dim**-0.5,
        block_sizes=_flash_blocks(tpu.BlockSizes, padded_queries, padded_keys),
    )
    return out.swapaxes(1, 2)[:, :queries, :, :head_dim]


def _flash_blocks(block_sizes: type, queries: int, keys: int):
    """Sizes of the kernels' blocks, forward and backward, for lengths that are multiples of `_LANES`."""
    block_q, block_k = (next(size for size in _FLASH_BLOCKS if length % size == 0) for length in (queries, keys))
    of_queries = dict.fromkeys(("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq"), block_q)
    of_keys = dict.fromkeys(
        ("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv", "block_k_major_dq", "block_k_dq"), block_k
    )
    return block_sizes(block_b=1, **of_queries, **of_keys)


def _per_device(kernel):
    """The kernel, on each device's rows where a mesh shares the batch: XLA cannot partition what is in a kernel."""

    @functools.wraps(kernel)
    def run(*arrays: jax.Array) -> jax.Array:
        mesh = batch_mesh()
        if mesh is None:
            return kernel(*arrays)
        rows = PartitionSpec(mesh.axis_names)
        # Every operand is split the same way and nothing is reduced, so there is no replication to be checked.
        specs = (rows,) * len(arrays)
        return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*arrays)

    return run


def _pad(x: jax.Array, *after: tuple[int, int]) -> jax.Array:
    """`x` with zeros appended: pairs of an axis and how many."""
    if not any(count for _, count in after):
        return x
    widths = dict(after)
    return jnp.pad(x, [(0, widths.get(axis, 0)) for axis in range(x.ndim)])
