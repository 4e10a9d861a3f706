"""What a personalization method is: where its variables come from before they are tuned, and how they are tuned."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.checkpoints.export import KINDS
from datencoder_jax.errors import UserError
from datencoder_jax.pipeline import Pipeline, attention_shapes
from datencoder_jax.typing import Dense, LearningRates, Variables

RARE = "sks"
"""The rare word of DreamBooth's examples."""


TOKEN = "S*"
"""The placeholder where no other is asked for."""


class Setup(NamedTuple):
    """What a method makes its variables from.

    Attributes:
        pipeline: the base model.
        pictures: of the concept, `[k, H, W, 3]` in [-1, 1].
        word_ids: tokens of the words the embeddings start at, the class word last; none for a method without.
        class_tokens: how many of them, the last, are the class word's: rare ones are several tokens.
        key: of random draws.
        rank: of low-rank edits.
        quiet: print nothing.
        tuned: whether steps of tuning follow.
        prior: whether how the class is drawn is preserved.
        token: the placeholder, or several with blanks between.
        notes: where a start leaves arrays for the report, by name; None where nobody reads them.
    """

    pipeline: Pipeline
    pictures: jax.Array
    word_ids: Sequence[int]
    key: jax.Array
    rank: int = 4
    quiet: bool = False
    tuned: bool = True
    class_tokens: int = 1
    prior: bool = False
    token: str = TOKEN
    notes: dict[str, Any] | None = None


def by_part(variables: Variables, rates: LearningRates, class_tokens: int = 1) -> Variables:
    """One rate for the embeddings, one for all edits."""
    return Variables(rates.embeddings, rates.offsets, 0.0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Method:
    """What sets a method apart; all share the fused loop, the samplers and the concept file.

    Attributes:
        steps: of tuning.
        rates: learning rates; 0 leaves a part as it starts.
        start: the variables before the first step.
        word: what the embeddings start at; None where an encoder predicts them.
        options: what `personalize` takes for it beyond what it takes for all, of "rank" and "prior".
        rates_of: the learning rate of each of the variables' arrays, or for a part of them as a whole; the class word's
            tokens are so many.
        encoder: the encoder of a `Pipeline` that it starts from, "encoder" or "domain"; None where it starts at words.
        norm_weight: `lambda_n` of tuning; None for tuning's own.
        finish: the variables as a concept keeps them.
        metric: of text states, `[d, d]`, where gates follow the concept in tuning.
        defaults: options of its own by name: a number, or a tuple of choices of which the first is the default.
        variant: the method under other values of these, all of them given by name.
        several: whether a concept may have several placeholders, one for each word, which is one token.
        calibration: `lambda_c` of tuning; None for none.
        focus: the floor `f` of `methods.focus`, which weights the pictures' pixels in tuning; None for all alike.
        levels: the lowest and highest timesteps of tuning, as shares of the schedule.
        exports: what other programs can have of its concepts, of `checkpoints.export.KINDS`.
    """

    steps: int
    rates: LearningRates
    start: Callable[[Setup], Variables]
    word: str | None = None
    options: frozenset[str] = frozenset()
    rates_of: Callable[[Variables, LearningRates, int], Any] = by_part
    encoder: str | None = None
    norm_weight: float | None = None
    finish: Callable[[Variables], Variables] = lambda variables: variables
    metric: Callable[..., np.ndarray] | None = None
    defaults: Mapping[str, float | tuple[str, ...]] = field(default_factory=dict)
    variant: Callable[..., "Method"] | None = None
    several: bool = False
    calibration: float | None = None
    focus: float | None = None
    levels: tuple[float, float] = (0.0, 1.0)
    exports: tuple[str, ...] = KINDS

    @property
    def choices(self) -> dict[str, float | tuple[str, ...]]:
        """All options by name, as in `defaults`: `focus` (0 for none) and two levels, which all have, and its own."""
        return {"focus": self.focus or 0.0, "lowest": self.levels[0], "highest": self.levels[1], **self.defaults}

    @property
    def own(self) -> dict[str, float | str]:
        """The options of `choices` where nothing else is asked for."""
        return {key: _first(default) for key, default in self.choices.items()}

    def with_options(self, name: str, options: Mapping[str, Any] | None) -> "Method":
        """The method under some options of its own; numbers may be given as text.

        Args:
            name: what to call the method in an error.

        Raises:
            UserError: it has no such option, or it cannot have that value.
        """
        if not options:
            return self
        values: dict[str, Any] = dict(self.own)
        for key, value in options.items():
            if key not in self.choices:
                raise UserError(f"{name} takes no option {key!r}; it takes: {', '.join(self.choices)}")
            try:
                values[key] = read_option(self.choices[key], value)
            except ValueError as error:
                raise UserError(f"option {key} of {name} is {value!r}, not {error}") from None
        focus, lowest, highest = (values.pop(key) for key in ("focus", "lowest", "highest"))
        if not 0.0 <= focus <= 1.0:
            raise UserError(f"option focus of {name} is {focus:g}, not a number from 0 (none) to 1")
        if not 0.0 <= lowest < highest <= 1.0:
            raise UserError(
                f"options lowest and highest of {name} are {lowest:g} and {highest:g}, not two numbers from 0 to 1, "
                "the higher one last"
            )
        chosen = self.variant(**values) if self.variant else self
        return replace(chosen, focus=focus or None, levels=(lowest, highest))


def read_option(default: float | tuple[str, ...], value: Any) -> float | str:
    """The value of one of `Method.defaults`; a `ValueError` that says what it should be."""
    if isinstance(default, tuple):
        if value not in default:
            raise ValueError(f"one of: {', '.join(default)}")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def _first(default: float | tuple[str, ...]) -> float | str:
    return default[0] if isinstance(default, tuple) else default


def embeddings_of(base: Base, word_ids: Sequence[int]) -> jax.Array:
    """Token vectors of words, side by side for two text towers: `[n, d]` float32."""
    return jnp.asarray(base.table)[jnp.array(list(word_ids))].astype(jnp.float32)


def with_modifier(base: Base, word_ids: Sequence[int], class_tokens: int = 1) -> jax.Array:
    """Token vectors of a modifier and the class word after it, `[n, d]` float32: of "sks dog" those of its tokens.

    Of a class word alone, the modifier is a vector that stands for no word in particular: the mean of the directions of
    all words, of their mean length (ours; small vocabularies have no rare word).
    """
    rows = embeddings_of(base, word_ids)
    if len(rows) > class_tokens:
        return rows
    return jnp.concatenate([_no_word(base), rows])


def _no_word(base: Base) -> jax.Array:
    """The modifier of `with_modifier`, `[1, d]`."""
    base.require_words("a modifier before a class word alone (or name one, as in 'sks dog')")
    table = jnp.asarray(base.table)[np.flatnonzero(np.asarray(base.words))].astype(jnp.float32)
    mean = (table / jnp.linalg.norm(table, axis=1, keepdims=True)).mean(axis=0, keepdims=True)
    return mean / jnp.linalg.norm(mean) * base.word_norm


def modifiers_alone(rate: float | jax.Array, count: int, class_tokens: int = 1, concepts: int = 1) -> np.ndarray:
    """Learning rates of the `count` embeddings of several concepts, the class word of each frozen: `[count, 1]`."""
    rates = np.full((concepts, count // concepts), rate, np.float32)
    rates[:, -class_tokens:] = 0.0
    return rates.reshape(count, 1)


def zero_edits(base: Base, projections: Collection[str]) -> dict[str, Dense]:
    """Offsets of whole matrices, zero at the start, of the named projections such as "attn2.to_k"."""
    shapes = attention_shapes(base.unet).items()
    return {path: Dense(jnp.zeros(shape)) for path, shape in shapes if path.endswith(tuple(projections))}


def trained_numbers(variables: Variables, rates: Any) -> int:
    """How many numbers have a learning rate other than 0, of rates as `Method.rates_of` gives them."""
    total = 0

    def count(rate: Any, part: Any) -> None:
        nonlocal total
        for leaf in jax.tree.leaves(part):
            total += int(np.broadcast_to(np.asarray(rate) != 0, np.shape(leaf)).sum())

    jax.tree.map(count, rates, variables)
    return total
