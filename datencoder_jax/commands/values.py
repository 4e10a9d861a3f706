"""Values of options: numbers within bounds, choices in words."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reads a whole number between two, both included."""

    def parse(text: str) -> int:
        return int(_checked(text, int, low, high, "a whole number"))

    return parse


def number(low: float, high: float | None = None) -> Callable[[str], float]:
    """Reads a number between two, both included."""

    def parse(text: str) -> float:
        return _checked(text, float, low, high, "a number")

    return parse


def _checked(text: str, kind: type, low: float, high: float | None, what: str) -> Any:
    wanted = f"{what} from {low} to {high}" if high is not None else f"{what} of {low} or more"
    try:
        value = kind(text)
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    return value


def one_of(options: Sequence[str]) -> str:
    """For the help text of a long choice."""
    return "one of " + ", ".join(options)
