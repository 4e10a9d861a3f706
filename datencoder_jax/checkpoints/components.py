"""What the folders of a pipeline hold: which class reads each, and what other programs want to find in it."""

from typing import Any, NamedTuple

from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig

DIFFUSERS_VERSION = "0.42.1"
"""The version whose folder format is written; newer ones read it."""


class Component(NamedTuple):
    """One folder of a pipeline.

    Attributes:
        kind, config_class: the module and its configuration.
        weights: the name of its weights file, without `.safetensors`.
    """

    kind: type
    config_class: type
    weights: str


COMPONENTS = {
    "unet": Component(UNet2DConditionModel, UNetConfig, "diffusion_pytorch_model"),
    "vae": Component(AutoencoderKL, VAEConfig, "diffusion_pytorch_model"),
    "text_encoder": Component(CLIPTextModel, CLIPTextConfig, "model"),
    "text_encoder_2": Component(CLIPTextModel, CLIPTextConfig, "model"),
    "image_encoder": Component(CLIPVisionModel, CLIPVisionConfig, "model"),
}


def of_kind(kind: type) -> Component:
    """The first component that `kind` is."""
    return next(component for component in COMPONENTS.values() if component.kind is kind)


def config_json(kind: type, config: Any) -> dict[str, Any]:
    """The content of `config.json` for stock diffusers and transformers: the options and what identifies the class."""
    values = config.to_dict()
    if kind in (UNet2DConditionModel, AutoencoderKL):
        head = {"_class_name": kind.__name__, "_diffusers_version": DIFFUSERS_VERSION}
        if kind is AutoencoderKL:  # diffusers' default is a single block, so the lists are needed
            levels = len(config.block_out_channels)
            values["down_block_types"] = ["DownEncoderBlock2D"] * levels
            values["up_block_types"] = ["UpDecoderBlock2D"] * levels
        return head | values
    projects = values.pop("with_projection")
    architecture = kind.__name__ + ("WithProjection" if projects else "")
    head = {"architectures": [architecture]}
    if kind is CLIPTextModel:
        # transformers' defaults for the other special ids may lie outside a small vocabulary
        last = config.vocab_size - 1
        return head | {"model_type": "clip_text_model", "bos_token_id": last - 1, "pad_token_id": last} | values
    return head | {"model_type": "clip_vision_model"} | values
