"""The parts of a check: measurements, and comparisons with a limit, which pass or do not."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


class LeftOut(Exception):
    """A part that cannot be run here; its text is the reason."""


@dataclass(frozen=True)
class Comparison:
    """A deviation from a reference.

    Attributes:
        name: what is compared.
        deviation: from the reference; not a number fails.
        tolerance: the largest deviation that passes.
    """

    name: str
    deviation: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.deviation) and self.deviation <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity."""
        content = asdict(self) | {"passed": self.passed}
        return content if math.isfinite(self.deviation) else content | {"deviation": None}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    Attributes:
        values: what was measured, by name; plain numbers, texts, lists and dictionaries.
        comparisons: with references.
    """

    values: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A part of a check that was run, failed or was left out.

    Attributes:
        name: such as "attention".
        outcome: empty where there is none.
        seconds: that it took.
        left_out: why it was not run; None where it was.
        failure: the error that ended it; None where none did.
    """

    name: str
    outcome: Outcome = Outcome()
    seconds: float = 0.0
    left_out: str | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing failed; a part that was left out has not failed."""
        return self.failure is None and all(comparison.passed for comparison in self.outcome.comparisons)

    @property
    def status(self) -> str:
        """In a word or two, for the table."""
        if self.left_out is not None:
            return "left out"
        return "passed" if self.passed else "FAILED"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "status": self.status,
            "seconds": self.seconds,
            "left_out": self.left_out,
            "failure": self.failure,
            "values": self.outcome.values,
            "comparisons": [comparison.to_dict() for comparison in self.outcome.comparisons],
        }


PartFunction = Callable[[], Outcome]
"""Runs a part. It raises `LeftOut` where it cannot be run, and any other exception where it fails."""


def print_progress(line: str) -> None:
    """Prints a line for whoever waits."""
    print(line, file=sys.stderr, flush=True)
