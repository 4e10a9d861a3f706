"""What the tests of weights, of base models and of concept files share."""

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.typing import Concept, LowRank

BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
    **BLOCKS,
)
VAE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
TOWER = {"intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 12}
VISION = dict(**TOWER, hidden_size=8, image_size=16, patch_size=8)

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"


def concept(**changes):
    rng = np.random.default_rng(0)
    down = rng.normal(size=(2, 8)).astype("f4").T  # a strided view, which the safetensors writer would scramble
    values = {
        "embeddings": rng.normal(size=(12, 2)).astype("f4").T,
        "offsets": {PATH: LowRank(down, rng.normal(size=(2, 6)).astype("f4"))},
        "token": "S*",
        "blend": 0.3,
        "base": "toyworld",
        "fingerprint": "f" * 32,
        "nearest_word": "gömböc",
        "metadata": {"steps": "5", "picture": "a b.png"},
    }
    return Concept(**values | changes)


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(wanted[name]), err_msg=name)


def nothing_left(folder):
    return not [path for path in Path(folder).rglob("*") if path.name.startswith(".tmp")]


def refuses(match, call, *args, **kwargs):
    with pytest.raises(UserError, match=match) as info:
        call(*args, **kwargs)
    assert "\n" not in str(info.value) and str(info.value).endswith(".")
    return str(info.value)


def random_model(kind, config, seed):
    """Parameters drawn by numpy: compiling the initializers of this many shapes would take most of the tests' time."""
    rng = np.random.default_rng(seed)
    params = {name: 0.1 * rng.normal(size=x.shape).astype("f4") for name, x in abstract_params(kind, config).items()}
    return Model(kind, config, jax.device_put(params))


def models_of(parts):
    """The models among the parts of a base model, by component."""
    return {name: getattr(parts, name) for name in COMPONENTS if getattr(parts, name) is not None}


DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "I64": 8,
    "C64": 8,
    "F4": 1,
}
"""Types of safetensors, with the bytes that a value takes here."""


def packed(header, data):
    """The content of a safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
