"""The metric in which Perfusion tells text states apart: the inverse of their uncentred covariance (arXiv 2305.01644).

    C = mean_p e_p e_p',      metric = (C + r tr(C) / d I)^-1                                       (1)

over the states `e_p [d]` at all positions of many prompts, as the edits are applied at all of them. The paper takes
100,000 captions of LAION; ours are templates with two words of the model's own vocabulary each, drawn once and for all
among its most frequent whole words, so that every base model has its own without any data. `r` makes the inverse exist
(ours): template prompts do not fill the space of a large text tower. `C` is summed on the device and inverted on the
host in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from datencoder_jax.base import Base
from datencoder_jax.compilation import Program
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.runtime.precision import exact_products

_FIRST, _SECOND = "@1", "@2"
TEMPLATES = (
    f"a photo of a {_FIRST} {_SECOND}",
    f"a photo of a {_FIRST} on the {_SECOND}",
    f"a photo of a {_FIRST} in the {_SECOND}",
    f"a {_FIRST} with a {_SECOND}",
    f"a painting of a {_FIRST} and a {_SECOND}",
    f"the {_FIRST} near a {_SECOND} at night",
    f"two {_FIRST} in the snow, {_SECOND}",
    f"a pencil sketch of a {_FIRST} wearing a {_SECOND}",
    f"{_FIRST} {_SECOND}",
    f"a small red {_FIRST} on the beach, {_SECOND}",
    f"the {_SECOND} of my {_FIRST}",
    f"a {_FIRST} from a {_SECOND} in the city",
)
"""What the words stand in."""

PROMPTS = 2048
"""Prompts that `C` is the covariance of."""
_BATCH = 128
_FREQUENT = 8192
"""Whole words that are drawn from: CLIP's vocabulary has the frequent ones first."""
_RIDGE = 1e-3
"""`r` of equation (1)."""

_last: tuple[Any, Any, np.ndarray] | None = None


def text_metric(pipeline: Pipeline, *, quiet: bool = False) -> np.ndarray:
    """Equation (1) for a base model, `[d, d]` float32; computed once for the text towers that were last asked for."""
    global _last
    towers = pipeline.base.text, pipeline.base.text_2  # a LoRA may have changed them and not the fingerprint
    if _last is None or any(old is not new for old, new in zip(_last, towers, strict=False)):
        _last = (*towers, inverse(covariance(pipeline, quiet=quiet)))
    return _last[2]


def covariance(pipeline: Pipeline, *, quiet: bool = False) -> np.ndarray:
    """`C` of equation (1), `[d, d]` float64."""
    ids, texts = prompt_ids(pipeline), pipeline.base.only("text", "text_2")
    batches = tqdm(range(0, len(ids), _BATCH), desc="text states", unit_scale=_BATCH, unit="prompt", disable=quiet)
    sums = [np.asarray(_moment(texts, ids[k : k + _BATCH], quiet=quiet), np.float64) for k in batches]
    return np.mean(sums, axis=0)


def prompt_ids(pipeline: Pipeline) -> np.ndarray:
    """Token ids of the prompts, int32 `[PROMPTS, length]`; the same for the same vocabulary."""
    pipeline.base.require_words("the metric of text states")
    tokenizer, draws = pipeline.tokenizer, np.random.default_rng(0)
    first = tokenizer.vocab_size
    templates = tokenizer.encode(TEMPLATES, {_FIRST: 1, _SECOND: 1})[np.arange(PROMPTS) % len(TEMPLATES)]
    words = draws.choice(np.flatnonzero(pipeline.base.words)[:_FREQUENT], (2, PROMPTS, 1))
    return np.where(templates == first, words[0], np.where(templates == first + 1, words[1], templates)).astype(
        np.int32
    )


def inverse(moment: np.ndarray) -> np.ndarray:
    """Equation (1) from `C`, float32."""
    ridge = _RIDGE * np.trace(moment) / len(moment)
    return np.linalg.inv(moment + ridge * np.eye(len(moment))).astype(np.float32)


def _sum(base: Base, ids: jax.Array) -> jax.Array:
    states = base.condition(ids).context.astype(jnp.float32)
    with exact_products():
        product = jnp.einsum("pli,plj->ij", states, states)
    return product / (states.shape[0] * states.shape[1])


_moment = Program("text covariance", _sum)

PROGRAMS = (_moment,)
"""The programs of `text_metric`."""
