"""Pretraining the tuning-encoder on a frozen base model.

For a picture `I` of a concept, its latent `z`, and a picture `I'` with latent `z'` that prompt `p'` describes with the
placeholder in the concept's place,

    x      = E(I, sqrt(a_t) z + sqrt(1 - a_t) e, t)                       prediction, one per sample
    L_den  = w(t') mean |unet(z'_t', t'; dual path of x under p') - target|^2
    L      = L_den + lambda_c L_c + lambda_n L_n                          per example, mean last         (1)

with the capped weight `w` of `diffusion.schedule.snr_weight`, the nearest-neighbour contrastive loss `L_c` over the
global batch and the norm penalty `L_n` (arXiv 2307.06925, section 3; the weights are ours). With photographs `I' = I`.
The embedded world can draw a concept again, so a share `pairs` of its samples has `I'` in another scene, style or pose
(ours): what the encoder keeps is then what the concept keeps. Also ours:

- `t` and `e` are one for the whole batch, and `t` is one of those the method predicts at. Drawn per sample, as `t'` and
  its noise are, they are what `L_c` tells the samples apart by, and `v*` comes to name the noise, not the concept.
- The hard path reads the nearest word `n`, and its gradient goes straight through to `v*` (`v* + sg(n - v*)`), so that
  `v*` moves to words under which the base model already draws the concept.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.data.images import to_float, write_grid
from datencoder_jax.diffusion.samplers import ddim
from datencoder_jax.diffusion.schedule import add_noise, alphas_cumprod, snr_weight, stratified_timesteps, target
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.methods.datencoder import levels, predict_each
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.objectives.contrastive import contrastive_dense, contrastive_ring, nearest_words
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.objectives.norm import norm_penalty
from datencoder_jax.pipeline import Base
from datencoder_jax.sampling import Request, decode, sample_latents
from datencoder_jax.typing import Variables


class Frozen(NamedTuple):
    """What the loss reads and does not train."""

    base: Base
    empty_ids: jax.Array


class PairSource(NamedTuple):
    """Pictures of concepts, several per concept.

    Attributes:
        images: uint8 `[concepts, views, H, W, 3]`.
        latents: scaled, float16 `[concepts, views, h, w, c]`.
        ids: token ids of each view's prompt with the placeholder (the id after the vocabulary), `[concepts, views, L]`.
    """

    images: np.ndarray
    latents: np.ndarray
    ids: np.ndarray


class Weights(NamedTuple):
    """Of the losses, and `gamma` of the weight over noise levels (`diffusion.schedule.snr_weight`)."""

    contrastive: float
    norm: float
    temperature: float
    neighbours: int
    gamma: float


class TuningEncoderTask:
    """Trains a `TuningEncoder`; see `training.task.Task`.

    Args:
        config: of the encoder.
        frozen: the base model.
        source, held_out: pictures; `held_out` is for previews.
        pairs: share of samples whose target is another view of the concept.
        mesh: shards the contrastive loss over its `data` axis; None computes it densely.
    """

    def __init__(
        self,
        config: EncoderConfig,
        frozen: Frozen,
        source: PairSource,
        held_out: PairSource,
        *,
        batch_size: int,
        pairs: float,
        weights: Weights,
        seed: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config, self.frozen, self.source, self.held_out = config, frozen, source, held_out
        self.batch_size, self.pairs, self.weights, self.seed, self.mesh = batch_size, pairs, weights, seed, mesh
        self._drawer = jax.jit(self._draw)  # here, since a method that is jitted anew is compiled anew

    def init(self, key: jax.Array):
        params = init_params(TuningEncoder, self.config, key)
        base = self.frozen.base
        # v* starts as near to one word as to any other: at the mean of their directions.
        lengths = jnp.maximum(jnp.linalg.norm(base.table, axis=-1, keepdims=True), 1e-12)
        return params | {"token_head.bias": jnp.mean(base.table / lengths, axis=0, where=base.words[:, None])}

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        draw = np.random.default_rng([self.seed, step])
        concepts = draw.integers(len(self.source.images), size=self.batch_size)
        views = self.source.images.shape[1]
        shown = draw.integers(views, size=self.batch_size)
        other = (shown + draw.integers(1, max(views, 2), size=self.batch_size)) % views
        wanted = np.where(draw.random(self.batch_size) < self.pairs, other, shown)
        concepts, shown, wanted = concepts[rows], shown[rows], wanted[rows]
        return {
            "concepts": concepts.astype(np.int32),
            "images": self.source.images[concepts, shown],
            "latents": self.source.latents[concepts, shown],
            "wanted": self.source.latents[concepts, wanted],
            "ids": self.source.ids[concepts, wanted],
        }

    def loss(self, params, frozen: Frozen, batch, key, step):
        base, weights = frozen.base, self.weights
        encoder = Model(TuningEncoder, self.config, params)
        t_key, level_key, seen_key, noise_key = jax.random.split(key, 4)
        count, timesteps = len(batch["images"]), base.schedule.num_train_timesteps
        t = stratified_timesteps(t_key, count, timesteps)
        latents, wanted = batch["latents"].astype(jnp.float32), batch["wanted"].astype(jnp.float32)
        seen_t = jnp.broadcast_to(jax.random.choice(level_key, levels(timesteps)), count)
        seen_noise = jnp.broadcast_to(jax.random.normal(seen_key, latents.shape[1:])[None], latents.shape)
        variables = predict_each(
            encoder, base, to_float(batch["images"]), latents, seen_t, seen_noise, frozen.empty_ids
        )

        v = variables.embeddings[:, 0]
        words, nearest = nearest_words(v, base.table, base.words, 1)
        noise = jax.random.normal(noise_key, wanted.shape)
        alpha_bar = jnp.asarray(alphas_cumprod(base.schedule))[t]
        prediction = self._denoise(variables, words, base, add_noise(wanted, noise, alpha_bar), t, batch["ids"])
        kind = base.schedule.prediction_type
        error = denoising_loss(prediction, target(wanted, noise, alpha_bar, kind))
        denoise = snr_weight(alpha_bar, weights.gamma, kind) * error

        contrast = self._contrastive(v, batch["concepts"], base)
        penalty = norm_penalty(v, base.word_norm)
        total = denoise + weights.contrastive * contrast + weights.norm * penalty
        return total.mean(), {
            "denoise": denoise.mean(),
            "contrastive": contrast.mean(),
            "nearest_cosine": nearest.mean(),
            "words": _distinct(words[:, 0]),
            "concept_cosine": _mean_cosine(v),
            "norm": jnp.sqrt(penalty).mean(),
            "offset_norm": _offset_norm(variables),
        }

    def _denoise(self, variables: Variables, words: jax.Array, base: Base, noisy, t, ids):
        """The dual-path prediction for every sample under its own prompt, variables and nearest word `[batch, 1]`."""
        soft = variables.embeddings
        hard = soft + jax.lax.stop_gradient(base.table[words].astype(soft.dtype) - soft)
        return base.denoise(
            noisy,
            t,
            base.condition(ids, soft),
            hard=base.condition(ids, hard),
            offsets=variables.offsets,
            blend=self.config.blend,
        )

    def _contrastive(self, v: jax.Array, concepts: jax.Array, base: Base) -> jax.Array:
        options = {"temperature": self.weights.temperature, "neighbours": self.weights.neighbours}
        mask = jnp.ones(len(v), bool)
        if self.mesh is None:
            return contrastive_dense(v, concepts, mask, base.table, base.words, **options)
        return contrastive_ring(v, concepts, mask, base.table, base.words, mesh=self.mesh, **options)

    def preview(self, params, path: Path) -> dict[str, float]:
        """Rows of input, base model under the nearest word, encoder alone, truth: for every held-out concept."""
        encoder = Model(TuningEncoder, self.config, params)
        held = PairSource(*(x[:32] for x in self.held_out))
        second = min(1, held.images.shape[1] - 1)
        images, latents, ids = held.images[:, 0], held.latents[:, 0].astype(np.float32), held.ids[:, second]
        shown = (encoder, self.frozen, to_float(images), latents, ids, jax.random.key(0))
        drawn = [np.asarray(self._drawer(*shown, jnp.float32(blend))) for blend in (0.0, self.config.blend)]
        rows = np.stack([images, *drawn, held.images[:, second]], axis=1)
        write_grid(path, rows.reshape(-1, *images.shape[1:]), columns=16, scale=3)
        truth = to_float(held.images[:, second])
        return {
            name: float(jnp.square(to_float(x) - truth).mean())
            for name, x in zip(("vanilla", "encoder"), drawn, strict=True)
        }

    def _draw(self, encoder, frozen: Frozen, images, latents, ids, key, blend):
        base, count = frozen.base, len(images)
        seen_key, noise_key = jax.random.split(key)
        t = jnp.broadcast_to(levels(base.schedule.num_train_timesteps)[1], count)
        seen_noise = jax.random.normal(seen_key, latents.shape)
        variables = predict_each(encoder, base, images, latents, t, seen_noise, frozen.empty_ids)
        words, _ = nearest_words(variables.embeddings[:, 0], base.table, base.words, 1)
        hard_ids = jnp.where(ids >= base.table.shape[0], words, ids)
        noise = jax.random.normal(noise_key, latents.shape)
        # Guidance runs both halves in one batch, so each half needs its own copy of the per-sample offsets.
        doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), variables.offsets)
        request = Request(ids, hard_ids, frozen.empty_ids, noise, jnp.float32(3.0), blend)
        z = sample_latents(base, ddim(base.schedule, 20), request, Variables(variables.embeddings, doubled))
        return decode(base, z)


def _mean_cosine(v: jax.Array) -> jax.Array:
    """Mean cosine between different rows: near 1 means that all concepts have become one word."""
    unit = v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    count = len(v)
    return (jnp.square(unit.sum(axis=0)).sum() - count) / max(count * (count - 1), 1)  # of all pairs, without the pairs


def _distinct(words: jax.Array) -> jax.Array:
    """How many different words `[batch]` names, as a float: 1 is a collapse that cosines do not show."""
    ordered = jnp.sort(words)
    return 1.0 + (ordered[1:] != ordered[:-1]).sum().astype(jnp.float32)


def _offset_norm(variables: Variables) -> jax.Array:
    """Mean Frobenius norm of `A B` over samples and projections, as `|A B|^2 = sum (A'A)(B B')`: no product formed."""

    def norm(down, up):
        grams = jnp.einsum("bir,bis->brs", down, down), jnp.einsum("brj,bsj->brs", up, up)
        return jnp.sqrt(jnp.maximum((grams[0] * grams[1]).sum(axis=(1, 2)), 0.0)).mean()

    return jnp.stack([norm(*offset) for offset in variables.offsets.values()]).mean()
