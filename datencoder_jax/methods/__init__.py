"""Personalization methods: where a concept's variables come from before they are tuned, and how they are tuned."""

from typing import NamedTuple

from datencoder_jax.typing import LearningRates


class Method(NamedTuple):
    """What sets a method apart; all share the fused loop, the samplers and the concept file.

    Attributes:
        steps: of tuning.
        rates: learning rates; 0 leaves a part as it starts.
        word: what the embeddings start at; None where an encoder predicts them.
        offsets: whether it has weight offsets.
    """

    steps: int
    rates: LearningRates
    word: str | None = None
    offsets: bool = True


METHODS = {
    "datencoder": Method(12, LearningRates(embeddings=1e-3, offsets=1e-2)),
    "lora": Method(200, LearningRates(embeddings=0.0, offsets=1e-3), word="sks"),
    "textual_inversion": Method(1000, LearningRates(embeddings=5e-3, offsets=0.0), word="thing", offsets=False),
}
"""The methods by name. The encoder's 12 steps are the paper's, all other numbers ours."""
