"""CLIP's towers by the names of OpenCLIP, as transformers names them.

OpenCLIP keeps the queries', keys' and values' projections of a layer in one tensor `[3 width, width]`, and the
projections into the space that text and pictures share the other way round, `[width, projection_dim]`.
"""

import re

import numpy as np

from datencoder_jax.checkpoints.keys import Tensors

_BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$")
_FUSED = "attn.in_proj"
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}


def text_tower(tensors: Tensors) -> Tensors:
    """OpenCLIP's text tower under transformers' names; tensors that are not of one keep theirs."""
    return _tower(tensors, "text_model", _TEXT, ("text_projection", "text_projection.weight"))


def vision_tower(tensors: Tensors) -> Tensors:
    """OpenCLIP's vision tower, its names without `visual.`, under transformers' names; others keep theirs."""
    return _tower(tensors, "vision_model", _VISION, ("proj", "visual_projection.weight"))


def _tower(tensors: Tensors, root: str, names: dict[str, str], projection: tuple[str, str]) -> Tensors:
    readers = {}
    for key, read in tensors.readers.items():
        if key == projection[0]:
            readers[projection[1]] = lambda read=read: read().T
        elif not (match := _BLOCK.match(key)):
            readers[names.get(key, key)] = read
        else:
            number, layer, leaf = match.groups()
            path = f"{root}.encoder.layers.{number}"
            if layer == _FUSED:
                for i, part in enumerate("qkv"):
                    readers[f"{path}.self_attn.{part}_proj.{leaf}"] = lambda read=read, i=i: _third(read(), i)
            else:
                readers[f"{path}.{_LAYER.get(layer, layer)}.{leaf}"] = read
    return Tensors(readers)


def _third(fused: np.ndarray, index: int) -> np.ndarray:
    width = len(fused) // 3
    return fused[index * width : (index + 1) * width]
