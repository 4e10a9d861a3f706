"""Custom Diffusion (Kumari et al. 2022, arXiv 2212.04488): the keys and values of cross-attention, and a modifier.

Text enters the UNet through two matrices of every cross-attention layer, and these alone learn

    dW_k = D_k,  dW_v = D_v,    D = 0 at the start                                                  (1)

together with the vector of a modifier before the class word, `S* = [V, class]`: `V` starts at a rare word and is
tuned, the class word stays as it is. With `prior` the model goes on drawing its class as before (equation (1) of
`tuning`); the paper's prior pictures are photographs with similar captions, ours are the model's own. Where the word is
a class word alone, `V` starts at `method.with_modifier`'s.
"""

from datencoder_jax.methods.method import Method, Setup, modifiers_alone, with_modifier, zero_edits
from datencoder_jax.typing import LearningRates, Variables

PROJECTIONS = ("attn2.to_k", "attn2.to_v")
"""Where text enters."""


def start(setup: Setup) -> Variables:
    """The vectors of the modifier and of the class word, and offsets that are zero."""
    base = setup.pipeline.base
    return Variables(with_modifier(base, setup.word_ids, setup.class_tokens), zero_edits(base, PROJECTIONS))


def rates_of(variables: Variables, rates: LearningRates, class_tokens: int = 1) -> Variables:
    """The class word, the last of the vectors, is not tuned."""
    modifiers = modifiers_alone(rates.embeddings, len(variables.embeddings), class_tokens)
    return Variables(modifiers, rates.offsets, 0.0)  # type: ignore[arg-type]


METHOD = Method(
    250,
    LearningRates(embeddings=1e-3, offsets=1e-3),
    start,
    word="thing",
    options=frozenset({"prior"}),
    rates_of=rates_of,
)
"""The steps are the paper's, for a batch of 8 as ours is; the rates are ours, for the embedded model."""
