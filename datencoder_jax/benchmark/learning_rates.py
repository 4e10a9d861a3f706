"""Where a row's learning rates come from, which decides what a comparison with it is worth.

A row is one of three: at its method's "default" rates, at rates "named" in `--methods`, or at rates "chosen" by
`--sweep` on development individuals. Default rates are nobody's choice for this model and this number of steps, so rows
that have them are shown without a verdict; rows whose rates were chosen on unequal numbers of individuals say so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DEFAULT, NAMED, CHOSEN = "default", "named", "chosen"


class RateChoice(NamedTuple):
    """Where learning rates come from.

    Attributes:
        source: `DEFAULT`, `NAMED` or `CHOSEN`.
        individuals, classes: how many individuals, of how many classes, they were chosen on; None where not known.
    """

    source: str = DEFAULT
    individuals: int | None = None
    classes: int | None = None


def lacks_chosen_rates(choice: Mapping[str, Any] | None) -> bool:
    """Whether a row's `rate_choice` in `metrics.json` says that its rates are its method's defaults."""
    return choice is not None and choice.get("source") == DEFAULT


def describe_choice(choice: Mapping[str, Any] | None) -> str:
    """A row's `rate_choice` in words; empty where a row has no rates, or does not say where they come from."""
    if choice is None:
        return ""
    if choice.get("source") != CHOSEN:
        return {DEFAULT: "defaults", NAMED: "named"}.get(str(choice.get("source")), "")
    individuals, classes = choice.get("individuals"), choice.get("classes")
    if not individuals:
        return "chosen"
    of = f" of {_count(classes, 'class', 'classes')}" if classes else ""
    return f"chosen on {_count(individuals, 'individual', 'individuals')}{of}"


def differs_in_effort(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether the rates of two rows that say where they come from were chosen on unequal numbers of individuals."""
    if first is None or second is None:
        return False
    return any(first.get(name) != second.get(name) for name in ("source", "individuals"))


def describe_effort(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the learning rates of two rows of `metrics.json` were chosen on; empty where that is alike."""
    first, second = rows
    if not differs_in_effort(first.get("rate_choice"), second.get("rate_choice")):
        return ""
    parts = (f"of {row['label']}@{row['steps']} {describe_choice(row['rate_choice'])}" for row in rows)
    return f"learning rates {', '.join(parts)}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
