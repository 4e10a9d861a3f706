"""A base model so small that its programs compile in seconds, with weights drawn by numpy, and an encoder for it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.checkpoints.folders import BaseParts, write_base
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import Base, Pipeline, read_pipeline
from datencoder_jax.toyworld.tokenizer import MAX_LENGTH, write_tokenizer
from datencoder_jax.training.encoder_stage import encoder_config

SIDE = 16
"""Pixels along the side of a picture; latents have half as many."""

UNET = UNetConfig(
    sample_size=SIDE // 2,
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)
VAE = VAEConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, sample_size=SIDE, scaling_factor=1.0)
VISION = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    projection_dim=12,
    image_size=SIDE,
    patch_size=8,
    with_projection=True,
)
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}


def random_params(kind: type, config, seed: int) -> dict[str, np.ndarray]:
    """Weights that keep signals near unit scale; compiling the initializers would take most of the tests' time."""
    rng, params = np.random.default_rng(seed), {}
    for name, abstract in abstract_params(kind, config).items():
        noise = rng.standard_normal(abstract.shape, dtype=np.float32)
        if name.endswith("embedding.weight"):
            params[name] = 0.3 * noise
        elif len(abstract.shape) > 1:
            params[name] = noise / np.prod(abstract.shape[:-1], dtype=np.float32) ** 0.5
        else:
            params[name] = 0.1 * noise + np.float32(name.endswith("weight"))
    return params


def random_model(kind: type, config, seed: int) -> Model:
    return Model(kind, config, jax.device_put(random_params(kind, config, seed)))


def write_tiny_base(folder: Path) -> Path:
    """Writes the base model as a diffusers folder."""
    write_tokenizer(folder / "words")
    words = len(json.loads((folder / "words" / "vocab.json").read_text(encoding="utf-8")))
    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=words - 1,
    )
    parts = BaseParts(
        unet=random_model(UNet2DConditionModel, UNET, 0),
        vae=random_model(AutoencoderKL, VAE, 1),
        text_encoder=random_model(CLIPTextModel, text, 2),
        image_encoder=random_model(CLIPVisionModel, VISION, 3),
        scheduler=SCHEDULER,
        tokenizer=folder / "words",
    )
    write_base(folder / "base", parts, dtype="float32")
    return folder / "base"


def tiny_pipeline(folder: Path) -> Pipeline:
    """The base model of `write_tiny_base` with an encoder whose every weight is random: its offsets do something."""
    pipeline = read_pipeline(folder, "tiny")
    config = encoder_config(pipeline, rank=2, width=8, depth=1, heads=2)
    return replace(pipeline, encoder=random_model(TuningEncoder, config, 9))


def in_half_precision(base: Base) -> Base:
    """What `read_pipeline(dtype="bfloat16")` makes of it."""
    cast = {name: getattr(base, name).cast("bfloat16", "bfloat16") for name in ("unet", "vae", "text", "vision")}
    return replace(base, **cast)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Smooth uint8 pictures `[count, SIDE, SIDE, 3]`."""
    small = np.random.default_rng(seed).uniform(0, 255, (count, 4, 4, 3)).astype(np.float32)
    return np.asarray(jnp.round(jax.image.resize(small, (count, SIDE, SIDE, 3), "linear"))).astype(np.uint8)
