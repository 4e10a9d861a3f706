"""What the tests of weights and of concept files share."""

from pathlib import Path

import numpy as np
import pytest

from datencoder_jax.errors import UserError
from datencoder_jax.typing import Concept, LowRank

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
