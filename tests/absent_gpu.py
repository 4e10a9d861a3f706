"""As much of an H100 as tracing a program for one needs, and a model whose attention is cuDNN's there.

JAX refuses as it traces what cuDNN's kernels, or their rules, cannot do; neither needs a GPU.
"""

import copy
from dataclasses import replace

from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tiny import UNET, random_model

from datencoder_jax.encoder.domain_encoder import DomainEncoder
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.models.clip_text import CLIPTextModel
from datencoder_jax.models.unet import UNet2DConditionModel
from datencoder_jax.training.encoder_stage import domain_config, encoder_config


class Hopper:
    """A device."""

    platform, compute_capability, device_kind = "gpu", "9.0", "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return None


def allow_cudnn(monkeypatch):
    """Has JAX trace cuDNN's attention where there is no cuDNN."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


def with_fused_attention(plain):
    """A tiny pipeline with 8 channels a head, which cuDNN takes, and an odd number of tokens, as CLIP's 77."""
    sizes = {"rank": 2, "width": 8, "depth": 1, "heads": 2}
    unet = random_model(UNet2DConditionModel, replace(UNET, block_out_channels=(16,)), 0)
    text = random_model(CLIPTextModel, replace(plain.base.text.config, max_position_embeddings=31), 2)
    tokenizer = copy.copy(plain.tokenizer)
    tokenizer.length = 31
    pipeline = replace(plain, base=replace(plain.base, unet=unet, text=text), tokenizer=tokenizer)
    return replace(
        pipeline,
        encoder=random_model(TuningEncoder, encoder_config(pipeline, **sizes), 9),
        domain=random_model(DomainEncoder, domain_config(pipeline, "robot", **sizes), 5),
    )
