"""The configurations of a checkpoint of one file, as far as the shapes of its tensors tell them.

All functions take tensors under public names, in PyTorch's layouts. A tensor that is not there is a `KeyError`.
"""

import re
from collections.abc import Collection

from datencoder_jax.checkpoints.keys import Tensors
from datencoder_jax.models.clip_text import TOKEN_TABLE, CLIPTextConfig
from datencoder_jax.models.unet import UNetConfig
from datencoder_jax.models.vae import VAEConfig

_HEAD = 64
"""Width of an attention head, in text towers and in the UNets of 2.x and XL; those of 1.x have eight heads."""


def unet_config(tensors: Tensors, sample_size: int) -> UNetConfig:
    """Of a UNet that was trained on latents of `sample_size` along each side."""
    levels = range(count(tensors, "down_blocks."))
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels]
    widths = tuple(len(tensors[f"down_blocks.{i}.resnets.0.conv1.bias"]) for i in levels)
    depths = tuple(
        count(tensors, f"{'mid_block' if i == levels[-1] else f'down_blocks.{i}'}.attentions.0.transformer_blocks.")
        or 1
        for i in levels
    )
    linear = tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2
    kinds = {True: "CrossAttn{}Block2D", False: "{}Block2D"}
    added = {}
    if "add_embedding.linear_1.weight" in tensors:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": tensors["add_embedding.linear_1.weight"].shape[1],
        }
    return UNetConfig(
        sample_size=sample_size,
        in_channels=tensors["conv_in.weight"].shape[1],
        out_channels=len(tensors["conv_out.bias"]),
        down_block_types=tuple(kinds[there].format("Down") for there in attends),
        up_block_types=tuple(kinds[there].format("Up") for there in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=count(tensors, "down_blocks.0.resnets."),
        attention_head_dim=tuple(width // _HEAD for width in widths) if linear else 8,
        transformer_layers_per_block=depths,
        cross_attention_dim=tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        use_linear_projection=linear,
        **added,
    )


def vae_config(tensors: Tensors, sample_size: int, scaling_factor: float) -> VAEConfig:
    """Of a VAE that was trained on pictures of `sample_size` pixels along each side."""
    levels = range(count(tensors, "encoder.down_blocks."))
    return VAEConfig(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=len(tensors["decoder.conv_out.bias"]),
        block_out_channels=tuple(len(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.bias"]) for i in levels),
        layers_per_block=count(tensors, "encoder.down_blocks.0.resnets."),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        sample_size=sample_size,
        scaling_factor=scaling_factor,
    )


def text_config(tensors: Tensors, hidden_act: str) -> CLIPTextConfig:
    """Of a text tower; its end-of-text token is the last of the table, as in CLIP's vocabulary."""
    rows, width = tensors[TOKEN_TABLE].shape
    projection = "text_projection.weight"
    return CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=len(tensors["text_model.encoder.layers.0.mlp.fc1.bias"]),
        projection_dim=len(tensors[projection]) if projection in tensors else width,
        num_hidden_layers=count(tensors, "text_model.encoder.layers."),
        num_attention_heads=width // _HEAD,
        max_position_embeddings=len(tensors["text_model.embeddings.position_embedding.weight"]),
        hidden_act=hidden_act,
        eos_token_id=rows - 1,
        with_projection=projection in tensors,
    )


def count(keys: Collection[str], prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, keys) if match})
