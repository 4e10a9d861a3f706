"""LoRA, as DreamBooth is commonly run with it (arXiv 2106.09685, arXiv 2208.12242).

The embeddings stay those of their words, a rare one and perhaps the class word, and every attention projection learns

    dW = A B,    A random, B = 0 at the start                                                       (1)

so the product starts at zero and yet has a gradient. Tuning both the words and the offsets, with the learning rate of
the embeddings above 0, is the rival of the tuning-encoder that starts from nothing. With `prior` the model goes on
drawing its class as before (equation (1) of `tuning`); a class word alone, which would stand for both, then has a
modifier before it (`method.with_modifier`).
"""

import jax
import jax.numpy as jnp

from datencoder_jax.base import Base
from datencoder_jax.methods.method import RARE, Method, Setup, embeddings_of, with_modifier
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.typing import LearningRates, LowRank, Variables


def start(setup: Setup) -> Variables:
    """The words' vectors, and offsets that are zero."""
    base = setup.pipeline.base
    return Variables(words_of(setup), zero_offsets(base, setup.rank, setup.key))


def words_of(setup: Setup) -> jax.Array:
    """Vectors that stay as they are; what the class is drawn as must not have them all, where it is preserved."""
    base, ids = setup.pipeline.base, setup.word_ids
    return with_modifier(base, ids, setup.class_tokens) if setup.prior else embeddings_of(base, ids)


def zero_offsets(base: Base, rank: int, key: jax.Array) -> dict[str, LowRank]:
    """Equation (1) for every attention projection."""
    offsets = {}
    for index, (path, (inputs, outputs)) in enumerate(attention_shapes(base.unet).items()):
        down = jax.random.normal(jax.random.fold_in(key, index), (inputs, rank)) * inputs**-0.5
        offsets[path] = LowRank(down, jnp.zeros((rank, outputs)))
    return offsets


METHOD = Method(
    200, LearningRates(embeddings=0.0, offsets=1e-3), start, word=RARE, options=frozenset({"rank", "prior"})
)
"""Steps and rates are ours."""
