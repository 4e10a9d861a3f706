"""The vision transformer of DINO (Caron et al. 2021, arXiv 2104.14294): what it sees in a picture as one vector.

A picture is cut into patches, and a class token is put before them. Each layer maps the states `h` to

    h_0 = [class; patches] + P                                                                  (1)
    h <- h + W_o attention(W_q n, W_k n, W_v n),    n = layernorm_before(h)                     (2)
    h <- h + output(act(intermediate(layernorm_after(h))))                                      (3)
    last_hidden = layernorm(h),    class_token = last_hidden_0                                  (4)

Positions `P` are a grid for pictures of `image_size`. For others it is resampled by cubic convolution with the kernel
(a = -3/4; `s` is the distance of a new position's centre from an old one's, and the grid's edge goes on beyond it)

    k(s) = (a + 2) |s|^3 - (a + 3) |s|^2 + 1,    |s| <= 1                                       (5)
    k(s) = a |s|^3 - 5 a |s|^2 + 8 a |s| - 4 a,  1 < |s| < 2                                    (6)

as PyTorch's "bicubic" does and transformers with `interpolate_pos_encoding`. The original code stretches the grid by
(n + 0.1) / m instead of n / m, against rounding, which puts the new positions slightly elsewhere. Module names are
those of the files of transformers' `ViTModel` (facebook/dino-vits16); its pooler is no part of DINO.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from datencoder_jax.models.config import ConfigMixin
from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.models.layers import LayerNorm, activation, conv, linear

_SHARPNESS = -0.75
"""`a` of equations (5) and (6)."""


@dataclass(frozen=True)
class DINOConfig(ConfigMixin):
    """The options of `config.json` that change the computation; names are transformers', defaults those of ViT-S/16."""

    _required: ClassVar[dict[str, tuple]] = {"num_channels": (3,)}

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    @property
    def grid(self) -> int:
        """Patches along each side of a picture of `image_size`."""
        return self.image_size // self.patch_size


class DINOOutput(NamedTuple):
    """What the network returns.

    Attributes:
        last_hidden: `[batch, 1 + patches, width]` after the last norm; the class token comes first.
        class_token: `[batch, width]`, the first of them: DINO's embedding of the picture.
    """

    last_hidden: jax.Array
    class_token: jax.Array


class _PatchEmbeddings(nnx.Module):
    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.projection = conv(
            3, config.hidden_size, patch, strides=config.patch_size, padding="VALID", dtype=dtype, rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.projection(images)


class _Embeddings(nnx.Module):
    """Equation (1)."""

    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        width, draw = config.hidden_size, nnx.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(draw(rngs.params(), (1, 1, width), jnp.float32))
        self.patch_embeddings = _PatchEmbeddings(config, dtype=dtype, rngs=rngs)
        self.position_embeddings = nnx.Param(draw(rngs.params(), (1, 1 + config.grid**2, width), jnp.float32))
        self.config, self.dtype = config, dtype

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch_embeddings(images.astype(self.dtype))
        batch, height, wide, width = patches.shape
        if not height * wide:
            raise ValueError(f"pictures of {images.shape[1]}x{images.shape[2]} have no patch of this network")
        first = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (batch, 1, width))
        h = jnp.concatenate([first, patches.reshape(batch, -1, width)], axis=1)
        return h + self._positions(height, wide).astype(self.dtype)

    def _positions(self, height: int, wide: int) -> jax.Array:
        """`P` for a grid of `height` by `wide` patches, `[1, 1 + height * wide, width]`."""
        table, side = self.position_embeddings[...], self.config.grid
        if (height, wide) == (side, side):
            return table
        grid = table[0, 1:].reshape(side, side, -1)
        grid = jnp.einsum("ah,bw,hwd->abd", cubic_weights(side, height), cubic_weights(side, wide), grid)
        return jnp.concatenate([table[:, :1], grid.reshape(1, height * wide, -1)], axis=1)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """The matrix that resamples `old` values along an axis to `new`, float32 `[new, old]`; equations (5) and (6)."""
    a, weights = _SHARPNESS, np.zeros((new, old))
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    for tap in range(-1, 3):
        index = np.floor(centre).astype(int) + tap
        s = np.abs(centre - index)
        near = (a + 2) * s**3 - (a + 3) * s**2 + 1
        far = a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a
        np.add.at(weights, (np.arange(new), index.clip(0, old - 1)), np.where(s <= 1, near, far))
    return weights.astype(np.float32)


class _SelfAttention(nnx.Module):
    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        width, common = config.hidden_size, {"use_bias": config.qkv_bias, "dtype": dtype, "rngs": rngs}
        if width % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads do not divide a width of {width}")
        self.query = linear(width, width, **common)
        self.key = linear(width, width, **common)
        self.value = linear(width, width, **common)
        self.heads = config.num_attention_heads

    def __call__(self, h: jax.Array) -> jax.Array:
        q, k, v = (project(h).reshape(*h.shape[:2], self.heads, -1) for project in (self.query, self.key, self.value))
        return attend(q, k, v).reshape(h.shape)


class _Dense(nnx.Module):
    """A linear layer by the name that the files give it."""

    def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
        self.dense = linear(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.dense(h)


class _Attention(nnx.Module):
    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        self.attention = _SelfAttention(config, dtype=dtype, rngs=rngs)
        self.output = _Dense(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.output(self.attention(h))


class _Layer(nnx.Module):
    """Equations (2) and (3)."""

    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        width, inner = config.hidden_size, config.intermediate_size
        self.layernorm_before = LayerNorm(width, epsilon=config.layer_norm_eps, **common)
        self.attention = _Attention(config, **common)
        self.layernorm_after = LayerNorm(width, epsilon=config.layer_norm_eps, **common)
        self.intermediate = _Dense(width, inner, **common)
        self.output = _Dense(inner, width, **common)
        self.act = activation(config.hidden_act)

    def __call__(self, h: jax.Array) -> jax.Array:
        h = h + self.attention(self.layernorm_before(h))
        return h + self.output(self.act(self.intermediate(self.layernorm_after(h))))


class _Encoder(nnx.Module):
    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        self.layer = nnx.List(_Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, h: jax.Array) -> jax.Array:
        for layer in self.layer:
            h = layer(h)
        return h


class DINOModel(nnx.Module):
    """The network; see the module docstring."""

    def __init__(self, config: DINOConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.embeddings = _Embeddings(config, **common)
        self.encoder = _Encoder(config, **common)
        self.layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **common)

    def __call__(self, images: jax.Array) -> DINOOutput:
        """Pictures `[batch, h, w, 3]`, normalized with ImageNet's mean and deviation -> their states.

        Any height and width of at least one patch; what is left over at the right and below is not seen.
        """
        last_hidden = self.layernorm(self.encoder(self.embeddings(images)))
        return DINOOutput(last_hidden, last_hidden[:, 0])
