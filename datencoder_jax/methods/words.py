"""The methods without an encoder: the embeddings start at words of the vocabulary.

*Textual inversion* (Gal et al. 2022, arXiv 2208.01618) tunes the embeddings alone. *LoRA* (Hu et al. 2021, arXiv
2106.09685), as DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) is commonly run with it, keeps the words, a rare one
and perhaps the class word, and tunes low-rank offsets: `A` is random and `B` zero, so the product starts at zero and
yet has a gradient. Tuning both is the rival of the tuning-encoder that starts from nothing.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from datencoder_jax.pipeline import Base
from datencoder_jax.typing import LowRank, Offsets, Variables


def from_words(
    base: Base, word_ids: Sequence[int], shapes: Mapping[str, tuple[int, int]], rank: int, key: jax.Array
) -> Variables:
    """Variables that start at words of the vocabulary.

    Args:
        word_ids: token ids, such as the class word's; one vector for each.
        shapes: `(in, out)` of every projection that gets an offset, by module path; none for textual inversion.
        rank: of every offset.
    """
    offsets: Offsets = {}
    for index, (path, (inputs, outputs)) in enumerate(shapes.items()):
        down = jax.random.normal(jax.random.fold_in(key, index), (inputs, rank)) * inputs**-0.5
        offsets[path] = LowRank(down, jnp.zeros((rank, outputs)))
    return Variables(base.table[jnp.array(word_ids)].astype(jnp.float32), offsets)
