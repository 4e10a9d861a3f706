"""The KL autoencoder of latent diffusion (Rombach et al. 2022): pictures to latents and back.

    posterior(x) = N(mean, exp(log_variance)),   latents = scaling_factor (sample - shift)              (1)
    picture      = decode(latents / scaling_factor + shift)                                            (2)

Module names are those of diffusers' `AutoencoderKL`; arrays are NHWC; pictures are in [-1, 1].
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.config import ConfigMixin
from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.models.layers import GroupNorm, activation, conv, conv1x1, conv3x3, linear
from datencoder_jax.models.unet import ResnetBlock2D, Upsample2D
from datencoder_jax.runtime.precision import exact_products


@dataclass(frozen=True)
class VAEConfig(ConfigMixin):
    """The options of `vae/config.json` that change the computation; names and defaults are diffusers'."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    act_fn: str = "silu"
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    _choices: ClassVar = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    _required: ClassVar = {"latents_mean": (None,), "latents_std": (None,)}

    def __post_init__(self):
        if not math.isfinite(self.scaling_factor) or not self.scaling_factor:
            raise ValueError(f"its scaling_factor cannot be {self.scaling_factor}")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, `[batch, h, w, latent_channels]` each."""

    mean: jax.Array
    log_variance: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw, shaped as `mean`."""
        return self.at(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def at(self, noise: jax.Array) -> jax.Array:
        """The draw that standard normal `noise` stands for."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class _VAEAttention(nnx.Module):
    """Single-head self-attention over all pixels of the lowest resolution."""

    def __init__(self, channels: int, *, groups: int, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.group_norm = GroupNorm(channels, groups=groups, epsilon=1e-6, **common)
        self.to_q = linear(channels, channels, **common)
        self.to_k = linear(channels, channels, **common)
        self.to_v = linear(channels, channels, **common)
        self.to_out = nnx.List([linear(channels, channels, **common)])

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (project(h)[:, :, None, :] for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attend(q, k, v)[:, :, 0, :]).reshape(x.shape)


class _AsymmetricDownsample(nnx.Module):
    """A 3x3 convolution of stride 2, zero-padded on the right and below only."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class _Block(nnx.Module):
    """Residual blocks of one resolution, then a change of resolution where there is one."""

    def __init__(self, config: VAEConfig, inputs: int, outputs: int, layers: int, *, resample: str | None, dtype, rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List(
            _resnet(config, inputs if i == 0 else outputs, outputs, **common) for i in range(layers)
        )
        if resample == "down":
            self.downsamplers = nnx.List([_AsymmetricDownsample(outputs, **common)])
        if resample == "up":
            self.upsamplers = nnx.List([Upsample2D(outputs, **common)])
        self.resample = resample

    def __call__(self, h: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            h = resnet(h)
        if self.resample is None:
            return h
        return (self.downsamplers if self.resample == "down" else self.upsamplers)[0](h)


def _resnet(config: VAEConfig, inputs: int, outputs: int, *, dtype, rngs) -> ResnetBlock2D:
    return ResnetBlock2D(
        inputs, outputs, None, groups=config.norm_num_groups, epsilon=1e-6, act=config.act_fn, dtype=dtype, rngs=rngs
    )


class _MidBlock(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        width = config.block_out_channels[-1]
        self.resnets = nnx.List(_resnet(config, width, width, **common) for _ in range(2))
        self.attentions = nnx.List(
            [_VAEAttention(width, groups=config.norm_num_groups, **common)] if config.mid_block_add_attention else []
        )

    def __call__(self, h: jax.Array) -> jax.Array:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class _Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels
        last = len(channels) - 1
        self.conv_in = conv3x3(config.in_channels, channels[0], **common)
        self.down_blocks = nnx.List(
            _Block(
                config,
                channels[max(i - 1, 0)],
                width,
                config.layers_per_block,
                resample="down" if i < last else None,
                **common,
            )
            for i, width in enumerate(channels)
        )
        self.mid_block = _MidBlock(config, **common)
        self.conv_norm_out = GroupNorm(channels[-1], groups=config.norm_num_groups, epsilon=1e-6, **common)
        self.conv_out = conv3x3(channels[-1], 2 * config.latent_channels, **common)
        self.act = activation(config.act_fn)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out(self.mid_block(h), self.act))


class _Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels[::-1]
        last = len(channels) - 1
        self.conv_in = conv3x3(config.latent_channels, channels[0], **common)
        self.mid_block = _MidBlock(config, **common)
        self.up_blocks = nnx.List(
            _Block(
                config,
                channels[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                resample="up" if i < last else None,
                **common,
            )
            for i, width in enumerate(channels)
        )
        self.conv_norm_out = GroupNorm(channels[-1], groups=config.norm_num_groups, epsilon=1e-6, **common)
        self.conv_out = conv3x3(channels[-1], config.out_channels, **common)
        self.act = activation(config.act_fn)

    def __call__(self, z: jax.Array) -> jax.Array:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out(h, self.act))


class AutoencoderKL(nnx.Module):
    """The autoencoder; call it through `Model.bind()`: `encode`, `decode`, `to_latents`, `to_images`."""

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        channels = config.latent_channels
        self.encoder = _Encoder(config, **common)
        self.decoder = _Decoder(config, **common)
        self.quant_conv = conv1x1(2 * channels, 2 * channels, **common) if config.use_quant_conv else None
        self.post_quant_conv = conv1x1(channels, channels, **common) if config.use_post_quant_conv else None
        self.config, self.dtype = config, dtype

    def encode(self, images: jax.Array) -> Posterior:
        """Pictures `[batch, H, W, 3]` -> the posterior over unscaled latents, float32."""
        with exact_products(self.dtype):
            moments = self.encoder(images.astype(self.dtype))
            if self.quant_conv is not None:
                moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, z: jax.Array) -> jax.Array:
        """Unscaled latents `[batch, h, w, latent_channels]` -> pictures `[batch, H, W, 3]`, float32, not clipped."""
        z = z.astype(self.dtype)
        with exact_products(self.dtype):
            if self.post_quant_conv is not None:
                z = self.post_quant_conv(z)
            return self.decoder(z).astype(jnp.float32)

    def to_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Equation (1): scaled latents, sampled with `key` or at the posterior's mean."""
        posterior = self.encode(images)
        return self.scaled(posterior.mean if key is None else posterior.sample(key))

    def scaled(self, z: jax.Array) -> jax.Array:
        """Unscaled latents -> what the UNet knows."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def to_images(self, latents: jax.Array) -> jax.Array:
        """Equation (2): pictures clipped to [-1, 1]."""
        return jnp.clip(
            self.decode(latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)), -1.0, 1.0
        )

    def __call__(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, Posterior]:
        """Reconstruction through a sampled latent, and the posterior: what training needs."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(key)), posterior
