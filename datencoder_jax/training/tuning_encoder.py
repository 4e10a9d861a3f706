"""Pretraining the tuning-encoder on a frozen base model.

For a picture `I` of a concept, its latent `z`, and pictures `I'_k` with latents `z'_k` that prompts `p'_k` describe
with the placeholder in the concept's place,

    x      = E(I, sqrt(a_t) z + sqrt(1 - a_t) e, t)                       prediction, one per sample
    L_den  = 1/K sum_k w(t'_k) mean |unet(z'_k,t'_k, t'_k; dual path of x under p'_k) - target_k|^2
    L      = L_den + lambda_c L_c + lambda_n L_n                          per example, mean last         (1)

with the capped weight `w` of `diffusion.schedule.snr_weight`, the nearest-neighbour contrastive loss `L_c` over the
global batch, whose weight grows over its first steps, and the norm penalty `L_n` (arXiv 2307.06925, section 3; the
weights are ours). With photographs `I'_k = I`, and `p'_k` is one of the templates of Textual Inversion.
The embedded world can draw a concept again, so a share `pairs` of its targets has `I'` in another scene, style or pose
(ours): what the encoder keeps is then what the concept keeps. Also ours:

- Where the data tell which pixels of `I'` the concept covers, squared errors are weighted by equation (3) of
  `methods.focus`: the others tell little of the concept and add their noise to the gradient.
- A prediction is tried on `K` targets, with noise levels spread over the schedule: the gradient is nearly all noise,
  and a target costs less than a prediction.
- `t` and `e` are one for the whole batch, and `t` is one of those the method predicts at. Drawn per sample, as `t'` and
  its noise are, they are what `L_c` tells the samples apart by, and `v*` comes to name the noise, not the concept.
- The hard path reads the nearest word `n`, and its gradient goes straight through to `v*` (`v* + sg(n - v*)`), so that
  `v*` moves to words under which the base model already draws the concept.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.data.images import to_float
from datencoder_jax.diffusion.samplers import ddim
from datencoder_jax.diffusion.schedule import add_noise, alphas_cumprod, snr_weight, stratified_timesteps, target
from datencoder_jax.encoder.features import Seen
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.methods.datencoder import levels, look, predict_each
from datencoder_jax.methods.focus import masked
from datencoder_jax.models.batches import map_in_batches, pictures_at_once
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.models.vae import Posterior
from datencoder_jax.objectives.contrastive import contrastive_dense, contrastive_ring, nearest_words
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.objectives.norm import norm_penalty
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.sampling import Request, decode, sample_latents
from datencoder_jax.training import accumulation
from datencoder_jax.training.accumulation import CoupledLoss
from datencoder_jax.training.anchors import Anchors
from datencoder_jax.training.previews import Previews
from datencoder_jax.typing import Features, LowRank, Params, Variables

_ENCODED_AT_ONCE = 8
"""Images of 512 px that a device's VAE encodes at a time in training. Singly, a step of `sd15_laion` with 8 of them a
device on v5e:4x4 moves 242 GB in place of 194, and needs as much memory: the UNet's gradient decides that."""


class Frozen(NamedTuple):
    """What the loss reads and does not train.

    Attributes:
        base: the base model.
        empty_ids: of the empty prompt `[1, L]`.
        templates: token ids of the prompts for pictures that have none of their own, `[templates, L]`.
    """

    base: Base
    empty_ids: jax.Array
    templates: jax.Array


class Data(Protocol):
    """Batches for the task.

    A batch has `concepts` int32 `[b]`, equal for pictures of one concept; token ids of prompts with the placeholder
    (the id after the vocabulary), `ids [b, K, L]`, or else `templates` int32 `[b]`, rows of `Frozen.templates`; and

        pictures of `I`   images uint8 [b, H, W, 3], and vision uint8 [b, S, S, 3], the vision tower's view, if apart;
                          or its states classes [b, taps, d] and patches [b, P, d]
        latents           latents of I, scaled [b, h, w, c], and wanted of the I', [b, K, h, w, c]; or moments
                          [b, h, w, 2c] of I, mean and log variance of the VAE's posterior; or else they are made from
                          images
        place             covered [b, K, h, w]: how much of each latent pixel of the I' the concept covers; or nothing
    """

    @property
    def identity(self) -> str:
        """Changes when the data do."""
        ...

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        """Rows of a step's global batch, a pure function of the step."""
        ...

    def report(self) -> dict[str, int]:
        """What was left out so far, by reason."""
        ...


class Weights(NamedTuple):
    """Of the losses, and `gamma` of the weight over noise levels (`diffusion.schedule.snr_weight`).

    The contrastive loss has its full weight after `contrastive_warmup` steps. `focus` is what a pixel beside the
    concept weighs, where the data tell which those are; 1 for all alike.
    """

    contrastive: float
    norm: float
    temperature: float
    neighbours: int
    gamma: float
    contrastive_warmup: int = 0
    focus: float = 1.0


class Targets(NamedTuple):
    """What predictions are tried on; leading axes are `[b, K]`, of flat targets, and of E4T's, `[b]`.

    Attributes:
        noisy, target: `z'_t'` and what is to be predicted, `[b, K, h, w, c]`.
        t, weight: `t'` and `w(t')`, `[b, K]`.
        ids: of `p'`, `[b, K, L]`.
        where: weights of the pixels, `[b, K, h, w]`; None for all alike.
    """

    noisy: jax.Array
    t: jax.Array
    target: jax.Array
    weight: jax.Array
    ids: jax.Array
    where: jax.Array | None = None


class Inputs(NamedTuple):
    """What a sample's loss is computed from, an axis for the samples first: all that is not trained.

    Attributes:
        features: what the encoder sees.
        targets: what its prediction is tried on.
    """

    features: Features
    targets: Targets


class TuningEncoderTask:
    """Trains a `TuningEncoder`; see `training.task.Task`.

    Args:
        config: of the encoder.
        frozen: the base model.
        data: what is trained on; None for a task that is compiled and not run.
        previews: what samples are drawn of; None likewise.
        draws: `K`, targets per sample; data that have `wanted` give so many.
        accumulate: how many parts a batch is taken in.
        remat: recompute the UNet's inner states for the gradient.
        mesh: shards the contrastive loss over all its axes; None computes it densely.
        identity: of base model and data, for checkpoints.
        anchors: the words that the encoder chooses from, where it does.
    """

    def __init__(
        self,
        config: EncoderConfig,
        frozen: Frozen,
        data: Data | None,
        previews: Previews | None,
        *,
        batch_size: int,
        weights: Weights,
        draws: int = 1,
        accumulate: int = 1,
        remat: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        identity: dict[str, str] | None = None,
        anchors: Anchors | None = None,
    ):
        self.config, self.frozen, self.data, self.previews = config, frozen, data, previews
        self.batch_size, self.weights, self.draws = batch_size, weights, draws
        self.accumulate, self.remat = accumulate, remat
        self.mesh, self.identity, self.anchors = mesh, identity or {}, anchors

    def init(self, key: jax.Array) -> Params:
        params = init_params(TuningEncoder, self.config, key)
        base = self.frozen.base
        if self.anchors is not None:  # v* starts at the chosen word
            weight = jnp.zeros_like(params["token_head.weight"])
            return params | {"token_head.weight": weight} | self.anchors.params
        # v* starts as near to one word as to any other: at the mean of their directions.
        table = jnp.asarray(base.table).astype(jnp.float32)
        lengths = jnp.maximum(jnp.linalg.norm(table, axis=-1, keepdims=True), 1e-12)
        return params | {"token_head.bias": jnp.mean(table / lengths, axis=0, where=base.words[:, None])}

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        assert self.data is not None
        return self.data.batch(step, rows)

    def data_report(self) -> dict[str, int]:
        return {} if self.data is None else self.data.report()

    def value_and_grad(self, params: Params, frozen: Frozen, batch: dict, key: jax.Array, step: jax.Array):
        """`(L, values to log), gradient` of equation (1)."""
        base, weights = frozen.base, self.weights
        warmth = jnp.minimum(1.0, (step + 1).astype(jnp.float32) / max(weights.contrastive_warmup, 1))

        def coupled(v: jax.Array, samples: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
            contrast = self._contrastive(v, samples["concepts"], base)
            words, _ = nearest_words(v, base.table, base.words, 1)
            values = {
                "contrastive": contrast.mean(),
                "words": distinct(words[:, 0]),
                "concept_cosine": mean_cosine(v),
            }
            return weights.contrastive * warmth * contrast, values

        loss = CoupledLoss(
            prepare=lambda samples: self._inputs(frozen, samples),
            predict=lambda params, inputs: Model(TuningEncoder, self.config, params)(inputs.features),
            vectors=lambda variables: variables.embeddings[:, 0],
            each=lambda variables, inputs: self._each(base, variables, inputs),
            coupled=coupled,
        )
        return accumulation.value_and_grad(loss, params, self._drawn(base, batch, key), self.accumulate)

    def loss(self, params: Params, frozen: Frozen, batch: dict, key: jax.Array, step: jax.Array):
        """`L, values to log`; compiled, the gradient is left out."""
        return self.value_and_grad(params, frozen, batch, key, step)[0]

    def _drawn(self, base: Base, batch: dict, key: jax.Array) -> dict[str, jax.Array]:
        """The batch with all that is random: timesteps and noises, and of pictures the latents' own."""
        t_key, level_key, seen_key, noise_key, latent_key = jax.random.split(key, 5)
        count, timesteps = len(batch["concepts"]), base.schedule.num_train_timesteps
        shape = latent_shape(base, batch)
        drawn = {
            "t": stratified_timesteps(t_key, count * self.draws, timesteps).reshape(self.draws, count).T,
            "noise": jax.random.normal(noise_key, (count, self.draws, *shape)),
            "seen_t": jnp.broadcast_to(jax.random.choice(level_key, levels(timesteps)), count),
            "seen_noise": jnp.broadcast_to(jax.random.normal(seen_key, shape)[None], (count, *shape)),
        }
        if "latents" not in batch:
            drawn["latent_noise"] = jax.random.normal(latent_key, (count, *shape))
        return batch | drawn

    def _inputs(self, frozen: Frozen, samples: dict[str, jax.Array]) -> Inputs:
        base = frozen.base
        latents, noise = latents_of(base, samples), samples["noise"]
        if "wanted" in samples:
            wanted = samples["wanted"].astype(jnp.float32)
        else:
            wanted = jnp.broadcast_to(latents[:, None], noise.shape)
        if "classes" in samples:
            pictures, states = None, Seen(samples["classes"], samples["patches"])
        else:
            pictures, states = to_float(samples["vision"] if "vision" in samples else samples["images"]), None
        features = look(
            base,
            pictures,
            latents,
            samples["seen_t"],
            samples["seen_noise"],
            frozen.empty_ids,
            states,
            self.config.patch_taps,
        )
        alpha_bar = jnp.asarray(alphas_cumprod(base.schedule))[samples["t"]]
        kind = base.schedule.prediction_type
        told = "covered" in samples and self.weights.focus < 1.0
        where = masked(samples["covered"].astype(jnp.float32), self.weights.focus) if told else None
        targets = Targets(
            noisy=add_noise(wanted, noise, alpha_bar),
            t=samples["t"],
            target=target(wanted, noise, alpha_bar, kind),
            weight=snr_weight(alpha_bar, self.weights.gamma, kind),
            ids=self._prompts(frozen, samples),
            where=where,
        )
        return jax.lax.stop_gradient(Inputs(features, targets))

    def _prompts(self, frozen: Frozen, samples: dict[str, jax.Array]) -> jax.Array:
        """Token ids of every target's prompt, `[b, K, L]`."""
        if "ids" in samples:
            return samples["ids"]
        ids = frozen.templates[samples["templates"]][:, None]
        return jnp.broadcast_to(ids, (len(ids), self.draws, ids.shape[-1]))

    def _each(self, base: Base, variables: Variables, inputs: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The losses that a sample has by itself, `[b]`, and values to log."""
        v = variables.embeddings[:, 0]
        words, nearest = nearest_words(v, base.table, base.words, 1)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inputs.targets)
        tried, hard = jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), (variables, words))
        error = denoising_loss(self._denoise(tried, hard, base, flat), flat.target, where=flat.where)
        denoise = (flat.weight * error).reshape(-1, self.draws).mean(axis=1)
        penalty = norm_penalty(v, base.word_norm)
        values = {
            "denoise": denoise,
            "nearest_cosine": nearest[:, 0],
            "norm": jnp.sqrt(penalty),
            "offset_norm": offset_norm(variables),
        }
        return denoise + self.weights.norm * penalty, values

    def _denoise(self, variables: Variables, words: jax.Array, base: Base, targets: Targets) -> jax.Array:
        """The dual-path prediction for flat targets, each under its own prompt, variables and nearest word `[b, 1]`."""
        soft = variables.embeddings
        hard = soft + jax.lax.stop_gradient(base.table[words].astype(soft.dtype) - soft)
        prompt = base.condition(targets.ids, soft)
        return base.denoise(
            targets.noisy,
            targets.t,
            prompt,
            hard=base.condition(targets.ids, hard),
            offsets=base.edits(variables, prompt),
            blend=self.config.blend,
            remat=self.remat,
        )

    def _contrastive(self, v: jax.Array, concepts: jax.Array, base: Base) -> jax.Array:
        options = {"temperature": self.weights.temperature, "neighbours": self.weights.neighbours}
        mask = jnp.ones(len(v), bool)
        if self.mesh is None:
            return contrastive_dense(v, concepts, mask, base.table, base.words, **options)
        axes = self.mesh.axis_names
        return contrastive_ring(v, concepts, mask, base.table, base.words, mesh=self.mesh, axis=axes, **options)

    def draw_previews(self, params: Params, frozen: Frozen, images: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        """What the base model draws under the nearest word, and what it draws with the encoder's variables."""
        base, count = frozen.base, len(images)
        seen_key, noise_key = jax.random.split(jax.random.key(0))
        vae, pictures = base.vae.bind(), to_float(images)
        latents = map_in_batches(vae.to_latents, pictures, pictures_at_once(*images.shape[1:3]))
        t = jnp.broadcast_to(levels(base.schedule.num_train_timesteps)[1], count)
        seen_noise = jax.random.normal(seen_key, latents.shape)
        encoder = Model(TuningEncoder, self.config, params)
        variables = predict_each(encoder, base, pictures, latents, t, seen_noise, frozen.empty_ids)
        words, _ = nearest_words(variables.embeddings[:, 0], base.table, base.words, 1)
        hard_ids = jnp.where(ids >= base.table.shape[0], words, ids)
        noise = jax.random.normal(noise_key, latents.shape)
        # Guidance runs both halves in one batch, so each half needs its own copy of the per-sample offsets.
        doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), variables.offsets)

        def draw(blend: jax.Array) -> jax.Array:
            request = Request(ids, hard_ids, frozen.empty_ids, noise, jnp.float32(3.0), blend)
            z = sample_latents(base, ddim(base.schedule, 20), request, Variables(variables.embeddings, doubled))
            return decode(base, z)

        vanilla, encoder_alone = jax.lax.map(draw, jnp.asarray([0.0, self.config.blend], jnp.float32))
        return {"vanilla": vanilla, "encoder": encoder_alone}


def latent_shape(base: Base, batch: dict[str, Any]) -> tuple[int, int, int]:
    """`h, w, c` of a batch's latents."""
    if "latents" in batch:
        return batch["latents"].shape[1:]
    if "moments" in batch:
        *sides, channels = batch["moments"].shape[1:]
        return (*sides, channels // 2)
    height, width = (side // base.vae.config.factor for side in batch["images"].shape[1:3])
    return height, width, base.vae.config.latent_channels


def latents_of(base: Base, samples: dict[str, jax.Array]) -> jax.Array:
    """Scaled latents of the samples' pictures, float32 `[b, h, w, c]`."""
    if "latents" in samples:
        return samples["latents"].astype(jnp.float32)
    vae = base.vae.bind()
    if "moments" in samples:
        posterior = Posterior(*jnp.split(samples["moments"].astype(jnp.float32), 2, axis=-1))
    else:
        images = to_float(samples["images"])
        posterior = map_in_batches(vae.encode, images, _ENCODED_AT_ONCE * pictures_at_once(*images.shape[1:3]))
    return vae.scaled(posterior.at(samples["latent_noise"])).astype(jnp.float32)


def mean_cosine(v: jax.Array) -> jax.Array:
    """Mean cosine between different rows: near 1 means that all concepts have become one word."""
    unit = v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    count = len(v)
    ordered = float(max(count * (count - 1), 1))  # pairs of different rows
    return (jnp.square(unit.sum(axis=0)).sum() - count) / ordered


def distinct(words: jax.Array) -> jax.Array:
    """How many different words `[batch]` names, as a float: 1 is a collapse that cosines do not show."""
    ordered = jnp.sort(words)
    return 1.0 + (ordered[1:] != ordered[:-1]).sum().astype(jnp.float32)


def offset_norm(variables: Variables) -> jax.Array:
    """Mean Frobenius norm of `A B` over projections, `[b]`, as `|A B|^2 = sum (A'A)(B B')`: no product is formed."""

    def norm(down, up):
        with exact_products():
            grams = jnp.einsum("bir,bis->brs", down, down), jnp.einsum("brj,bsj->brs", up, up)
        return jnp.sqrt(jnp.maximum((grams[0] * grams[1]).sum(axis=(1, 2)), 0.0))

    norms = [norm(*offset) for offset in variables.offsets.values() if isinstance(offset, LowRank)]
    return jnp.stack(norms).mean(axis=0) if norms else jnp.zeros(len(variables.embeddings))
