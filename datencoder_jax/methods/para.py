"""PaRa (Chen et al. 2024, arXiv 2406.05641): directions are taken out of what the weights can give.

In the paper's layout, `W [out, in]`, every attention projection learns a matrix `B [out, r]` of low rank:

    Q R = B,    W' = W - Q Q' W                                                                     (1)

so nothing that the projection gives lies in the span of `B` any more (`models.edits`, equation (3)). It has half the
numbers of a LoRA of this rank. The words' vectors stay as they are.

`B` is random at the start, normal of variance 1 / out: `B = 0` has no `Q`, and no gradient. So `r` directions that
nobody chose are taken out before the first step, and tuning turns them to others. `Q` depends on the span of `B` alone,
not on its scale, which sets no more than how far a learning rate turns it: a step of `B` by `lr` turns its columns by
about `lr sqrt(out)`, and in the course of tuning by less, since a gradient that is orthogonal to `B` makes `B` longer.
Which projections, the start and the rates are our reading.

Concepts under one seed but other placeholders than `S*` start at directions of their own: the placeholder is folded
into the key. Two concepts of one start would go on removing nearly the same, and leave nothing for the second to do.
"""

import zlib

import jax

from datencoder_jax.methods.lora import words_of
from datencoder_jax.methods.method import RARE, TOKEN, Method, Setup
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.typing import LearningRates, Removed, Variables


def start(setup: Setup) -> Variables:
    """The words' vectors, and random directions."""
    base = setup.pipeline.base
    # The default placeholder is not folded in, so that its starts stay those of earlier versions.
    own_key = setup.key if setup.token == TOKEN else jax.random.fold_in(setup.key, zlib.crc32(setup.token.encode()))
    offsets = {}
    for index, (path, (_, outputs)) in enumerate(attention_shapes(base.unet).items()):
        key = jax.random.fold_in(own_key, index)
        rank = min(setup.rank, outputs)
        offsets[path] = Removed(jax.random.normal(key, (outputs, rank)) * outputs**-0.5)
    return Variables(words_of(setup), offsets)


METHOD = Method(
    300, LearningRates(embeddings=0.0, offsets=1e-2), start, word=RARE, options=frozenset({"rank", "prior"})
)
"""Steps and rates are ours."""
