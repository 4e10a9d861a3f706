"""A base model so small that its programs compile in seconds, with weights drawn by numpy, and an encoder for it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.checkpoints.folders import BaseParts, write_base
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import Pipeline, read_pipeline
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


def write_tiny_xl(folder: Path) -> Path:
    """Writes a tiny Stable Diffusion XL that diffusers made, with the configurations XL is shipped with otherwise."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    words = len(json.loads((folder / "words" / "vocab.json").read_text(encoding="utf-8")))
    text = {
        "vocab_size": words,
        "max_position_embeddings": MAX_LENGTH,
        "num_hidden_layers": 2,
        "initializer_factor": 2.0,
    }
    text |= {"num_attention_heads": 2, "intermediate_size": 16, "bos_token_id": 0}
    first = transformers.CLIPTextConfig(**text, hidden_size=12, projection_dim=12, eos_token_id=words - 1)
    second = transformers.CLIPTextConfig(
        **text, hidden_size=8, projection_dim=10, eos_token_id=2, pad_token_id=1, hidden_act="gelu"
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        layers_per_block=1,
        cross_attention_dim=20,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        **blocks,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=SIDE,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(first),
        text_encoder_2=transformers.CLIPTextModelWithProjection(second),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "words", pad_token="!"),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder / "base")
    return folder / "base"


def write_tiny_vision(folder: Path) -> Path:
    """Writes a tiny vision tower as transformers saves it."""
    import transformers

    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**options, projection_dim=12, image_size=SIDE, patch_size=8)
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    return folder
