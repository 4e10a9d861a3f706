"""The names of tensors in a checkpoint of one file, as diffusers and transformers name them.

The UNet's blocks are numbered through, `input_blocks.<n>` and `output_blocks.<n>`: with `L` residual blocks per level,
down level `l` is `n = 1 + l (L + 1) ..` with the downsampler last, and up level `l` is `n = l (L + 1) ..` with the
upsampler in its last entry. The VAE's decoder numbers its levels from the pictures' side.
"""

import re
from collections.abc import Callable, Collection

from datencoder_jax.checkpoints.keys import Tensors

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.1": "mid_block.attentions.0",
}
_NUMBER = "(0|[1-9][0-9]{0,3})"
"""The number of a block, as programs write it; other digits, zeros before it or thousands of digits are other names."""
_BLOCK = re.compile(rf"^(input_blocks|output_blocks)\.{_NUMBER}\.([012])\.(.+)$")
_MIDDLE = re.compile(r"^middle_block\.(0|2)\.(.+)$")
_DOWNSAMPLER = re.compile(r"^input_blocks\.([1-9][0-9]{0,3})\.0\.op\.")

_VAE_RULES = [
    (re.compile(rf"^(encoder|decoder)\.{before}"), rf"\1.{after}")
    for before, after in (
        (r"mid\.block_1\.", "mid_block.resnets.0."),
        (r"mid\.block_2\.", "mid_block.resnets.1."),
        (r"mid\.attn_1\.", "mid_block.attentions.0."),
        (r"norm_out\.", "conv_norm_out."),
        (rf"down\.{_NUMBER}\.block\.{_NUMBER}\.", r"down_blocks.\2.resnets.\3."),
        (rf"down\.{_NUMBER}\.downsample\.", r"down_blocks.\2.downsamplers.0."),
        (rf"up\.{_NUMBER}\.block\.{_NUMBER}\.", r"up_blocks.\2.resnets.\3."),
        (rf"up\.{_NUMBER}\.upsample\.", r"up_blocks.\2.upsamplers.0."),
    )
]
_UP = re.compile(rf"^decoder\.up\.{_NUMBER}\.")
_UP_LEVEL = re.compile(rf"^decoder\.up_blocks\.{_NUMBER}\.")
_LAYER = re.compile(rf"^text_model\.encoder\.layers\.{_NUMBER}\.")
_PROJECTION = "text_projection.weight"
_DEPTHS = {768: 12, 1024: 24, 1280: 32}
"""Layers of text towers by width: those of CLIP's ViT-L/14 and of OpenCLIP's ViT-H/14 and ViT-bigG/14."""


def unet_names(keys: Collection[str]) -> Callable[[str], str]:
    """The renaming of a UNet's tensors, of which `keys` are all; an unknown one keeps its name."""
    downsamplers = [int(match[1]) for match in map(_DOWNSAMPLER.match, keys) if match]
    entries = min(downsamplers, default=len(keys))  # of one level: its residual blocks and the downsampler

    def rename(key: str) -> str:
        for before, after in _OUTSIDE.items():
            if key.startswith(f"{before}."):
                return after + key.removeprefix(before)
        if match := _MIDDLE.match(key):
            return f"mid_block.resnets.{int(match[1]) // 2}.{_resnet(match[2])}"
        if not (match := _BLOCK.match(key)):
            return key
        is_down, place, layer, rest = match[1] == "input_blocks", int(match[2]), int(match[3]), match[4]
        path = "down_blocks" if is_down else "up_blocks"
        level, index = divmod(place - 1 if is_down else place, entries)
        is_last = index == entries - 1
        if rest.startswith("op.") and is_down and is_last and layer == 0:
            return f"{path}.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if rest.startswith("conv.") and not is_down and is_last and layer:
            return f"{path}.{level}.upsamplers.0.{rest}"
        if layer == 0:
            return f"{path}.{level}.resnets.{index}.{_resnet(rest)}"
        return f"{path}.{level}.attentions.{index}.{rest}" if layer == 1 else key

    return rename


def _resnet(rest: str) -> str:
    layer, _, leaf = rest.rpartition(".")
    return f"{_RESNET.get(layer, layer)}.{leaf}"


def vae_names(keys: Collection[str]) -> Callable[[str], str]:
    """The renaming of a VAE's tensors, of which `keys` are all; an unknown one keeps its name."""
    last = max((int(match[1]) for match in map(_UP.match, keys) if match), default=0)

    def rename(key: str) -> str:
        for before, after in _VAE_RULES:
            key = before.sub(after, key)
        key = _UP_LEVEL.sub(lambda match: f"decoder.up_blocks.{last - int(match[1])}.", key)
        return key.replace(".nin_shortcut.", ".conv_shortcut.")

    return rename


def text_name(key: str) -> str:
    """A tensor of CLIP's text tower: some files leave out the first part of the name."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def without_last_layer(tower: Tensors) -> Tensors:
    """Stable Diffusion 2's text tower: its UNet attends to the states before the last layer, and nothing is projected.

    The layers are counted, since files differ: some hold all of them, some lack the last one, and either kind may hold
    the projection or not. A tower of no known width counts as whole where it holds the projection.
    """
    numbers = {key: int(match[1]) for key in tower if (match := _LAYER.match(key))}
    depth = text_depth(tower)
    if depth is None:
        depth = max(numbers.values(), default=-1) + (1 if _PROJECTION in tower else 2)
    readers = {key: read for key, read in tower.readers.items() if numbers.get(key, -1) < depth - 1}
    readers.pop(_PROJECTION, None)
    return Tensors(readers)


def text_depth(tower: Tensors) -> int | None:
    """How many layers the whole text tower of this width has; None where no published model has the width."""
    norm = "text_model.final_layer_norm.bias"
    return _DEPTHS.get(len(tower[norm])) if norm in tower else None
