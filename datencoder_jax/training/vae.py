"""Training the KL autoencoder.

With reconstruction `y` of a picture `x` through a sampled latent, mean over pixels, and `KL` the mean over latent
dimensions of the divergence from a standard normal,

    L = mean |x - y| + 4 mean (x - y)^2 + lambda KL                                          (1)
    PSNR = 10 log10(4 / mean (x - y)^2)         for pictures in [-1, 1], in dB               (2)

The absolute error keeps edges sharp, the squared error fills flat areas quickly.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from datencoder_jax.data.images import to_float, to_uint8, write_grid
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.models.vae import AutoencoderKL, Posterior, VAEConfig
from datencoder_jax.training.source import Source


def kl_divergence(posterior: Posterior) -> jax.Array:
    """Divergence of the posterior from a standard normal, mean over latent dimensions: `[batch]`."""
    mean, log_variance = posterior
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean(axis=(1, 2, 3))


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Equation (2), one value per picture: `[batch]`."""
    return 10.0 * jnp.log10(4.0 / jnp.square(x - y).mean(axis=(1, 2, 3)))


class VAETask:
    """Trains an `AutoencoderKL` on pictures; see `training.task.Task`."""

    frozen = None

    def __init__(self, config: VAEConfig, source: Source, held_out: Source, *, batch_size: int, kl_weight: float):
        self.config, self.source, self.held_out = config, source, held_out
        self.batch_size, self.kl_weight = batch_size, kl_weight

    def init(self, key: jax.Array):
        return init_params(AutoencoderKL, self.config, key)

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        return {"images": self.source.images[self.source.draw(step, self.batch_size)[rows]]}

    def loss(self, params, frozen, batch, key, step):
        images = to_float(batch["images"])
        output, posterior = Model(AutoencoderKL, self.config, params)(images, key)
        error = images - output
        reconstruction = jnp.abs(error).mean() + 4.0 * jnp.square(error).mean()
        kl = kl_divergence(posterior).mean()
        return reconstruction + self.kl_weight * kl, {"psnr": psnr(images, output).mean(), "kl": kl}

    def preview(self, params, path: Path) -> dict[str, float]:
        images = to_float(self.held_out.images[:256])
        output = _reconstruct(Model(AutoencoderKL, self.config, params), images)
        pairs = to_uint8(jnp.stack([images[:32], output[:32]], axis=1).reshape(-1, *images.shape[1:]))
        write_grid(path, pairs, columns=16, scale=3, labels=("input", "decoded"))
        return {"psnr": float(psnr(images, output).mean())}


@jax.jit
def _reconstruct(model: Model, images: jax.Array) -> jax.Array:
    vae = model.bind()
    return vae.to_images(vae.to_latents(images))


def encode_latents(vae: Model, images: np.ndarray, batch_size: int = 250) -> np.ndarray:
    """Scaled latents (posterior means) of uint8 pictures, float16 `[n, h, w, c]`."""
    starts = tqdm(range(0, len(images), batch_size), desc="encoding", disable=len(images) < 4000)
    return np.concatenate([np.asarray(_encode(vae, images[i : i + batch_size])) for i in starts])


@jax.jit
def _encode(vae: Model, images: jax.Array) -> jax.Array:
    return vae.bind().to_latents(to_float(images)).astype("float16")
