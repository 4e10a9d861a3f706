"""E4T: an encoder of one domain and weight offsets shared by it, both tuned on the picture (arXiv 2302.12228).

    v*(z_t, t) = v_domain + 0.1 E(I, z_t, t)               anew for every noisy latent              (1)
    L          = |unet(z_t, t; W + dW, v*) - target|^2 + lambda |0.1 E|^2 / rho^2                    (2)
    E, dW     <- E, dW - lr adam(grad L)                    5 to 15 steps on the one picture          (3)

`E` and `dW` come from pretraining on the domain (`training.e4t`), where (2) is the loss too. At sampling (1) is
repeated at every step (`encoder.reading`); the negative prompt, where it holds the placeholder, reads `v_domain`.

From the paper: (1) with its 0.1, offsets of q, k, v of self- and cross-attention, one path, lambda = 0.01, the number
of steps. Ours: offsets that add and are of low rank (`encoder.domain_encoder`), the penalty in units of `rho`, the mean
norm of words, `E` looking through the UNet without `dW`, the learning rates, and one prompt and 8 draws of crops and
flips a step, as for every method here. An implementation by others (mkshing/e4t-diffusion, for Stable Diffusion) tunes
for 15 steps of 16 draws under many prompts with AdamW at 5e-6.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from datencoder_jax.encoder.domain_encoder import encoder_of, offsets_of
from datencoder_jax.errors import UserError
from datencoder_jax.methods import datencoder
from datencoder_jax.methods.method import Method, Setup, embeddings_of
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.typing import LearningRates, Reader, Variables

NORM_WEIGHT = 0.01
"""`lambda` of equation (2)."""


def domain_word(pipeline: Pipeline, word: str) -> int:
    """The token of the word that stands for a domain.

    Raises:
        UserError: it is not one token, or has no embedding.
    """
    token = pipeline.tokenizer.word_id(word)
    if not np.asarray(embeddings_of(pipeline.base, [token])).any():
        raise UserError(f"{word!r} means nothing to this model; name the domain by a word that it knows")
    return token


def start(setup: Setup) -> Variables:
    """The word of the domain, the shared offsets, and the encoder with what it sees of the pictures."""
    pipeline, base = setup.pipeline, setup.pipeline.base
    assert pipeline.domain is not None
    config, params = pipeline.domain.config, pipeline.domain.params
    word = embeddings_of(base, [domain_word(pipeline, config.domain)])
    see, _, read, _ = datencoder.IN_PARTS
    seen = see(base.only("vision"), setup.pictures, patch_taps=config.patch_taps, quiet=setup.quiet)
    empty = read(base.only("text", "text_2"), jnp.asarray(pipeline.tokenizer.encode([""])), quiet=setup.quiet)
    reader = Reader(
        encoder_of(config, params),
        *(x.astype(jnp.float32) for x in (seen.classes, seen.patches, empty.context)),
        pooled=None if empty.pooled is None else empty.pooled.astype(jnp.float32),
        scale=jnp.full(len(word), config.scale, jnp.float32),
    )
    return Variables(word, offsets_of(config, params), reader=reader)


def rates_of(variables: Variables, rates: LearningRates, class_tokens: int = 1) -> Variables:
    """The rate of the embeddings is that of the encoder; their starting point stays, as does what it sees."""
    still: Any = 0.0
    reader = Reader(rates.embeddings, still, still, still, still, still)
    return Variables(still, rates.offsets, 0.0, reader)  # type: ignore[arg-type]


METHOD = Method(
    15,
    LearningRates(embeddings=1e-4, offsets=1e-3),
    start,
    encoder="domain",
    norm_weight=NORM_WEIGHT,
    rates_of=rates_of,
    exports=("card",),
)
