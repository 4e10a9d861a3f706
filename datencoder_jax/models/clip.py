"""The pre-norm transformer that CLIP's text and vision towers share (Radford et al. 2021).

One layer maps the states `h` to

    h <- h + W_o attention(W_q n, W_k n, W_v n),    n = layer_norm1(h)      (1)
    h <- h + fc2(act(fc1(layer_norm2(h))))                                  (2)

Module names are those of transformers' `CLIPEncoder`.
"""

from typing import Protocol

import jax
from flax import nnx

from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.models.layers import LayerNorm, activation, linear


class TowerConfig(Protocol):
    """What the shared layers read of a tower's configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


def embedding(rows: int, width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `rows` vectors, drawn as CLIP draws them."""
    return nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs)


class _Attention(nnx.Module):
    def __init__(self, config: TowerConfig, *, causal: bool, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.heads, self.causal = config.num_attention_heads, causal

    def __call__(self, h: jax.Array) -> jax.Array:
        q, k, v = (
            project(h).reshape(*h.shape[:2], self.heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v, causal=self.causal).reshape(h.shape))


class _MLP(nnx.Module):
    def __init__(self, config: TowerConfig, *, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.act = activation(config.hidden_act)

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.fc2(self.act(self.fc1(h)))


class _Layer(nnx.Module):
    """Equations (1) and (2)."""

    def __init__(self, config: TowerConfig, *, causal: bool, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.layer_norm1 = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **common)
        self.self_attn = _Attention(config, causal=causal, **common)
        self.layer_norm2 = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **common)
        self.mlp = _MLP(config, **common)

    def __call__(self, h: jax.Array) -> jax.Array:
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class CLIPEncoder(nnx.Module):
    """A tower's layers in order.

    Args:
        causal: a position sees only itself and those before it (text).
    """

    def __init__(self, config: TowerConfig, *, causal: bool, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            _Layer(config, causal=causal, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )

    def __call__(self, h: jax.Array) -> tuple[jax.Array, ...]:
        """`h [batch, n, width]` -> the input and every layer's output, each of that shape."""
        states = [h]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)
