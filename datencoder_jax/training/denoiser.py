"""Training the denoising UNet on cached latents.

For latents `z`, noise `e`, `t` uniform over the schedule, and the velocity target `v_t = sqrt(a_t) e - sqrt(1 - a_t) z`
(Salimans and Ho 2022; or `e` itself for noise prediction),

    L = E  w(t) mean (unet(sqrt(a_t) z + sqrt(1 - a_t) e, t, text) - target)^2                            (1)

with the capped weight `w` of `diffusion.schedule.snr_weight`. A tenth of the captions is replaced by the empty prompt,
for classifier-free guidance.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.data.images import to_uint8, write_grid
from datencoder_jax.data.records import weights_fingerprint
from datencoder_jax.diffusion.guidance import guided
from datencoder_jax.diffusion.samplers import SAMPLERS, sample
from datencoder_jax.diffusion.schedule import (
    ScheduleConfig,
    add_noise,
    alphas_cumprod,
    snr_weight,
    stratified_timesteps,
    target,
)
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.runtime.target import determinism_options
from datencoder_jax.training.source import Source

_STARTS_AT_ZERO = re.compile(r"(conv2|proj_out|conv_out)\.weight$")
"""Last layers of residual branches, and of the network, as Dhariwal and Nichol (2021) start them."""


class Frozen(NamedTuple):
    """What the loss reads and does not train."""

    text: Model
    vae: Model
    empty: jax.Array


class DenoiserTask:
    """Trains a UNet; see `training.task.Task`.

    `source.images` holds scaled latents `[n, h, w, c]` (float16), `source.labels["ids"]` the captions' token ids.

    Args:
        empty: token ids of the empty prompt `[1, L]`.
        gamma: caps the weight.
        dropout: share of captions replaced by the empty prompt.
    """

    def __init__(
        self,
        config: UNetConfig,
        schedule: ScheduleConfig,
        text: Model,
        vae: Model,
        source: Source,
        preview_ids: np.ndarray,
        empty: np.ndarray,
        *,
        batch_size: int,
        gamma: float = 5.0,
        dropout: float = 0.1,
    ):
        self.config, self.schedule, self.source = config, schedule, source
        self.preview_ids, self.batch_size, self.gamma, self.dropout = preview_ids, batch_size, gamma, dropout
        self.frozen = Frozen(text, vae, jnp.asarray(empty))
        self.identity = {"text": weights_fingerprint(text.params), "vae": weights_fingerprint(vae.params)}
        # Here, since a method that is jitted anew is compiled anew.
        self._sampler = jax.jit(self._sample, compiler_options=determinism_options())

    def init(self, key: jax.Array):
        params = init_params(UNet2DConditionModel, self.config, key)
        return {name: jnp.zeros_like(x) if _STARTS_AT_ZERO.search(name) else x for name, x in params.items()}

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        chosen = self.source.draw(step, self.batch_size)[rows]
        return {"latents": self.source.images[chosen], "ids": self.source.labels["ids"][chosen]}

    def loss(self, params, frozen: Frozen, batch, key, step):
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        latents = batch["latents"].astype(jnp.float32)
        count = len(latents)
        t = stratified_timesteps(t_key, count, self.schedule.num_train_timesteps)
        noise = jax.random.normal(noise_key, latents.shape)
        dropped = jax.random.bernoulli(drop_key, self.dropout, (count, 1))
        context = frozen.text(jnp.where(dropped, frozen.empty, batch["ids"])).last_hidden

        alpha_bar = jnp.asarray(alphas_cumprod(self.schedule))[t]
        unet = Model(UNet2DConditionModel, self.config, params)
        prediction = unet(add_noise(latents, noise, alpha_bar), t, context)
        error = denoising_loss(prediction, target(latents, noise, alpha_bar, self.schedule.prediction_type))
        weight = snr_weight(alpha_bar, self.gamma, self.schedule.prediction_type)
        return (weight * error).mean(), {"mse": error.mean()}

    def preview(self, params, path: Path) -> dict[str, float]:
        unet = Model(UNet2DConditionModel, self.config, params)
        images = self._sampler(unet, self.frozen, self.preview_ids, jax.random.key(0))
        write_grid(path, to_uint8(images), columns=8, scale=3)
        return {"pictures": float(len(images))}

    def _sample(self, unet: Model, frozen: Frozen, ids: jax.Array, key: jax.Array) -> jax.Array:
        """DDIM, 25 steps, guidance 4: token ids `[n, L]` -> pictures `[n, H, W, 3]`."""
        context = frozen.text(ids).last_hidden
        empty = jnp.broadcast_to(frozen.text(frozen.empty).last_hidden, context.shape)

        def predict(latents, t):
            both = unet(jnp.concatenate([latents, latents]), t, jnp.concatenate([empty, context]))
            unconditional, conditional = jnp.split(both, 2)
            return guided(unconditional, conditional, 4.0)

        side = self.config.sample_size
        noise = jax.random.normal(key, (len(ids), side, side, self.config.in_channels))
        latents = sample(SAMPLERS["ddim"](self.schedule, 25), predict, noise)
        return frozen.vae.bind().to_images(latents)
