"""Base models as shapes: the sizes of Stable Diffusion 1.5, 2.1 and XL, or of any diffusers folder; nothing is read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from datencoder_jax.base import Base
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.encoder.domain_encoder import DomainEncoder
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.memory import Memory
from datencoder_jax.methods import METHODS
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.plan.dry_run import hollow_pipeline, tokenizer_folders
from datencoder_jax.runtime.target import Target
from datencoder_jax.training.encoder_stage import abstract_config, abstract_domain_config

_TEXT_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
_TEXT_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
_TEXT_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
    with_projection=True,
)
_UNETS = {
    "1.5": UNetConfig(),
    "2.1": UNetConfig(
        sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    ),
    "XL": UNetConfig(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
_TEXTS = {"1.5": (_TEXT_L,), "2.1": (_TEXT_H,), "XL": (_TEXT_L, _TEXT_G)}
_VAE = VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
_VIT_H = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
    with_projection=True,
)
_SCHEDULE = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)

VERSIONS = tuple(_UNETS)
"""Versions of Stable Diffusion that can be planned."""

ENCODER = {"rank": 4, "width": 768, "depth": 4, "heads": 12}
"""Sizes of the tuning-encoders that the recipes for Stable Diffusion pretrain."""


def stable_diffusion(version: str, dtype: str, target: Target | None = None, *, vision: bool = False) -> Base:
    """Stable Diffusion of one of `VERSIONS`, stored in `dtype` (XL's VAE computes in float32).

    Args:
        target: the device, which may compute in another type (`Target.compute_dtype`); None for one that does not.
        vision: whether with OpenCLIP's ViT-H/14 as its vision tower.
    """
    prediction = "v_prediction" if version == "2.1" else "epsilon"
    schedule = replace(_SCHEDULE, prediction_type=prediction)
    vision_config = _VIT_H if vision else None
    return _base(dtype, target, _UNETS[version], _VAE, _TEXTS[version], vision_config, schedule)


def tuning_encoder(base: Base, sizes: Mapping[str, Any] = ENCODER) -> Model:
    """A tuning-encoder for a base model with a vision tower, in float32, with the sizes that a recipe gives it."""
    config = abstract_config(base, **sizes)
    params: Any = abstract_params(TuningEncoder, config)
    return Model(TuningEncoder, config, params)


def domain_encoder(base: Base, domain: str, sizes: Mapping[str, Any] = ENCODER) -> Model:
    """E4T's encoder of a domain for a base model with a vision tower, in float32."""
    config = abstract_domain_config(base, domain, **sizes)
    params: Any = abstract_params(DomainEncoder, config)
    return Model(DomainEncoder, config, params)


def pipeline_of_version(version: str, method: str, memory: Memory, target: Target) -> Pipeline:
    """Stable Diffusion of one of `VERSIONS` in bfloat16, with the encoder that a method needs, of hollow arrays."""
    kind = METHODS[method].encoder
    base, encoder = stable_diffusion(version, "bfloat16", target, vision=kind is not None), None
    if kind is not None:
        encoder = tuning_encoder(base) if kind == "encoder" else domain_encoder(base, "face")
    return hollow_pipeline(base, tokenizer_folders(base), memory, name=f"Stable Diffusion {version}", encoder=encoder)


def base_of_folder(path: Path, dtype: str, target: Target | None = None) -> Base:
    """A base model with the sizes that a diffusers folder's configurations say; other arguments as above."""

    def config(name: str, kind: Any) -> Any:
        return kind.from_dict(json.loads((path / name).read_text("utf-8")))

    second, eyes = path / "text_encoder_2" / "config.json", path / "image_encoder" / "config.json"
    texts = [config("text_encoder/config.json", CLIPTextConfig)]
    texts += [config("text_encoder_2/config.json", CLIPTextConfig)] if second.is_file() else []
    vision = config("image_encoder/config.json", CLIPVisionConfig) if eyes.is_file() else None
    unet, vae = config("unet/config.json", UNetConfig), config("vae/config.json", VAEConfig)
    return _base(dtype, target, unet, vae, texts, vision, config("scheduler/scheduler_config.json", ScheduleConfig))


def _base(
    dtype: str, target: Target | None, unet: Any, vae: Any, texts: Any, vision: Any, schedule: ScheduleConfig
) -> Base:
    compute_dtype = dtype if target is None else target.compute_dtype(dtype)

    def model(kind: type, config: Any, compute: str = compute_dtype) -> Any:
        shapes = abstract_params(kind, config).items()
        return Model(kind, config, {name: _shape(x.shape, jnp.dtype(dtype)) for name, x in shapes}, compute)

    first, *others = texts
    return Base(
        unet=model(UNet2DConditionModel, unet),
        vae=model(AutoencoderKL, vae, "float32" if others else compute_dtype),
        text=model(CLIPTextModel, first),
        text_2=model(CLIPTextModel, others[0]) if others else None,
        vision=vision and model(CLIPVisionModel, vision),
        words=_shape((first.vocab_size,), jnp.bool_),
        word_norm=_shape((), jnp.float32),
        pixel_mean=_shape((3,), jnp.float32),
        pixel_std=_shape((3,), jnp.float32),
        schedule=schedule,
    )


_shape: Any = jax.ShapeDtypeStruct
