"""Contrastive language-image pretraining of the embedded world's text and vision towers.

For unit embeddings `u_i` of pictures and `w_i` of their captions, a learned scale `s = exp(a)` and logits
`l_ij = s <u_i, w_j>` (Radford et al. 2021),

    L = - 1/2 mean_i log softmax_j(l_ij)[i]  -  1/2 mean_i log softmax_i(l_ij)[i]                (1)

Pictures whose captions are equal are not told apart by (1): such pairs are masked out of each other's softmax.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from datencoder_jax.data.images import to_float, write_grid
from datencoder_jax.models.clip_text import TOKEN_TABLE, CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.runtime.target import determinism_options
from datencoder_jax.training.source import Source

_TEXT, _VISION, _SCALE = "text_encoder/", "image_encoder/", "logit_scale"


def contrastive_loss(
    pictures: jax.Array, captions: jax.Array, scale: jax.Array, same: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Equation (1) per pair and whether each picture found its caption.

    Args:
        pictures, captions: unit vectors `[batch, d]`.
        scale: the scalar `s`.
        same: `[batch, batch]`, true where two captions are equal.
    """
    with exact_products():
        logits = scale * pictures @ captions.T
    eye = jnp.eye(len(logits), dtype=bool)
    logits = jnp.where(same & ~eye, -1e9, logits)
    labels = jnp.arange(len(logits))
    loss = optax.softmax_cross_entropy_with_integer_labels
    return 0.5 * (loss(logits, labels) + loss(logits.T, labels)), logits.argmax(axis=1) == labels


def split_params(params: dict) -> tuple[dict, dict, jax.Array]:
    """The jointly trained dictionary -> parameters of the text tower, of the vision tower, and the logit scale."""

    def under(prefix):
        return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}

    return under(_TEXT), under(_VISION), params[_SCALE]


def forget_unseen(text_params: dict, ids: np.ndarray) -> dict:
    """Sets token embeddings that no caption (token ids `[n, L]`) used to zero.

    They are as random as at the start: a prompt's meaning should not depend on them, and no concept be near them.
    """
    table = np.array(text_params[TOKEN_TABLE])
    table[np.setdiff1d(np.arange(len(table)), ids)] = 0.0
    return text_params | {TOKEN_TABLE: table}


class CLIPTask:
    """Trains both towers together; see `training.task.Task`. `source.labels["ids"]` holds the captions' token ids."""

    frozen = None

    def __init__(
        self,
        text: CLIPTextConfig,
        vision: CLIPVisionConfig,
        source: Source,
        held_out: Source,
        *,
        batch_size: int,
        mean,
        std,
    ):
        self.text, self.vision, self.source, self.held_out = text, vision, source, held_out
        self.batch_size = batch_size
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        # Here, since a method that is jitted anew is compiled anew.
        self._embedder = jax.jit(self._embed, compiler_options=determinism_options())

    def init(self, key: jax.Array):
        text_key, vision_key = jax.random.split(key)
        towers = ((_TEXT, CLIPTextModel, self.text, text_key), (_VISION, CLIPVisionModel, self.vision, vision_key))
        params = {prefix + n: v for prefix, kind, config, k in towers for n, v in init_params(kind, config, k).items()}
        return params | {_SCALE: jnp.float32(np.log(1 / 0.07))}

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        chosen = self.source.draw(step, self.batch_size)[rows]
        return {"images": self.source.images[chosen], "ids": self.source.labels["ids"][chosen]}

    def _embed(self, params, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        text, vision, _ = split_params(params)
        pixels = (0.5 * to_float(images) + 0.5 - self.mean.reshape(1, 1, 1, 3)) / self.std.reshape(1, 1, 1, 3)
        pictures = Model(CLIPVisionModel, self.vision, vision)(pixels).projected
        captions = Model(CLIPTextModel, self.text, text)(ids).projected
        return _unit(pictures), _unit(captions)

    def loss(self, params, frozen, batch, key, step):
        pictures, captions = self._embed(params, batch["images"], batch["ids"])
        same = (batch["ids"][:, None, :] == batch["ids"][None, :, :]).all(axis=-1)
        scale = jnp.exp(jnp.minimum(params[_SCALE], np.log(100.0)))
        loss, found = contrastive_loss(pictures, captions, scale, same)
        return loss.mean(), {"top1": found.mean(), "scale": scale}

    def preview(self, params, path: Path) -> dict[str, float]:
        images, ids = self.held_out.images[:200], self.held_out.labels["ids"][:200]
        pictures, captions = self._embedder(params, images, ids)
        same = (ids[:, None, :] == ids[None, :, :]).all(axis=-1)
        _, found = contrastive_loss(pictures, captions, jnp.float32(1.0), jnp.asarray(same))
        with exact_products():
            best = np.asarray((captions @ pictures.T).argmax(axis=1))
        write_grid(path, images[best[:32]], columns=8, scale=3)
        return {"top1_of_200": float(found.mean())}


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
