"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) of the attention layers: their weights are tuned as a whole.

The concept is a rare word and the class word, whose vectors stay as they are, and every attention projection learns

    dW = D,    D = 0 at the start                                                                   (1)

with all its numbers, so this is what offsets of a lower rank are measured against. With `prior` the model goes on
drawing its class as before (equation (1) of `tuning`), which the paper introduced. The paper tunes the whole UNet;
the attention layers alone are our reading, so that a concept file can hold it. Where the word is a class word alone, a
modifier that stands for no word comes before it (`method.with_modifier`).
"""

from datencoder_jax.methods.method import Method, Setup, with_modifier, zero_edits
from datencoder_jax.typing import LearningRates, Variables

_PROJECTIONS = [f"attn{layer}.to_{name}" for layer in (1, 2) for name in ("q", "k", "v", "out.0")]


def start(setup: Setup) -> Variables:
    """The words' vectors, and offsets that are zero."""
    base = setup.pipeline.base
    return Variables(with_modifier(base, setup.word_ids, setup.class_tokens), zero_edits(base, _PROJECTIONS))


METHOD = Method(300, LearningRates(embeddings=0.0, offsets=3e-4), start, word="thing", options=frozenset({"prior"}))
"""Steps and rates are ours, for the embedded model; with a rate of 1e-3 some 50 steps do."""
