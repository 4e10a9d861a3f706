"""The rival without an encoder: `v*` starts at a word, the offsets at zero, and both are tuned.

This is LoRA (Hu et al. 2021) with a textual-inversion embedding. `A` is random and `B` zero, so the product starts at
zero and yet has a gradient.
"""

import jax
import jax.numpy as jnp

from datencoder_jax.pipeline import Base
from datencoder_jax.typing import LowRank, Variables


def from_word(base: Base, word_id: int, shapes: dict[str, tuple[int, int]], rank: int, key: jax.Array) -> Variables:
    """Variables that start at a word of the vocabulary.

    Args:
        word_id: a token id, such as the class word's.
        shapes: `(in, out)` of every projection by module path.
        rank: of every offset.
    """
    offsets = {}
    for index, (path, (inputs, outputs)) in enumerate(shapes.items()):
        down = jax.random.normal(jax.random.fold_in(key, index), (inputs, rank)) * inputs**-0.5
        offsets[path] = LowRank(down, jnp.zeros((rank, outputs)))
    return Variables(base.table[jnp.array([word_id])].astype(jnp.float32), offsets)
