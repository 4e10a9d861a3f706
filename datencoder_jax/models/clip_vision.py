"""CLIP's vision tower: a picture as a sequence of patches behind a class token.

    h = pre_layrnorm([class; patches] + P),    last_hidden = encoder(h),    pooled = post_layernorm(last_hidden_0)   (1)

Module names are those of transformers' `CLIPVisionModel` and `CLIPVisionModelWithProjection` files (`pre_layrnorm` is
spelled so there).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.clip import CLIPEncoder, embedding
from datencoder_jax.models.config import ConfigMixin
from datencoder_jax.models.layers import LayerNorm, conv, linear


@dataclass(frozen=True)
class CLIPVisionConfig(ConfigMixin):
    """The options of a vision tower's `config.json` that change the computation; names and defaults are transformers'.

    `with_projection` is ours: whether the file holds `visual_projection`. `from_dict` reads it from `architectures`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    with_projection: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As `ConfigMixin.from_dict`; the projection is present if `architectures` names a class that has it."""
        projects = "CLIPVisionModelWithProjection" in (values.get("architectures") or ())
        return super().from_dict({"with_projection": projects, **values})

    @property
    def patches(self) -> int:
        """Patches per picture."""
        return (self.image_size // self.patch_size) ** 2


class VisionOutput(NamedTuple):
    """What the vision tower returns.

    Attributes:
        last_hidden: `[batch, 1 + patches, width]`, the last layer's output; the class token comes first.
        pooled: `[batch, width]`, the normed state of the class token.
        projected: `[batch, projection_dim]`, `pooled` in the space shared with text; None without the projection.
        hidden: the embeddings (after `pre_layrnorm`) and every layer's output, each shaped as `last_hidden`.
    """

    last_hidden: jax.Array
    pooled: jax.Array
    projected: jax.Array | None
    hidden: tuple[jax.Array, ...]


class _VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), jnp.float32))
        self.patch_embedding = conv(
            config.num_channels, width, (patch, patch), strides=patch, padding="VALID", use_bias=False, **common
        )
        self.position_embedding = embedding(1 + config.patches, width, **common)
        self.config, self.dtype = config, dtype

    def __call__(self, images: jax.Array) -> jax.Array:
        side = self.config.image_size
        if images.shape[1:3] != (side, side):
            raise ValueError(
                f"pictures are {images.shape[1]}x{images.shape[2]} and the vision tower takes {side}x{side}"
            )
        patches = self.patch_embedding(images.astype(self.dtype)).reshape(images.shape[0], -1, self.config.hidden_size)
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (images.shape[0], 1, patches.shape[-1]))
        return (
            jnp.concatenate([first, patches], axis=1) + self.position_embedding(jnp.arange(1 + patches.shape[1]))[None]
        )


class _VisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.embeddings = _VisionEmbeddings(config, **common)
        self.pre_layrnorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **common)
        self.encoder = CLIPEncoder(config, causal=False, **common)
        self.post_layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **common)

    def __call__(self, images: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return hidden, self.post_layernorm(hidden[-1][:, 0])


class CLIPVisionModel(nnx.Module):
    """The vision tower; see the module docstring."""

    def __init__(self, config: CLIPVisionConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.vision_model = _VisionTransformer(config, **common)
        self.visual_projection = (
            linear(config.hidden_size, config.projection_dim, use_bias=False, **common)
            if config.with_projection
            else None
        )

    def __call__(self, images: jax.Array) -> VisionOutput:
        """Pictures `[batch, image_size, image_size, 3]`, normalized with CLIP's mean and deviation -> their states."""
        hidden, pooled = self.vision_model(images)
        projected = None if self.visual_projection is None else self.visual_projection(pooled)
        return VisionOutput(hidden[-1], pooled, projected, hidden)
