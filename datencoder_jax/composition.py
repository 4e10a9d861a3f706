"""Several concepts in one picture: their vectors side by side, their weight offsets summed.

With concepts `k` of offsets `A_k B_k` and weights `w_k`, every projection gets

    dW = sum_k w_k A_k B_k = [A_1, A_2, ...] [w_1 B_1; w_2 B_2; ...]                                (1)

so a sum of low-rank offsets is one low-rank offset, of the sum of the ranks. Dense ones are added. What concepts remove
is removed one after the other, in their order (`models.edits`, equation (3)). Gated ones stand side by side (equation
(4) there), and so do residuals, which belong to their vectors. The embeddings of one concept may be predicted at every
step (`encoder.reading`). An embedding from elsewhere is a concept without offsets; a LoRA from elsewhere is none, it is
merged into the base model's weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.errors import UserError
from datencoder_jax.typing import (
    Concept,
    Dense,
    Edit,
    Gate,
    Gated,
    LowRank,
    Offsets,
    Reader,
    Removed,
    Residual,
    SequentialRemoval,
    Variables,
)


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
        UserError: two concepts share a placeholder, or have a reader, or weights are not finite numbers, one for each
            concept, or one is given to a concept without offsets.
    """
    weights = [1.0] * len(concepts) if weights is None else list(weights)
    if len(weights) != len(concepts):
        raise UserError(f"{len(concepts)} concepts need as many weights, not {len(weights)}")
    with np.errstate(over="ignore"):
        narrow = np.asarray(weights, np.float32)  # as they are applied
    if not np.isfinite(narrow).all():
        raise UserError(f"the weights of concepts must be finite numbers, not {weights}")
    placeholders, words = {}, {}
    for concept, weight in zip(concepts, weights, strict=True):
        if weight != 1.0 and not concept.offsets:
            raise UserError(
                f"{concept.token!r} has no weight offsets that a weight of {weight:g} could apply to; leave it at 1"
            )
        for token in concept.placeholders.keys() & placeholders.keys():
            raise UserError(
                f"two concepts share the placeholder {token!r}; personalize one of them with another --token"
            )
        placeholders |= concept.placeholders
        words |= concept.words
    blends = [concept.blend for concept in concepts if concept.offsets] or [concept.blend for concept in concepts]
    embeddings = np.concatenate([np.asarray(concept.embeddings, np.float32) for concept in concepts])
    return Composition(
        Variables(jnp.asarray(embeddings), _summed(concepts, weights), _gates(concepts), _reader(concepts)),
        placeholders,
        words,
        float(np.mean(blends)),
    )


def _summed(concepts: Sequence[Concept], weights: Sequence[float]) -> Offsets:
    """The edits of all concepts."""
    total = {}
    for path in dict.fromkeys(path for concept in concepts for path in concept.offsets):
        present = [
            (concept.offsets[path], np.float32(w))
            for concept, w in zip(concepts, weights, strict=True)
            if path in concept.offsets
        ]
        kind = type(present[0][0])
        if any(type(edit) is not kind for edit, _ in present):
            raise UserError(
                "these concepts change the same weights in ways that cannot be joined; combine concepts of one method"
            )
        if kind is Residual:
            # One row for every vector of the composition, so that rows and vectors go on belonging together.
            present = [
                (concept.offsets.get(path, Residual(np.zeros(_nothing_at(concept, present)))), np.float32(w))
                for concept, w in zip(concepts, weights, strict=True)
            ]
        if kind is Gated and len(present) < sum(concept.gate is not None for concept in concepts):
            raise UserError("these concepts lock their keys in different ways; personalize them with the same lock")
        total[path] = jax.tree.map(jnp.asarray, _JOIN[kind](present))
    return total


def _nothing_at(concept: Concept, present: Sequence[tuple[Any, np.float32]]) -> tuple[int, int]:
    return len(concept.embeddings), np.shape(present[0][0].residual)[1]


def _low_rank(present: Sequence[tuple[LowRank, np.float32]]) -> LowRank:
    """Equation (1)."""
    down = np.concatenate([np.asarray(edit.down, np.float32) for edit, _ in present], axis=1)
    up = np.concatenate([weight * np.asarray(edit.up, np.float32) for edit, weight in present])
    return LowRank(down, up)


def _dense(present: Sequence[tuple[Dense, np.float32]]) -> Dense:
    return Dense(np.sum([weight * np.asarray(edit.weight, np.float32) for edit, weight in present], axis=0))


def _removed(present: Sequence[tuple[Removed, np.float32]]) -> Removed | SequentialRemoval:
    if any(weight not in (0.0, 1.0) for _, weight in present):
        raise UserError("what a concept removes from the weights cannot be removed in part; give it the weight 0 or 1")
    kept = [np.asarray(edit.directions, np.float32) for edit, weight in present if weight]
    if len(kept) > 1:
        return SequentialRemoval(tuple(kept))
    return Removed(kept[0] if kept else np.zeros((len(present[0][0].directions), 0), np.float32))


def _gated(present: Sequence[tuple[Gated, np.float32]]) -> Gated:
    if any(weight != 1.0 for _, weight in present):
        raise UserError("a gated concept has no weight: it is stronger or weaker with another gate (--gate)")
    return Gated(np.concatenate([np.asarray(edit.output, np.float32) for edit, _ in present]))


def _residual(present: Sequence[tuple[Residual, np.float32]]) -> Residual:
    return Residual(np.concatenate([weight * np.asarray(edit.residual, np.float32) for edit, weight in present]))


_JOIN: dict[type, Callable[[Any], Edit]] = {
    LowRank: _low_rank,
    Dense: _dense,
    Removed: _removed,
    Gated: _gated,
    Residual: _residual,
}


def remove_before_loras(offsets: Offsets, loras: Mapping[str, LowRank]) -> Offsets:
    """The edits with what they remove taken from the weights without LoRAs of other programs.

    Args:
        offsets: edits by module path.
        loras: the changes that these LoRAs made to the weights, by module path.
    """

    def one(path: str, edit: Edit) -> Edit:
        if path not in loras or not isinstance(edit, Removed | SequentialRemoval):
            return edit
        directions = (edit.directions,) if isinstance(edit, Removed) else edit.directions
        return SequentialRemoval(directions, jax.tree.map(jnp.asarray, loras[path]))

    return {path: one(path, edit) for path, edit in offsets.items()}


def without_loras(offsets: Offsets) -> Offsets:
    """The edits of one concept that `remove_before_loras` was given."""
    return {
        path: Removed(edit.directions[0]) if isinstance(edit, SequentialRemoval) else edit
        for path, edit in offsets.items()
    }


def _gates(concepts: Sequence[Concept]) -> Gate | None:
    """The gates of all concepts as one."""
    gates = [concept.gate for concept in concepts if concept.gate is not None]
    return jax.tree.map(lambda *each: jnp.concatenate([jnp.asarray(x) for x in each]), *gates) if gates else None


def _reader(concepts: Sequence[Concept]) -> Reader | None:
    """The reader that one of the concepts has, for the vectors of that concept alone."""
    readers = [concept.reader for concept in concepts if concept.reader is not None]
    if not readers:
        return None
    if len(readers) > 1:
        raise UserError(
            "the embeddings of these concepts are predicted at every step, each by an encoder of its own, which works "
            "for one concept at a time; generate with one of them"
        )
    scales = [np.zeros(len(each.embeddings)) if each.reader is None else each.reader.scale for each in concepts]
    return jax.tree.map(jnp.asarray, readers[0]._replace(scale=np.concatenate(scales).astype(np.float32)))
