"""DisenDiff (Zhang et al. 2024, arXiv 2403.18551): several concepts of one picture, kept apart by their attention.

The concepts are placeholders of one concept file, `S_i* = [V_i, class_i]`, and the picture is learnt under
"a photo of a S1* and a S2*". As in Custom Diffusion the modifiers `V_i` and, in every cross-attention layer,

    dW_k = D_k,  dW_v = D_v,    D = 0 at the start                                                  (1)

are tuned. Nothing in that says which part of the picture is whose, so the loss has another term on the maps of
cross-attention (`objectives.calibration`): each modifier looks where its class word looks, and class words look at
different places. The modifiers start at `method.with_modifier`'s vector, and the maps are those of the layers nearest
to 16 pixels a side (ours; the authors' code has rare words, and layers of exactly 16).
"""

from dataclasses import replace

import jax.numpy as jnp

from datencoder_jax.errors import UserError
from datencoder_jax.methods.custom_diffusion import PROJECTIONS
from datencoder_jax.methods.method import Method, Setup, modifiers_alone, with_modifier, zero_edits
from datencoder_jax.typing import LearningRates, Variables


def start(setup: Setup) -> Variables:
    """A modifier and a class word for each of the words, `[2 k, d]`, and offsets that are zero."""
    base = setup.pipeline.base
    pairs = [with_modifier(base, [word]) for word in setup.word_ids]
    return Variables(jnp.concatenate(pairs), zero_edits(base, PROJECTIONS))


def rates_of(variables: Variables, rates: LearningRates, class_tokens: int = 1) -> Variables:
    """The class words are not tuned."""
    count = len(variables.embeddings)
    modifiers = modifiers_alone(rates.embeddings, count, concepts=count // 2)
    return Variables(modifiers, rates.offsets, 0.0)  # type: ignore[arg-type]


def variant(calibration: float = 0.01) -> Method:
    """The method with another weight of its loss on attention maps; 0 for none."""
    if calibration < 0.0:
        raise UserError(f"option calibration of disendiff is {calibration:g}, not a number of 0 or more")
    return replace(METHOD, calibration=calibration or None)


METHOD = Method(
    250,
    LearningRates(embeddings=1e-3, offsets=1e-3),
    start,
    word="thing",
    rates_of=rates_of,
    several=True,
    calibration=0.01,
    defaults={"calibration": 0.01},
    variant=variant,
)
"""The steps and the weight of calibration are those of the authors' code, the rates ours.

On the embedded model, whose maps have 8 pixels a side, calibration made no difference that could be told from noise.
"""
