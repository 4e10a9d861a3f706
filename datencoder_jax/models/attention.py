"""Attention with edited projections and two paths, and the transformer blocks of the UNet.

One attention layer with weights `W`, low-rank offsets `dW = A B` (or other edits, see `models.edits`) and blend `alpha`
computes, for an input `h` (already normed) and contexts `c` (soft) and `c'` (hard); in self-attention both contexts are
`h`:

    soft = softmax(q k^T / sqrt(d)) v,    q = h (W_q + dW_q),  k = c (W_k + dW_k),  v = c (W_v + dW_v)      (1)
    hard = softmax(q' k'^T / sqrt(d)) v', q' = h W_q,          k' = c' W_k,         v' = c' W_v             (2)
    out  = alpha soft (W_o + dW_o) + (1 - alpha) hard W_o + b                                               (3)
         = (alpha soft + (1 - alpha) hard) W_o + (alpha soft A_o) B_o + b                                   (4)

Dual-path adaptation is section 4 of the paper (arXiv 2307.06925). The base projections of a shared input are computed
once, and (4) needs one output projection for both paths, so only the softmax (and the second context's keys and
values) is paid twice.

A pair of streams is one batch of two halves. In cross-attention both have the attention maps of the first,

    soft_2 = softmax(q_1 k_1^T / sqrt(d)) v_2                                                       (5)

and are otherwise apart (Infusion, arXiv 2404.14007). Keys may be of another context than values, position by position.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.dot_product_attention import attend, attention_scores
from datencoder_jax.models.edits import Ready, apply, stack_offsets
from datencoder_jax.models.layers import GroupNorm, LayerNorm, activation, conv1x1, linear, recompute_in_gradient

Maps = dict[str, jax.Array | None]
"""What collects the attention maps `[batch, queries, keys]` of the soft path in the layers that it names: a layer puts
its own there."""


def _blend(alpha, soft: jax.Array, hard: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`alpha soft` and `(1 - alpha) hard`, for a scalar `alpha` or one per sample `[batch]`."""
    alpha = jnp.asarray(alpha, soft.dtype)
    alpha = alpha.reshape(alpha.shape + (1,) * (soft.ndim - 1)) if alpha.ndim else alpha
    return alpha * soft, (1 - alpha) * hard


def _rows(x: jax.Array, batch: int) -> jax.Array:
    """Of keys or values of one row, or one for each of two streams, those of every sample."""
    return x if len(x) == batch else jnp.repeat(x, batch // len(x), axis=0)


class Attention(nnx.Module):
    """Multi-head attention of one transformer block; equations (1) to (4).

    Args:
        width: channels of the input and output.
        context_width: channels of the context; None for self-attention.
        heads, head_dim: the inner width is their product.
        path: this module's path in the UNet, the prefix of its keys in `Offsets`.
    """

    def __init__(self, width: int, context_width: int | None, heads: int, head_dim: int, *, path: str, dtype, rngs):
        inner = heads * head_dim
        source = width if context_width is None else context_width
        self.to_q = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = linear(source, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = linear(source, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([linear(inner, width, dtype=dtype, rngs=rngs)])
        self.heads, self.path = heads, path

    def __call__(
        self,
        h: jax.Array,
        context: jax.Array | None = None,
        *,
        offsets: Mapping[str, Ready] | None = None,
        hard_context: jax.Array | None = None,
        key_context: jax.Array | None = None,
        dual: bool = False,
        pair: bool = False,
        blend: jax.Array | float = 1.0,
        maps: Maps | None = None,
    ) -> jax.Array:
        """`h [batch, n, width]` and contexts `[batch, l, context_width]` (None: self-attention) -> the shape of `h`.

        Contexts may be of one row, which is every sample's: its keys and values are computed once.
        """
        source = h if context is None else context
        keyed = source if key_context is None else key_context
        q, k, v = self.to_q(h), self.to_k(keyed), self.to_v(source)
        queries, keys = self._offset("to_q", h, q, offsets), self._offset("to_k", keyed, k, offsets)
        if pair and context is not None:
            keys = _rows(keys, len(queries))
            queries, keys = (jnp.concatenate([x[: len(x) // 2]] * 2) for x in (queries, keys))  # (5)
        if maps is not None and self.path in maps:
            maps[self.path] = self._map(queries, keys)
        soft = self._attend(queries, keys, self._offset("to_v", source, v, offsets))
        mixed = soft
        if dual:
            if hard_context is not None:
                k, v = self.to_k(hard_context), self.to_v(hard_context)
            soft, hard = _blend(blend, soft, self._attend(q, k, v))
            mixed = soft + hard
        return self._offset("to_out.0", soft, self.to_out[0](mixed), offsets)

    def _offset(self, name: str, x: jax.Array, y: jax.Array, offsets: Mapping[str, Ready] | None) -> jax.Array:
        """`y`, with this projection's edit where there is one."""
        edit = (offsets or {}).get(f"{self.path}.{name}")
        return y if edit is None else apply(edit, x, y)

    def _map(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """The softmax of (1), the mean over heads: `[batch, queries, keys]` float32."""
        q, k = (x.reshape(*x.shape[:2], self.heads, -1) for x in (q, _rows(k, len(q))))
        return jax.nn.softmax(attention_scores(q, k), axis=-1).mean(axis=1)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (q, _rows(k, len(q)), _rows(v, len(q))))
        out = attend(q, k, v)
        return out.reshape(*out.shape[:2], -1)


class _GEGLU(nnx.Module):
    """`x -> a gelu(g)` with `[a, g] = x W + b` (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, *, dtype, rngs: nnx.Rngs):
        self.proj, self.dtype = linear(width, 2 * inner, dtype=dtype, rngs=rngs), dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        def gated(projected: jax.Array) -> jax.Array:
            value, gate = jnp.split(projected, 2, axis=-1)
            return value * activation("gelu")(gate)

        return recompute_in_gradient(gated, self.dtype)(self.proj(x))


class _Gap(nnx.Module):
    """Keeps an index of a Hugging Face list that holds no parameters (dropout at inference)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class _FeedForward(nnx.Module):
    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        inner = 4 * width
        self.net = nnx.List(
            [_GEGLU(width, inner, dtype=dtype, rngs=rngs), _Gap(), linear(inner, width, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and a gated feed-forward layer, each normed before and added after."""

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int, *, path: str, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.path = path
        self.norm1 = LayerNorm(width, epsilon=1e-5, **common)
        self.attn1 = Attention(width, None, heads, head_dim, path=f"{path}.attn1", **common)
        self.norm2 = LayerNorm(width, epsilon=1e-5, **common)
        self.attn2 = Attention(width, context_width, heads, head_dim, path=f"{path}.attn2", **common)
        self.norm3 = LayerNorm(width, epsilon=1e-5, **common)
        self.ff = _FeedForward(width, **common)

    def __call__(self, h: jax.Array, context: jax.Array, **paths) -> jax.Array:
        """`h [batch, n, width]`; `paths` holds `offsets`, `hard_context`, `key_context`, `pair` and `blend`."""
        others = {name: paths.pop(name, None) for name in ("hard_context", "key_context")}
        dual = others["hard_context"] is not None
        h = h + self.attn1(self.norm1(h), dual=dual, **paths)
        h = h + self.attn2(self.norm2(h), context, dual=dual, **others, **paths)
        return h + self.ff(self.norm3(h))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around them.

    Args:
        linear_projection: project in and out by linear layers (Stable Diffusion 2.x) instead of 1x1 convolutions (1.x).
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        depth: int,
        groups: int,
        linear_projection: bool,
        path: str,
        dtype,
        rngs,
    ):
        common = {"dtype": dtype, "rngs": rngs}
        project = linear if linear_projection else conv1x1
        self.norm = GroupNorm(width, groups=groups, epsilon=1e-6, **common)
        self.proj_in = project(width, width, **common)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(
                width, context_width, heads, width // heads, path=f"{path}.transformer_blocks.{i}", **common
            )
            for i in range(depth)
        )
        self.proj_out = project(width, width, **common)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        *,
        offsets: Mapping[str, Ready] | None = None,
        remat: bool = False,
        scan_layers: bool = False,
        maps: Maps | None = None,
        **paths,
    ) -> jax.Array:
        """`x [batch, h, w, width]` -> the same shape; `remat`, `scan_layers` and `maps` as for the UNet."""
        h = self.proj_in(self.norm(x))
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        blocks, maps = list(self.transformer_blocks), {} if maps is None else maps
        records = any(block.attn2.path in maps for block in blocks)
        alike = scan_layers and len(blocks) > 1 and not records
        stacked = stack_offsets(offsets, [block.path for block in blocks]) if alike else None
        if stacked is not None:
            h = _scan_blocks(blocks, h, context, stacked, remat=remat, **paths)
        else:
            for block in blocks:
                names = tuple(maps.keys() & {block.attn2.path})
                apply = functools.partial(_with_maps, block, names, offsets=offsets, **paths)
                h, own = (jax.checkpoint(apply) if remat else apply)(h, context)
                maps.update(own)
        return self.proj_out(h.reshape(x.shape)) + x


def _scan_blocks(
    blocks: Sequence[BasicTransformerBlock],
    h: jax.Array,
    context: jax.Array,
    offsets: dict[str, Ready],
    *,
    remat: bool,
    **paths,
) -> jax.Array:
    """What the blocks give one after the other, as a loop over their stacked weights: the compiler sees one block.

    Args:
        offsets: stacked like the weights, as `stack_offsets` gives them.
    """
    graphdef = nnx.split(blocks[0])[0]
    weights = jax.tree.map(lambda *each: jnp.stack(each), *(nnx.state(block) for block in blocks))

    def step(h: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        weights, offsets = layer
        return nnx.merge(graphdef, weights)(h, context, offsets=offsets, **paths), None

    # In a loop no barrier against common subexpressions is needed: the recomputation is in a loop of its own.
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(step, h, (weights, offsets))[0]


def _with_maps(
    block: BasicTransformerBlock, names: Sequence[str], h: jax.Array, context: jax.Array, **paths
) -> tuple[jax.Array, Maps]:
    """What a block gives and the maps it collects: only what a function returns may leave a checkpoint."""
    own: Maps = dict.fromkeys(names)
    return block(h, context, maps=own, **paths), own
