"""What the tests of files for other programs share: a concept of the tiny base model and that model in diffusers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datencoder_jax.checkpoints.export import Target
from datencoder_jax.pipeline import Pipeline, attention_shapes
from datencoder_jax.toyworld.tokenizer import MAX_LENGTH, write_tokenizer
from datencoder_jax.typing import Concept, LowRank

TARGET = Target(widths=(12,), resolution=16)


def draw_offsets(shapes, seed=0, ranks=(2,)):
    """Offsets large enough to change a picture visibly; projections take turns in rank."""
    rng, offsets = np.random.default_rng(seed), {}
    for index, (path, (inputs, outputs)) in enumerate(shapes.items()):
        rank = ranks[index % len(ranks)]
        down = rng.standard_normal((rank, inputs), dtype=np.float32).T / np.float32(inputs**0.5)
        offsets[path] = LowRank(down, 0.3 * rng.standard_normal((rank, outputs), dtype=np.float32))
    return offsets


def tiny_concept(pipeline: Pipeline, vectors=2, **changes) -> Concept:
    rng = np.random.default_rng(1)
    concept = Concept(
        embeddings=0.3 * rng.standard_normal((vectors, sum(pipeline.base.widths)), dtype=np.float32),
        offsets=draw_offsets(attention_shapes(pipeline.base.unet)),
        token="S*",
        blend=0.3,
        base="tiny",
        fingerprint=pipeline.fingerprint,
        nearest_word="cat",
        metadata={"steps": "12"},
    )
    return replace(concept, **changes)


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def write_tiny_xl(folder: Path) -> Path:
    """Writes a tiny Stable Diffusion XL with random weights, as diffusers saves it."""
    import transformers
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    words = len(json.loads((folder / "words" / "vocab.json").read_text(encoding="utf-8")))
    text = {"vocab_size": words, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": MAX_LENGTH, "bos_token_id": words - 2, "eos_token_id": words - 1}
    text |= {"projection_dim": 16, "initializer_factor": 5.0}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        cross_attention_dim=28,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    torch.nn.init.normal_(unet.conv_out.weight, std=0.03)  # keeps denoising near unit scale
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, sample_size=16, **blocks)
    config = transformers.CLIPTextConfig
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config(**text, hidden_size=12)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(config(**text, hidden_size=16)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "words", pad_token="snow</w>"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder / "base")
    return folder / "base"
