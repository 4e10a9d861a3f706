"""CLIP's text tower, with concept vectors spliced in at the embedding look-up.

For a vocabulary of `V` tokens with table `E` and concept vectors `c`, the input at position `l` with id `i` is

    h_l = E[i] + P[l]            i < V                                      (1)
    h_l = c[i - V] + P[l]        i >= V                                     (2)

so a concept needs no change to the table or to the tokenizer, and gradients reach `c` directly. Module names are those
of transformers' `CLIPTextModel` and `CLIPTextModelWithProjection` files.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.clip import CLIPEncoder, embedding
from datencoder_jax.models.config import ConfigMixin
from datencoder_jax.models.layers import LayerNorm, linear

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
"""The parameter `E`, `[vocabulary, d]`."""

_LEGACY_EOS = 2
"""The `eos_token_id` that old files carry by mistake; with it the state at the highest id is pooled."""


@dataclass(frozen=True)
class CLIPTextConfig(ConfigMixin):
    """The options of `text_encoder/config.json` that change the computation; names and defaults are transformers'.

    `with_projection` is ours: whether the file holds `text_projection`. `from_dict` reads it from `architectures`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As `ConfigMixin.from_dict`; the projection is present if `architectures` names a class that has it."""
        projects = "CLIPTextModelWithProjection" in (values.get("architectures") or ())
        return super().from_dict({"with_projection": projects, **values})


class TextOutput(NamedTuple):
    """What the text tower returns.

    Attributes:
        last_hidden: `[batch, l, width]`, after the final layer norm: what the UNet attends to.
        penultimate: `[batch, l, width]`, before the last layer, without norm: what the UNet of XL attends to.
        pooled: `[batch, width]`, the state at the first end-of-text token.
        projected: `[batch, projection_dim]`, `pooled` in the space shared with pictures; None without the projection.
    """

    last_hidden: jax.Array
    penultimate: jax.Array
    pooled: jax.Array
    projected: jax.Array | None = None


class _TextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.token_embedding = embedding(config.vocab_size, config.hidden_size, **common)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size, **common)
        self.config = config

    def __call__(self, ids: jax.Array, concept: jax.Array | None) -> jax.Array:
        vocab, length = self.config.vocab_size, ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens do not fit in {self.config.max_position_embeddings} positions")
        # Clipped, since out-of-range ids would read NaN.
        h = self.token_embedding(jnp.clip(ids, 0, vocab - 1))
        if concept is not None:
            h = jnp.where((ids >= vocab)[..., None], _rows(concept.astype(h.dtype), ids - vocab), h)
        return h + self.position_embedding(jnp.arange(length))[None]


def _rows(concept: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index [batch, l]` (clipped) of `concept [n, d]` or `[batch, n, d]` -> `[batch, l, d]`."""
    index = jnp.clip(index, 0, concept.shape[-2] - 1)
    if concept.ndim == 2:
        return concept[index]
    return jnp.take_along_axis(concept, index[..., None], axis=1)


class _TextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.embeddings = _TextEmbeddings(config, **common)
        self.encoder = CLIPEncoder(config, causal=True, **common)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **common)

    def __call__(self, ids: jax.Array, concept: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        *_, penultimate, last = self.encoder(self.embeddings(ids, concept))
        return self.final_layer_norm(last), penultimate


class CLIPTextModel(nnx.Module):
    """The text tower; see the module docstring."""

    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.text_model = _TextTransformer(config, **common)
        self.text_projection = (
            linear(config.hidden_size, config.projection_dim, use_bias=False, **common)
            if config.with_projection
            else None
        )
        self.config = config

    def __call__(self, ids: jax.Array, concept: jax.Array | None = None) -> TextOutput:
        """States of tokenized prompts.

        Args:
            ids: integers `[batch, l]`; those at or past the vocabulary size select rows of `concept`.
            concept: `[n, width]`, or `[batch, n, width]` with one set per sample.

        Returns:
            The states, in the computation type. An id past the last row of `concept` reads the last row; without
            `concept` an id past the vocabulary reads the last token.
        """
        last_hidden, penultimate = self.text_model(ids, concept)
        pooled = jnp.take_along_axis(last_hidden, self._end(ids)[:, None, None], axis=1)[:, 0]
        projected = None if self.text_projection is None else self.text_projection(pooled)
        return TextOutput(last_hidden, penultimate, pooled, projected)

    def _end(self, ids: jax.Array) -> jax.Array:
        """Position `[batch]` of the first end-of-text token; concepts' ids never count as one."""
        if self.config.eos_token_id == _LEGACY_EOS:
            return jnp.argmax(jnp.where(ids < self.config.vocab_size, ids, -1), axis=-1)
        return jnp.argmax(ids == self.config.eos_token_id, axis=-1)
