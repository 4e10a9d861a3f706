"""Several concepts in one picture: their vectors side by side, their weight offsets summed.

With concepts `k` of offsets `A_k B_k` and weights `w_k`, every projection gets

    dW = sum_k w_k A_k B_k = [A_1, A_2, ...] [w_1 B_1; w_2 B_2; ...]                                (1)

so a sum of low-rank offsets is one low-rank offset, of the sum of the ranks. An embedding from elsewhere is a
concept without offsets; a LoRA from elsewhere is none, it is merged into the base model's weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from datencoder_jax.errors import UserError
from datencoder_jax.typing import Concept, LowRank, Offsets, Variables


class Composition(NamedTuple):
    """What sampling needs of one or several concepts.

    Attributes:
        variables: all vectors `[n, d]`, in the placeholders' order, and the summed offsets; None without a concept.
        placeholders: how many vectors each stands for.
        words: what stands in each placeholder's place on the hard path.
        blend: of the soft path: the mean over the concepts with offsets, or over all where none has any.
    """

    variables: Variables | None
    placeholders: dict[str, int]
    words: dict[str, str]
    blend: float


def compose(concepts: Sequence[Concept], weights: Sequence[float] | None = None) -> Composition:
    """Concepts, each with a weight of its offsets (1 where none is given), as one.

    Raises:
        UserError: two concepts share a placeholder, or weights are not finite numbers, one for each concept.
    """
    weights = [1.0] * len(concepts) if weights is None else list(weights)
    if len(weights) != len(concepts):
        raise UserError(f"{len(concepts)} concepts need as many weights, not {len(weights)}")
    if not np.isfinite(weights).all():
        raise UserError(f"the weights of concepts must be finite numbers, not {weights}")
    placeholders, words = {}, {}
    for concept in concepts:
        if concept.token in placeholders:
            raise UserError(
                f"two concepts share the placeholder {concept.token!r}; personalize one of them with another --token"
            )
        placeholders[concept.token] = len(concept.embeddings)
        words[concept.token] = concept.nearest_word
    blends = [concept.blend for concept in concepts if concept.offsets] or [concept.blend for concept in concepts]
    embeddings = np.concatenate([np.asarray(concept.embeddings, np.float32) for concept in concepts])
    return Composition(
        Variables(jnp.asarray(embeddings), _summed([concept.offsets for concept in concepts], weights)),
        placeholders,
        words,
        float(np.mean(blends)),
    )


def _summed(offsets: Sequence[Offsets], weights: Sequence[float]) -> Offsets:
    """Equation (1)."""
    total = {}
    for path in dict.fromkeys(path for each in offsets for path in each):
        present = [(each[path], np.float32(w)) for each, w in zip(offsets, weights, strict=True) if path in each]
        down = np.concatenate([np.asarray(offset.down, np.float32) for offset, _ in present], axis=1)
        up = np.concatenate([weight * np.asarray(offset.up, np.float32) for offset, weight in present])
        total[path] = LowRank(jnp.asarray(down), jnp.asarray(up))
    return total
