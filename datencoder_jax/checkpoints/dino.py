"""DINO's vision transformers from a folder or file, in the format of transformers or of the original code.

<folder>/config.json  model.safetensors  [preprocessor_config.json]      transformers: a ViTModel (facebook/dino-vits16)
<folder>/model.safetensors, or the file alone                            the names of facebookresearch/dino, and timm's

The original code keeps the queries', keys' and values' projections of a layer in one tensor `[3 width, width]`, and
its training checkpoints put `teacher.`, `module.` and `backbone.` before the names; where there is a teacher, it is
read. The shapes tell its configuration: all of DINO's transformers have heads of width 64, and norms' epsilon is 1e-6.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from datencoder_jax.checkpoints.hub import resolve_vision
from datencoder_jax.checkpoints.keys import Tensors
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import conversion_command, conversion_hint, is_pickle
from datencoder_jax.checkpoints.single_file_configs import count
from datencoder_jax.checkpoints.weights import describing, find_weights, opened, place, read_json
from datencoder_jax.errors import UserError
from datencoder_jax.models.dino import DINOConfig, DINOModel
from datencoder_jax.models.module import Model, abstract_params

_HEAD, _EPSILON = 64, 1e-6
_TEACHER = "teacher."
_WRAPPERS = re.compile(r"^(teacher\.)?(module\.)?(backbone\.)?")
_OWN_HEAD = ("head.mlp.", "head.last_layer.")
"""The projection head that DINO is trained with, which is no part of the transformer."""
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$")
_FUSED = "attn.qkv"
_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def read_dino(name: str | Path, *, dtype: str = "float32") -> tuple[Model, dict[str, Any] | None]:
    """A DINO transformer, its parameters stored as `dtype` on the default device, and how pictures enter it.

    Args:
        name: a folder, its `.safetensors` file, or a Hugging Face repository "owner/name".

    Returns:
        The `DINOModel`, and the content of `preprocessor_config.json`; None where there is none.

    Raises:
        UserError: there is no such model, its weights are pickled, or it is damaged, unsupported or no DINO.
    """
    _refuse_pickles(expand_user(name))
    path = resolve_vision(name)
    files, folder = ([path], path.parent) if path.is_file() else (find_weights(path), path)
    origin = str(files[0])
    with opened(files, origin) as tensors:
        found = _unwrapped(tensors)
        if "pos_embed" in found or any(key.startswith("blocks.") for key in found):
            with describing(files[0], "a DINO transformer"):
                config = _told_by_shapes(found)
            found = _renamed(found)
        else:
            config = _config(folder / "config.json")
        abstract = abstract_params(DINOModel, config)
        params = place(found, abstract, dtype=dtype, origin=origin)
    extractor = folder / "preprocessor_config.json"
    return Model(DINOModel, config, params), read_json(extractor) if extractor.is_file() else None


def _refuse_pickles(path: Path) -> None:
    if path.is_file() and is_pickle(path):
        raise UserError(
            f"{path} is a pickle, which can run code when read; convert it once with: {conversion_command(path)}."
        )
    inside = [file.name for file in sorted(path.iterdir())] if path.is_dir() else []
    pickles = [file for file in inside if is_pickle(Path(file))]
    if pickles and not any(".safetensors" in file for file in inside):
        raise UserError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when read; "
            f"{conversion_hint(str(path), 'transformers.ViTModel')}."
        )


def _unwrapped(tensors: Tensors) -> Tensors:
    """The transformer's tensors, without the wrappers' prefixes and what is not part of DINO's embedding."""
    readers = tensors.readers
    if any(key.startswith(_TEACHER) for key in readers):
        readers = {key: read for key, read in readers.items() if key.startswith(_TEACHER)}
    readers = {_WRAPPERS.sub("", key).removeprefix("vit."): read for key, read in readers.items()}
    return Tensors({key: read for key, read in readers.items() if not key.startswith((*_OWN_HEAD, "pooler."))})


def _told_by_shapes(tensors: Tensors) -> DINOConfig:
    """The configuration of a transformer under the original names."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    if width % _HEAD:
        raise ValueError(f"heads of width {_HEAD} do not divide a width of {width}")
    config = DINOConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=count(tensors, "blocks."),
        num_attention_heads=width // _HEAD,
        image_size=math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        layer_norm_eps=_EPSILON,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )
    abstract_params(DINOModel, config)  # what does not fit together shows when the module is made
    return config


def _renamed(tensors: Tensors) -> Tensors:
    """The original code's tensors under transformers' names; tensors that are not of a DINO keep theirs."""
    readers = {}
    for key, read in tensors.readers.items():
        if not (match := _BLOCK.match(key)):
            readers[_OUTSIDE.get(key, key)] = read
            continue
        number, layer, leaf = match.groups()
        path = f"encoder.layer.{number}"
        if layer == _FUSED:
            for i, part in enumerate(("query", "key", "value")):
                readers[f"{path}.attention.attention.{part}.{leaf}"] = lambda read=read, i=i: np.split(read(), 3)[i]
        else:
            readers[f"{path}.{_LAYER[layer]}.{leaf}" if layer in _LAYER else key] = read
    return Tensors(readers)


def _config(file: Path) -> DINOConfig:
    values = read_json(file)
    with describing(file, "a vision transformer"):
        if (kind := values.get("model_type")) != "vit":
            raise UserError(f"model_type {kind!r} is not supported; supported: vit")
        if missing := [name for name in _SIZES if name not in values]:
            raise KeyError(missing[0])
        config = DINOConfig.from_dict(values)
        abstract_params(DINOModel, config)
    return config
