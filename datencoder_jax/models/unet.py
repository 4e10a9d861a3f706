"""Stable Diffusion's denoising UNet (1.x, 2.x and XL) with weight offsets and a second context as inputs.

Module names are those of diffusers' `UNet2DConditionModel`, so parameter names match its checkpoints. The latents are
NHWC. `h_0` is the input convolution; each down block appends its residuals to a list that the up blocks consume in
reverse, so the encoder half returns exactly what a feature extractor needs (method section 2).

With sinusoidal features `phi`, pooled text `p` and sizes `s_1 .. s_6`, every residual block is given

    e = MLP(phi(t))                                                 Stable Diffusion 1.x, 2.x       (1)
    e = MLP(phi(t)) + MLP'([p, phi(s_1), ..., phi(s_6)])            XL (arXiv 2307.01952)           (2)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.attention import Maps, Transformer2DModel
from datencoder_jax.models.config import ConfigMixin, per_block
from datencoder_jax.models.edits import Ready
from datencoder_jax.models.layers import (
    GroupNorm,
    activation,
    conv1x1,
    conv3x3,
    linear,
    timestep_features,
    upsample_nearest,
)
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.typing import Added

SIZES = 6
"""Numbers that XL's UNet is told of a picture: original height and width, top and left of the crop, target height and
width."""


@dataclass(frozen=True)
class UNetConfig(ConfigMixin):
    """The options of `unet/config.json` that change the computation; names and defaults are diffusers'."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    _required: ClassVar = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "dual_cross_attention": (False, None),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1, 1.0),
        "attention_type": ("default",),
        "upcast_attention": (False, True, None),  # softmax is always in float32 here
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1, 1.0),
        "class_embeddings_concat": (False,),
        "addition_embed_type_num_heads": (64,),
        "reverse_transformer_layers_per_block": (None,),
        "dropout": (0, 0.0),
    }
    _choices: ClassVar = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }

    def heads(self, block: int) -> int:
        """Attention heads at resolution level `block`; diffusers' `attention_head_dim` *is* the number of heads."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return per_block(heads, len(self.block_out_channels))[block]

    def depth(self, block: int) -> int:
        """Transformer blocks per attention at resolution level `block`."""
        return per_block(self.transformer_layers_per_block, len(self.block_out_channels))[block]

    def __post_init__(self):
        if self.addition_embed_type and not (self.addition_time_embed_dim and self.pooled_width > 0):
            raise ValueError("its pooled text and sizes do not fit into projection_class_embeddings_input_dim")

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text of equation (2); 0 for a UNet that takes none."""
        total, each = self.projection_class_embeddings_input_dim, self.addition_time_embed_dim
        return (total or 0) - SIZES * (each or 0) if self.addition_embed_type else 0


class ResnetBlock2D(nnx.Module):
    """Two normed 3x3 convolutions with a residual; the time embedding is added in between."""

    def __init__(
        self, inputs: int, outputs: int, time_width: int | None, *, groups: int, epsilon: float, act: str, dtype, rngs
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(inputs, groups=groups, epsilon=epsilon, **common)
        self.conv1 = conv3x3(inputs, outputs, **common)
        self.time_emb_proj = linear(time_width, outputs, **common) if time_width else None
        self.norm2 = GroupNorm(outputs, groups=groups, epsilon=epsilon, **common)
        self.conv2 = conv3x3(outputs, outputs, **common)
        self.conv_shortcut = conv1x1(inputs, outputs, **common) if inputs != outputs else None
        self.act = activation(act)

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """`x [batch, h, w, inputs]`, activated time embedding `[batch, time_width]` -> `[batch, h, w, outputs]`."""
        h = self.conv1(self.norm1(x, self.act))
        if self.time_emb_proj is not None:
            assert time is not None, "this block takes a time embedding"
            h = h + self.time_emb_proj(time)[:, None, None, :]
        h = self.conv2(self.norm2(h, self.act))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """A 3x3 convolution of stride 2, zero-padded by one."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [batch, h, w, channels]` -> `[batch, h/2, w/2, channels]`."""
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [batch, h, w, channels]` -> `[batch, 2h, 2w, channels]`."""
        return self.conv(upsample_nearest(x))


class _Stage(nnx.Module):
    """What the down, mid and up blocks share: residual blocks, each followed by a transformer where there is one."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        widths: list[tuple[int, int]],
        *,
        attends: list[bool],
        path: str,
        dtype,
        rngs,
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List(
            ResnetBlock2D(
                inputs,
                outputs,
                4 * config.block_out_channels[0],
                groups=config.norm_num_groups,
                epsilon=config.norm_eps,
                act=config.act_fn,
                **common,
            )
            for inputs, outputs in widths
        )
        self.attentions = nnx.List(
            Transformer2DModel(
                outputs,
                config.cross_attention_dim,
                config.heads(level),
                depth=config.depth(level),
                groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                path=f"{path}.attentions.{i}",
                **common,
            )
            for i, ((_, outputs), attend) in enumerate(zip(widths, attends, strict=True))
            if attend
        )

    def run(self, index: int, h, time, context, *, remat: bool = False, **paths):
        """Residual block `index` and the transformer after it, if there is one."""
        resnet = self.resnets[index]
        h = (jax.checkpoint(resnet.__call__) if remat else resnet)(h, time)
        if index < len(self.attentions):
            h = self.attentions[index](h, context, remat=remat, **paths)
        return h


class _DownBlock(_Stage):
    def __init__(self, config, level, inputs, *, dtype, rngs):
        width, layers = config.block_out_channels[level], config.layers_per_block
        attend = config.down_block_types[level] == "CrossAttnDownBlock2D"
        widths = [(inputs if i == 0 else width, width) for i in range(layers)]
        path = f"down_blocks.{level}"
        super().__init__(config, level, widths, attends=[attend] * layers, path=path, dtype=dtype, rngs=rngs)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = nnx.List([] if last else [Downsample2D(width, dtype=dtype, rngs=rngs)])

    def __call__(self, h, time, context, **paths):
        """-> the output and the list of residuals for the up blocks."""
        residuals = []
        for i in range(len(self.resnets)):
            h = self.run(i, h, time, context, **paths)
            residuals.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            residuals.append(h)
        return h, residuals


class _MidBlock(_Stage):
    def __init__(self, config, *, dtype, rngs):
        level = len(config.block_out_channels) - 1
        width = config.block_out_channels[level]
        widths = [(width, width)] * 2
        super().__init__(config, level, widths, attends=[True, False], path="mid_block", dtype=dtype, rngs=rngs)

    def __call__(self, h, time, context, **paths):
        return self.run(1, self.run(0, h, time, context, **paths), time, context, **paths)


class _UpBlock(_Stage):
    def __init__(self, config, index, *, dtype, rngs):
        channels = config.block_out_channels[::-1]
        level = len(channels) - 1 - index
        width, previous, below = (
            channels[index],
            channels[max(index - 1, 0)],
            channels[min(index + 1, len(channels) - 1)],
        )
        layers = config.layers_per_block + 1
        attend = config.up_block_types[index] == "CrossAttnUpBlock2D"
        widths = [
            ((previous if i == 0 else width) + (below if i == layers - 1 else width), width) for i in range(layers)
        ]
        path = f"up_blocks.{index}"
        super().__init__(config, level, widths, attends=[attend] * layers, path=path, dtype=dtype, rngs=rngs)
        last = index == len(channels) - 1
        self.upsamplers = nnx.List([] if last else [Upsample2D(width, dtype=dtype, rngs=rngs)])

    def __call__(self, h, residuals, time, context, **paths):
        """Consumes its residuals from the end of the list."""
        for i in range(len(self.resnets)):
            h = self.run(i, jnp.concatenate([h, residuals.pop()], axis=-1), time, context, **paths)
        for upsample in self.upsamplers:
            h = upsample(h)
        return h


class TimestepEmbedding(nnx.Module):
    """Two linear layers on the sinusoidal timestep features."""

    def __init__(self, inputs: int, width: int, *, act: str, dtype, rngs: nnx.Rngs):
        self.linear_1 = linear(inputs, width, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(width, width, dtype=dtype, rngs=rngs)
        self.act, self.dtype = activation(act), dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [batch, inputs]` -> `[batch, width]`."""
        with exact_products(self.dtype):
            return self.linear_2(self.act(self.linear_1(x)))


class UNet2DConditionModel(nnx.Module):
    """The UNet; see the module docstring."""

    def __init__(self, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels
        self.config, self.dtype = config, dtype
        self.conv_in = conv3x3(config.in_channels, channels[0], **common)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], act=config.act_fn, **common)
        self.add_embedding = (
            TimestepEmbedding(
                config.projection_class_embeddings_input_dim or 0, 4 * channels[0], act=config.act_fn, **common
            )
            if config.addition_embed_type
            else None
        )
        self.down_blocks = nnx.List(
            _DownBlock(config, level, channels[max(level - 1, 0)], **common) for level in range(len(channels))
        )
        self.mid_block = _MidBlock(config, **common)
        self.up_blocks = nnx.List(_UpBlock(config, index, **common) for index in range(len(channels)))
        self.conv_norm_out = GroupNorm(channels[0], groups=config.norm_num_groups, epsilon=config.norm_eps, **common)
        self.conv_out = conv3x3(channels[0], config.out_channels, **common)
        self.act = activation(config.act_fn)

    def __call__(
        self,
        latents: jax.Array,
        t: jax.Array,
        context: jax.Array,
        *,
        added: Added | None = None,
        offsets: Mapping[str, Ready] | None = None,
        hard_context: jax.Array | None = None,
        key_context: jax.Array | None = None,
        pair: bool = False,
        blend: jax.Array | float = 1.0,
        remat: bool = False,
        scan_layers: bool = False,
        maps: Maps | None = None,
    ) -> jax.Array:
        """The model's prediction (noise or velocity, as it was trained).

        Args:
            latents: `[batch, h, w, in_channels]`, noisy.
            t: timesteps, `[batch]` or a scalar; whole numbers in training, and in between for some samplers.
            context: text states `[batch, l, cross_attention_dim]`, or one row for all samples; of the soft path when
                there are two.
            added: pooled text and sizes, for XL.
            offsets: edits of the soft path's attention projections, as `models.edits.ready` gives them.
            hard_context: text states of the hard path, likewise; None runs the soft one alone.
            key_context: what the soft path's keys are of in the place of `context`, of its shape.
            pair: the batch is two halves, and the second attends to the context as the first does.
            blend: weight of the soft path, a scalar or `[batch]`; has no effect without `hard_context`.
            remat: keep only the input of every layer for the backward pass, which computes the rest again.
            scan_layers: run the transformer blocks that follow one another as a loop over a stacked copy of their
                weights, which compiles several times faster where they are many (XL's are up to ten). Blocks whose maps
                are collected, or whose offsets differ in shape, run as without it.
            maps: collects attention maps, `[batch, queries, keys]` each, of the layers it names; those of two streams
                (`pair`) in one batch.

        Returns:
            `[batch, h, w, out_channels]` in float32.
        """
        others = {"hard_context": hard_context, "key_context": key_context}
        others = {name: None if x is None else x.astype(self.dtype) for name, x in others.items()}
        paths = {"offsets": offsets, **others, "pair": pair, "blend": blend, "maps": maps}
        paths |= {"remat": remat, "scan_layers": scan_layers}
        residuals, h, time, context = self._encode(latents, t, context, added, **paths)
        for block in self.up_blocks:
            h = block(h, residuals, time, context, **paths)
        return self.conv_out(self.conv_norm_out(h, self.act)).astype(jnp.float32)

    def features(
        self, latents: jax.Array, t: jax.Array, context: jax.Array, added: Added | None = None
    ) -> list[jax.Array]:
        """The encoder half alone: every down-block residual, `conv_in`'s first, then the mid block's output."""
        residuals, h, _, _ = self._encode(latents, t, context, added)
        return [*residuals, h]

    def _encode(self, latents, t, context, added, **paths):
        t = jnp.broadcast_to(jnp.asarray(t), latents.shape[:1])
        time = self.time_embedding(self._sinusoids(t, self.config.block_out_channels[0]))  # (1)
        if self.add_embedding is not None:
            time = time + self._added(added)  # (2)
        time = self.act(time)
        context = context.astype(self.dtype)
        h = self.conv_in(latents.astype(self.dtype))
        residuals = [h]
        for block in self.down_blocks:
            h, more = block(h, time, context, **paths)
            residuals += more
        return residuals, self.mid_block(h, time, context, **paths), time, context

    def _sinusoids(self, x: jax.Array, width: int) -> jax.Array:
        features = timestep_features(x, width, flip=self.config.flip_sin_to_cos, shift=self.config.freq_shift)
        return features.astype(self.dtype)

    def _added(self, added: Added | None) -> jax.Array:
        """The second term of equation (2)."""
        if added is None or self.add_embedding is None:
            raise ValueError("this UNet takes pooled text and sizes")
        sizes = self._sinusoids(added.sizes.reshape(-1), self.config.addition_time_embed_dim or 0)
        sizes = sizes.reshape(len(added.sizes), -1)
        return self.add_embedding(jnp.concatenate([added.pooled.astype(self.dtype), sizes], axis=-1))
