"""Infusion (Zeng et al. 2024, arXiv 2404.14007): what the values of cross-attention gain where the concept stands.

The prompt holds the class word, and the model runs twice in one batch, as it is and with the concept. Of a text state
`c_p` at position p, cross-attention layer l of the second stream has

    v_p = c_p W_v + r_l   where the concept stands,    v_p = c_p W_v   elsewhere,    r_l = 0 at the start     (1)

and attends as the first stream does: `softmax(q k^T)` is the first's, so layout is the model's own (`models.attention`,
equation (5)). Self-attention is each stream's own. `r_l` alone are tuned; the concept's vectors are the class word's
and stay so: both streams read one prompt. Without residuals the second stream is the first.

With every layer (`layers=all`, as in the code that the authors published) these are 12,480 numbers in Stable Diffusion
1.5, 50 KB. The paper says 11 KB. The layers of the decoder's last two levels have 2,880, which are 11.5 KB; whether
those are the paper's is our guess, offered as `layers=last`. The published code takes the queries of both streams from
the one with the concept; ours are the plain stream's, since the maps are to be the model's own. For its mask of the
object in the loss there is the option `focus` (`methods.focus`), which is off.
"""

import functools

import jax.numpy as jnp

from datencoder_jax.methods.method import Method, Setup, embeddings_of
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.typing import LearningRates, Residual, Variables

_LAST = 2
"""Levels of the decoder that `layers=last` has."""


def start(setup: Setup, layers: str = "all") -> Variables:
    """The class word's vectors, and residuals that are zero."""
    base, count = setup.pipeline.base, len(setup.word_ids)
    offsets = {}
    for path, (_, outputs) in attention_shapes(base.unet).items():
        if path.endswith(".attn2.to_v") and (layers == "all" or _is_last(path, len(base.unet.config.up_block_types))):
            offsets[path] = Residual(jnp.zeros((count, outputs)))
    return Variables(embeddings_of(base, setup.word_ids), offsets)


def _is_last(path: str, levels: int) -> bool:
    parts = path.split(".")
    return parts[0] == "up_blocks" and int(parts[1]) >= levels - _LAST


def rates_of(variables: Variables, rates: LearningRates, class_tokens: int = 1) -> Variables:
    """The residuals alone."""
    return Variables(0.0, rates.offsets, 0.0)  # type: ignore[arg-type]


def _variant(layers: str) -> Method:
    return Method(
        500,
        LearningRates(embeddings=0.0, offsets=1e-2),
        functools.partial(start, layers=layers),
        word="thing",
        rates_of=rates_of,
        norm_weight=0.0,
        exports=("card",),
        defaults={"layers": ("all", "last")},
        variant=_variant,
    )


METHOD = _variant("all")
"""Steps and rate are those of the published code."""
