"""Array aliases and the small pytrees that travel between rooms, each defined once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

AnyArray = jax.Array | np.ndarray
"""An array on the device or on the host: a compiled program takes either."""

Images = Float[Array, "batch height width 3"]

Params = dict[str, jax.Array]
"""A model's parameters under their Hugging Face names, in Flax layouts."""


class Condition(NamedTuple):
    """What the UNet is told of prompts.

    Attributes:
        context: text states `[batch, l, d]`, what it attends to.
        pooled: `[batch, p]`, what XL is told of a prompt as a whole; None for other models.
        slots: int32 `[batch, l]`, which of the concept's vectors stands at each position; below 0 for none.
    """

    context: jax.Array
    pooled: jax.Array | None = None
    slots: jax.Array | None = None


class Added(NamedTuple):
    """What the UNet of Stable Diffusion XL is told beside the context.

    Attributes:
        pooled: pooled text `[batch, p]`.
        sizes: `[batch, 6]` in pixels: original height and width, top and left of the crop, target height and width.
    """

    pooled: jax.Array
    sizes: jax.Array


class LowRank(NamedTuple):
    """A low-rank weight offset `dW = down @ up` of one linear projection.

    Attributes:
        down: `[in, rank]`, or `[batch, in, rank]` when every sample has its own offset.
        up: `[rank, out]`, or `[batch, rank, out]`.
    """

    down: AnyArray
    up: AnyArray


class Dense(NamedTuple):
    """A weight offset of one linear projection as a whole, `weight [in, out]`."""

    weight: AnyArray


class Removed(NamedTuple):
    """What a linear projection can no longer give: the span of the columns of `directions [out, rank]`."""

    directions: AnyArray


class SequentialRemoval(NamedTuple):
    """What a linear projection can no longer give, where several concepts remove something, one after the other.

    Attributes:
        directions: of the concepts in their order, `[out, rank]` each.
        kept: a change that the weights hold and that nothing is removed from: that of LoRAs of other programs. None for
            none.
    """

    directions: tuple[AnyArray, ...]
    kept: LowRank | None = None


class Gated(NamedTuple):
    """What a projection gives where the context points along a concept: `output [k, out]`, one for each of k concepts.

    `Gate` says where that is.
    """

    output: AnyArray


class Residual(NamedTuple):
    """What a projection's output gains where a concept's vector stands: `residual [n, out]`, one for each vector."""

    residual: AnyArray


class Gate(NamedTuple):
    """Where the gated edits of k concepts are open; `models.edits` has the equations.

    Attributes:
        direction: `i`, text states that stand for the concepts, `[k, d]`.
        dual: `i C^-1` with the uncentred covariance `C` of text states, `[k, d]`.
        bias, temperature: `beta` and `tau`, `[k]`.
    """

    direction: AnyArray
    dual: AnyArray
    bias: AnyArray
    temperature: AnyArray


Edit = LowRank | Dense | Removed | SequentialRemoval | Gated | Residual
"""A change of one linear projection; `models.edits` says what each does."""

Offsets = Mapping[str, Edit]
"""Edits by module path (`...transformer_blocks.0.attn1.to_q`); projections that are not named have none."""


class Reader(NamedTuple):
    """An encoder that predicts a concept's embedding anew for every noisy latent; `encoder.reading` has the equations.

    Attributes:
        encoder: a `models.module.Model` of a `TuningEncoder` that predicts nothing but an embedding.
        classes, patches: what its vision tower says of the concept's pictures, `[pictures, taps, vision width]` and
            `[pictures, patches, vision width]`; with an axis before these, one set of pictures per latent.
        context, pooled: the empty prompt as the UNet is told of it, `[1, l, d]` and `[1, p]`; `pooled` for XL alone.
        scale: `[n]`, how much of the prediction each of the concept's vectors gains.
    """

    encoder: Any
    classes: AnyArray
    patches: AnyArray
    context: AnyArray
    pooled: AnyArray | None
    scale: AnyArray


AND = " and a "
"""Between the placeholders of a concept that has several."""


@dataclass(frozen=True, eq=False)
class Concept:
    """A personalized concept: what turns the placeholder token of a prompt into one particular thing.

    Attributes:
        embeddings: `[n, d]` float32, the token vectors that the placeholder stands for; of a base model with two text
            towers, the vectors for both, side by side.
        offsets: weight offsets of the UNet's attention, unbatched.
        token: the placeholder as it is written in prompts, such as `S*`; several of one picture have blanks between,
            and share the vectors equally.
        blend: weight of the soft path in dual-path sampling; 1 means the soft path alone.
        base: the name of the base model the concept was made for, for people.
        fingerprint: the identity of that base model's weights (`checkpoints.identity.base_fingerprint`).
        nearest_word: what the hard path's prompt holds: the class word it was made from or, without one, the word
            nearest to the embedding that tuning started from; for several placeholders one each.
        metadata: how it was made (steps, seed, rank, versions, picture ...), for people.
        gate: where its gated edits are open; None where it has none.
        reader: what adds to its embeddings at every denoising step; None where they stay as they are.
    """

    embeddings: AnyArray
    offsets: Offsets
    token: str
    blend: float
    base: str
    fingerprint: str
    nearest_word: str
    metadata: dict[str, str] = field(default_factory=dict)
    gate: Gate | None = None
    reader: Reader | None = None

    def __repr__(self) -> str:
        count, width = self.embeddings.shape
        return (
            f"Concept({self.token!r} for {self.base}, near {self.nearest_word!r}: {count} x {width} embeddings, "
            f"{len(self.offsets)} weight offsets, blend {self.blend:g})"
        )

    @property
    def placeholders(self) -> dict[str, int]:
        """How many vectors each placeholder stands for."""
        tokens = self.token.split()
        return dict.fromkeys(tokens, len(self.embeddings) // len(tokens))

    @property
    def words(self) -> dict[str, str]:
        """What stands in each placeholder's place on the hard path."""
        tokens = self.token.split()
        words = [self.nearest_word] if len(tokens) == 1 else self.nearest_word.split()
        return dict(zip(tokens, words, strict=True))

    @property
    def subject(self) -> str:
        """All placeholders as a part of a prompt: "S*", or "S1* and a S2*"."""
        return AND.join(self.token.split())


class Features(NamedTuple):
    """What the tuning-encoder sees of a picture; see `encoder.features`.

    Attributes:
        classes: class-token states `[batch, taps, vision width]`.
        patches: patch states `[batch, layers * patches, vision width]`.
        denoiser: pooled UNet features `[batch, n]`.
        t: the timestep the UNet features were taken at, `[batch]`.
        projected: the picture in the space that CLIP's towers share, `[batch, p]`; None where it is not known.
    """

    classes: jax.Array
    patches: jax.Array
    denoiser: jax.Array
    t: jax.Array
    projected: jax.Array | None = None


class Variables(NamedTuple):
    """What is tuned, and what the tuning-encoder predicts of it: `v*` and the weight offsets.

    Attributes:
        embeddings: `[n, d]`, or `[batch, n, d]` when there is one set per sample.
        offsets: edits of the attention's projections; low-rank ones may be batched alike.
        gate: of gated edits.
        reader: what adds to the embeddings for every noisy latent.
    """

    embeddings: jax.Array
    offsets: Offsets
    gate: Gate | None = None
    reader: Reader | None = None


class LearningRates(NamedTuple):
    """Of tuning, one for each part of `Variables`; zero freezes a part."""

    embeddings: float | jax.Array
    offsets: float | jax.Array
