"""Pretraining E4T's encoder and shared weight offsets on one domain (arXiv 2302.12228).

For a picture `I` of a concept and a latent `z`, which prompt `p` describes with the placeholder in the concept's place,

    z_t  = sqrt(a_t) z + sqrt(1 - a_t) e
    v*   = v_domain + 0.1 E(I, z_t, t)                          one per sample                        (1)
    L    = w(t) mean |unet(z_t, t; W + dW, v* under p) - target|^2 + lambda |0.1 E|^2 / rho^2          (2)

with the capped weight `w` of `diffusion.schedule.snr_weight`. `dW` are the offsets that all concepts share; there is
one path, no contrastive loss and no hypernetwork. `E` sees the noisy latent that is denoised, since that is what it
sees at sampling. The penalty's `lambda = 0.01` is the paper's; its unit `rho`, the mean norm of words, is ours, as are
`w` and, in the embedded world, pairs of pictures: `z` may show the concept of `I` in another scene (`training.pairs`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.data.images import to_float
from datencoder_jax.diffusion.samplers import ddim
from datencoder_jax.diffusion.schedule import add_noise, alphas_cumprod, snr_weight, stratified_timesteps, target
from datencoder_jax.encoder.domain_encoder import DomainConfig, DomainEncoder, encoder_of, offsets_of
from datencoder_jax.encoder.features import Seen
from datencoder_jax.methods.datencoder import look, see
from datencoder_jax.models.module import init_params
from datencoder_jax.objectives.contrastive import nearest_words
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.objectives.norm import norm_penalty
from datencoder_jax.sampling import Request, decode, sample_latents
from datencoder_jax.training import accumulation
from datencoder_jax.training.accumulation import CoupledLoss
from datencoder_jax.training.previews import Previews
from datencoder_jax.training.tuning_encoder import (
    Data,
    Inputs,
    Targets,
    distinct,
    latent_shape,
    latents_of,
    mean_cosine,
    offset_norm,
)
from datencoder_jax.typing import LowRank, Params, Reader, Variables

_PREVIEW_STEPS = 20
_PREVIEW_GUIDANCE = 3.0


class E4TFrozen(NamedTuple):
    """What the loss reads and does not train; `base`, `empty_ids` and `templates` as `tuning_encoder.Frozen` has them.

    Attributes:
        word: `v_domain`, `[1, d]`.
    """

    base: Base
    empty_ids: jax.Array
    templates: jax.Array
    word: jax.Array


class E4TWeights(NamedTuple):
    """`lambda`, and `gamma` of the weight over noise levels."""

    norm: float
    gamma: float


class Predicted(NamedTuple):
    """What the loss of a sample is computed from that is trained.

    Attributes:
        shift: `0.1 E`, `[b, d]`.
        offsets: `dW`, shared.
    """

    shift: jax.Array
    offsets: dict[str, LowRank]


class E4TTask:
    """Trains a `DomainEncoder`; see `training.task.Task`.

    Args:
        config: of the encoder and the offsets.
        frozen: the base model and the domain's word.
        data: what is trained on; None for a task that is compiled and not run.
        previews: what samples are drawn of; None likewise.
        accumulate: how many parts a batch is taken in.
        remat: recompute the UNet's inner states for the gradient.
        identity: of base model and data, for checkpoints.
    """

    def __init__(
        self,
        config: DomainConfig,
        frozen: E4TFrozen,
        data: Data | None,
        previews: Previews | None,
        *,
        batch_size: int,
        weights: E4TWeights,
        accumulate: int = 1,
        remat: bool = False,
        identity: dict[str, str] | None = None,
    ):
        self.config, self.frozen, self.data, self.previews = config, frozen, data, previews
        self.batch_size, self.weights, self.accumulate, self.remat = batch_size, weights, accumulate, remat
        self.identity = identity or {}

    def init(self, key: jax.Array) -> Params:
        return init_params(DomainEncoder, self.config, key)

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        assert self.data is not None
        return self.data.batch(step, rows)

    def data_report(self) -> dict[str, int]:
        return {} if self.data is None else self.data.report()

    def value_and_grad(self, params: Params, frozen: E4TFrozen, batch: dict, key: jax.Array, step: jax.Array):
        """`(L, values to log), gradient` of equation (2)."""

        def alarms(shift: jax.Array, _: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
            words = nearest_words(frozen.word + shift, frozen.base.table, frozen.base.words, 1)[0]
            values = {"words": distinct(words[:, 0]), "concept_cosine": mean_cosine(shift)}
            return jnp.zeros(len(shift)), values

        loss = CoupledLoss(
            prepare=lambda samples: self._inputs(frozen, samples),
            predict=self._predict,
            vectors=lambda predicted: predicted.shift,
            each=lambda predicted, inputs: self._each(frozen, predicted, inputs),
            coupled=alarms,
        )
        return accumulation.value_and_grad(loss, params, self._drawn(frozen.base, batch, key), self.accumulate)

    def loss(self, params: Params, frozen: E4TFrozen, batch: dict, key: jax.Array, step: jax.Array):
        """`L, values to log`; compiled, the gradient is left out."""
        return self.value_and_grad(params, frozen, batch, key, step)[0]

    def _drawn(self, base: Base, batch: dict, key: jax.Array) -> dict[str, jax.Array]:
        """The batch with all that is random: timesteps and noises, and of pictures the latents' own."""
        t_key, noise_key, latent_key = jax.random.split(key, 3)
        count, shape = len(batch["concepts"]), latent_shape(base, batch)
        drawn = {
            "t": stratified_timesteps(t_key, count, base.schedule.num_train_timesteps),
            "noise": jax.random.normal(noise_key, (count, *shape)),
        }
        if "latents" not in batch:
            drawn["latent_noise"] = jax.random.normal(latent_key, (count, *shape))
        return batch | drawn

    def _inputs(self, frozen: E4TFrozen, samples: dict[str, jax.Array]) -> Inputs:
        base, t, noise = frozen.base, samples["t"], samples["noise"]
        # Every noisy latent has a prediction of its own, so a second target would save nothing; there is one.
        wanted = samples["wanted"][:, 0].astype(jnp.float32) if "wanted" in samples else latents_of(base, samples)
        if "classes" in samples:
            pictures, states = None, Seen(samples["classes"], samples["patches"])
        else:
            pictures, states = to_float(samples["vision"] if "vision" in samples else samples["images"]), None
        alpha_bar = jnp.asarray(alphas_cumprod(base.schedule))[t]
        kind = base.schedule.prediction_type
        features = look(base, pictures, wanted, t, noise, frozen.empty_ids, states, self.config.patch_taps)
        targets = Targets(
            noisy=add_noise(wanted, noise, alpha_bar),
            t=t,
            target=target(wanted, noise, alpha_bar, kind),
            weight=snr_weight(alpha_bar, self.weights.gamma, kind),
            ids=samples["ids"][:, 0] if "ids" in samples else frozen.templates[samples["templates"]],
        )
        return jax.lax.stop_gradient(Inputs(features, targets))

    def _predict(self, params: Params, inputs: Inputs) -> Predicted:
        """The part of equation (1) that is trained."""
        encoder = encoder_of(self.config, params)
        shift = self.config.scale * encoder(inputs.features).embeddings[:, 0]
        return Predicted(shift, offsets_of(self.config, params))

    def _each(self, frozen: E4TFrozen, predicted: Predicted, inputs: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Equation (2) of each sample, `[b]`, and values to log."""
        base, (shift, offsets) = frozen.base, predicted
        targets = inputs.targets
        prompt = base.condition(targets.ids, (frozen.word + shift)[:, None])
        variables = Variables(frozen.word, offsets)
        prediction = base.denoise(
            targets.noisy, targets.t, prompt, offsets=base.edits(variables, prompt), remat=self.remat
        )
        denoise = targets.weight * denoising_loss(prediction, targets.target)
        penalty = norm_penalty(shift, base.word_norm)
        norm = offset_norm(Variables(frozen.word, jax.tree.map(lambda x: x[None], offsets)))
        values = {"denoise": denoise, "shift": jnp.sqrt(penalty), "offset_norm": norm}
        return denoise + self.weights.norm * penalty, values

    def draw_previews(
        self, params: Params, frozen: E4TFrozen, images: jax.Array, ids: jax.Array
    ) -> dict[str, jax.Array]:
        """What the base model draws under the domain's word alone, and with equation (1) at every step, untuned."""
        base = frozen.base
        side, channels = images.shape[1] // base.vae.config.factor, base.unet.config.in_channels
        noise = jax.random.normal(jax.random.key(0), (len(images), side, side, channels))
        request = Request(ids, None, frozen.empty_ids, noise, jnp.float32(_PREVIEW_GUIDANCE), jnp.float32(1.0))

        def draw(variables: Variables) -> jax.Array:
            return decode(base, sample_latents(base, ddim(base.schedule, _PREVIEW_STEPS), request, variables))

        seen, empty = see(base, to_float(images), self.config.patch_taps), base.condition(frozen.empty_ids)
        classes, patches = (x.astype(jnp.float32)[:, None] for x in (seen.classes, seen.patches))
        scale = jnp.full(1, self.config.scale, jnp.float32)
        reader = Reader(encoder_of(self.config, params), classes, patches, empty.context, empty.pooled, scale)
        encoded = Variables(frozen.word, offsets_of(self.config, params), reader=reader)
        return {"vanilla": draw(Variables(frozen.word, {})), "encoder": draw(encoded)}
