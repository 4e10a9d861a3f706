"""Which layer of a model a tensor of a LoRA file belongs to.

Programs name the layers after the model's own modules, each in its way, so no layer is listed here: a file's name and
the model's are brought to one spelling and compared.

    network           prefix in files
    UNet              `unet.`, `lora_unet_`, `diffusion_model.`, `base_model.model.`, or none
    text_encoder      `text_encoder.`, `lora_te_`, `lora_te1_`, `text_encoders.clip_l.transformer.` (of 2.x `clip_h`),
                      and `base_model.model.` where no UNet's layer is meant
    text_encoder_2    `text_encoder_2.`, `lora_te2_`, `text_encoders.clip_g.transformer.`

PEFT's prefix may also stand after that of a network (`unet.base_model.model.`). kohya's programs write underscores for
dots. They name the blocks of XL's UNet as its original code does (`input_blocks_4_1_transformer_blocks_0_attn1_to_q`),
and ComfyUI names those of every UNet so; transformers has put `text_model.` before a text encoder's layers
and left it out; old files of diffusers say `processor`, and `to_q` for a text encoder's `q_proj`.
"""

import re
from collections.abc import Callable, Iterable

from datencoder_jax.checkpoints.single_file_names import unet_names

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name of the one network that it saved."""

NETWORKS: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2")
"""What a LoRA may change."""

TEXT_ENCODER, TEXT_ENCODER_2 = "text_encoder.", "text_encoder_2."
"""What stands before the names of the text encoders' layers; nothing stands before those of the UNet."""

_OF_UNET = ("unet.", "lora_unet_", "diffusion_model.", "model.diffusion_model.")
_OF_TEXT = (
    TEXT_ENCODER,
    "lora_te_",
    "lora_te1_",
    "text_encoders.clip_l.",
    "text_encoders.clip_h.",
    "clip_l.",
    "clip_h.",
)
_OF_TEXT_2 = (TEXT_ENCODER_2, "lora_te2_", "text_encoders.clip_g.", "clip_g.")
_PREFIXES: dict[str, str] = dict.fromkeys(_OF_UNET, "")
_PREFIXES |= dict.fromkeys(_OF_TEXT, TEXT_ENCODER) | dict.fromkeys(_OF_TEXT_2, TEXT_ENCODER_2)
_COMFY_TOWER = "transformer."
"""What ComfyUI puts between the name of a text encoder and that of a layer."""

_SPELLINGS = [
    (re.compile(r"\."), "_"),
    (re.compile(r"_processor_"), "_"),
    (re.compile(r"(^|_)text_model_"), r"\1"),
    (re.compile(r"_to_out_0$"), "_to_out"),
    (re.compile(r"_self_attn_to_(q|k|v|out)$"), r"_self_attn_\1_proj"),
]
_LEVEL = re.compile(r"down_blocks\.\d+\.(?:attentions|resnets)\.(\d+)\.")
_NUMBER = re.compile(r"(?<=[0-9])_|_(?=[0-9])")


def split(layer: str) -> tuple[str, str]:
    """A layer's network, one of `NETWORKS`, and its path in there."""
    for prefix in (TEXT_ENCODER, TEXT_ENCODER_2):
        if layer.startswith(prefix):
            return prefix.rstrip("."), layer.removeprefix(prefix)
    return "unet", layer


def layer_finder(layers: Iterable[str]) -> Callable[[str], str | None]:
    """The function from a layer's name in a file to its name among `layers`, None where they have no such layer."""
    layers = list(layers)
    spelled = {_spelling(layer): layer for layer in layers}
    blocks = 1 + max((int(match[1]) for match in map(_LEVEL.match, layers) if match), default=0)
    # The downsampler comes after the residual blocks of the first level and the convolution that latents enter by.
    rename = unet_names([f"input_blocks.{blocks + 1}.0.op.weight"])

    def find(stem: str) -> str | None:
        network, name = _own_prefix(stem)
        original = rename(_NUMBER.sub(".", name) + ".weight").removesuffix(".weight")
        candidates = map(_spelling, (name, original, TEXT_ENCODER + name))
        matches = (spelled[candidate] for candidate in candidates if candidate in spelled)
        return next((layer for layer in matches if network in (None, split(layer)[0])), None)

    return find


def _own_prefix(stem: str) -> tuple[str | None, str]:
    """The network that a file's name says, None where it says none, and the name with our prefix of that network."""
    stem = stem.removeprefix(PEFT_PREFIX)
    prefix = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), None)
    if prefix is None:
        return None, stem
    own, layer = _PREFIXES[prefix], stem.removeprefix(prefix).removeprefix(PEFT_PREFIX)
    return own.rstrip(".") or "unet", own + (layer.removeprefix(_COMFY_TOWER) if own else layer)


def _spelling(name: str) -> str:
    """The spelling that names are compared in."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name
