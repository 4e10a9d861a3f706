"""What is measured: methods with options, each at several numbers of steps.

An entry is written `METHOD`, or `METHOD:OPTION=VALUE,OPTION=VALUE`, and may end in its own steps, `@12+300`:

    datencoder                                as it is
    datencoder:start=word,blend=1             tuned from the class word instead of the encoder's prediction, one path
    datencoder:encoder=runs/plain/encoder     with another encoder
    lora:lowest=0.4,highest=0.6@12            tuned at the noise levels that datencoder is tuned at
    datencoder:gains=0.4/1.6@0                its prediction under other gains than the encoder's own
    lora:rank=8,rates=0/3e-3@300              these learning rates, 300 steps
    perfusion:lock=global,gate=0.8/0.1        options of the method's own; another gate when drawing
    base                                      the base model itself under the class word; it has no steps
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from datencoder_jax.api import PriorOptions
from datencoder_jax.benchmark.learning_rates import DEFAULT, NAMED, RateChoice
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS
from datencoder_jax.methods.method import read_option
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates

BASE = "base"
"""The entry that draws the class word and learns nothing."""
_LONGEST = 150
"""Characters of a name that are used as they are: file systems have 255 bytes for it and what is put behind."""
TUNING = ("draws", "views", "crop", "flip", "norm_weight", "momentum", "remat")
"""Options that are fields of `TuningConfig`."""


@dataclass(frozen=True)
class Entry:
    """A method with options.

    Attributes:
        label: as it was written, without steps; what tables call it.
        method: one of `methods.METHODS`, or `BASE`.
        options: parsed values by name.
        steps: its own; None for those asked of all.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] | None = None

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return slug(self.label)

    @property
    def encoder(self) -> str | None:
        """The folder of its own encoder; None for that of all."""
        return self.options.get("encoder")

    @property
    def rates(self) -> LearningRates:
        """The learning rates where none were chosen: the entry's own or the method's; 0 for a part that is off."""
        if self.method == BASE:
            return LearningRates(0.0, 0.0)
        embeddings, offsets = self.options.get("rates") or METHODS[self.method].rates
        on = self.options.get
        return LearningRates(embeddings if on("embeddings", True) else 0.0, offsets if on("offsets", True) else 0.0)


@dataclass(frozen=True)
class Row:
    """One row of the table: an entry at a number of steps and learning rates, of which `choice` says whence."""

    entry: Entry
    steps: int
    rates: LearningRates
    choice: RateChoice = field(default_factory=RateChoice)

    @property
    def name(self) -> str:
        """What names it in files and messages: "lora@300"."""
        return f"{self.entry.label}@{self.steps}"

    @property
    def slug(self) -> str:
        """The name as the name of a file."""
        return f"{self.entry.slug}@{self.steps}"


def slug(text: str) -> str:
    """A name for files, different for different texts."""
    plain = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)
    if plain == text and len(text) <= _LONGEST:
        return plain
    return f"{plain[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def parse_entries(texts: Sequence[str]) -> list[Entry]:
    """The entries of `--methods`, each text one or several of them with commas between.

    Raises:
        UserError: an unknown method or option, a bad value, or one label twice.
    """
    found: list[str] = []
    for text in texts:
        for part in text.split(","):
            # What names no method goes on with the options of the entry before.
            if found and "=" in part and ":" not in part.split("=")[0]:
                found[-1] += f",{part}"
            elif part.strip():
                found.append(part.strip())
    entries = [_parse(text) for text in found]
    if not entries:
        raise UserError("--methods names no method; name some, such as datencoder,lora")
    for entry in entries:
        if sum(other.label == entry.label for other in entries) > 1:
            raise UserError(f"--methods names {entry.label} twice; name it once, with all its steps, as in lora@12+300")
    return entries


def parse_steps(text: str, option: str = "--steps", separator: str = ",") -> tuple[int, ...]:
    """Numbers of steps, such as "0,12,300".

    Raises:
        UserError: something is no whole number of 0 or more, or there twice.
    """
    try:
        steps = tuple(int(part) for part in text.split(separator))
        if min(steps) < 0 or len(set(steps)) < len(steps):
            raise ValueError
    except ValueError:
        example = separator.join(("0", "12", "300"))
        raise UserError(
            f"{option} is {text!r}; write whole numbers of 0 or more, each once, such as {example}"
        ) from None
    return steps


def make_rows(entries: Sequence[Entry], steps: Sequence[int]) -> list[Row]:
    """Every entry at each of its steps, at the learning rates it has by itself."""
    rows = []
    for entry in entries:
        own = (0,) if entry.method == BASE else entry.steps or steps
        choice = RateChoice(NAMED if "rates" in entry.options else DEFAULT)
        rows += [Row(entry, count, entry.rates, choice) for count in own]
    return rows


def _parse(text: str) -> Entry:
    label, own = text, None
    if match := re.search(r"@([^@/]*)$", text):
        label, own = text[: match.start()], parse_steps(match[1], f"the steps of {text!r}", "+")
    method, _, rest = label.partition(":")
    if method != BASE and method not in METHODS:
        raise UserError(f"method {method!r} of --methods is not known; choose among: {', '.join([*METHODS, BASE])}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        parsers = _parsers(method)
        if name not in parsers:
            able = ", ".join(parsers) or "none"
            raise UserError(f"{method} takes no option {name!r} in --methods; it takes: {able}")
        try:
            options[name] = parsers[name](value)
        except ValueError as error:
            raise UserError(f"option {name} of {method} in --methods is {value!r}, not {error}") from None
    return Entry(label, method, options, own)


def _parsers(method: str) -> dict[str, Callable[[str], Any]]:
    """How the values of a method's options are read, by name."""
    if method == BASE:
        return {}
    chosen = METHODS[method]
    parsers: dict[str, Callable[[str], Any]] = {"rates": _rates, "blend": _share, "sampling_blend": _share}
    parsers |= {name: functools.partial(read_option, default) for name, default in chosen.choices.items()}
    if chosen.metric is not None:
        parsers["gate"] = _gate
    if chosen.encoder is not None:
        parsers["encoder"] = _text
    if chosen.encoder == "encoder":
        parsers |= {"start": _start, "offsets": _switch, "embeddings": _switch, "gains": _gains}
    if chosen.word is not None:
        parsers["word"] = _text
    if chosen.encoder == "encoder" or "rank" in chosen.options:
        parsers["rank"] = _count
    if "prior" in chosen.options:
        parsers["prior"] = lambda text: PriorOptions(weight=_positive(text))
    kinds: dict[Any, Callable[[str], Any]] = {int: _count, float: _number, bool: _switch}
    return parsers | {each.name: kinds[each.type] for each in fields(TuningConfig) if each.name in TUNING}


def _rates(text: str) -> LearningRates:
    try:
        embeddings, offsets = (float(part) for part in text.split("/"))
    except ValueError:
        embeddings = offsets = math.nan
    if not (0 <= embeddings < math.inf and 0 <= offsets < math.inf):
        raise ValueError("two learning rates, of the embeddings and of the offsets, such as 1e-3/1e-2")
    return LearningRates(embeddings, offsets)


def _gate(text: str) -> tuple[float, float]:
    try:
        beta, tau = (float(part) for part in text.split("/"))
    except ValueError:
        beta = tau = math.nan
    if not (math.isfinite(beta) and 0 < tau < math.inf):
        raise ValueError("beta and tau when drawing, such as 0.6/0.1")
    return beta, tau


def _gains(text: str) -> tuple[float, float]:
    try:
        values, within = (_number(part) for part in text.split("/"))
    except ValueError:
        raise ValueError("gains of cross-attention's values and of self-attention, such as 0.4/1.6") from None
    return values, within


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("a number of 0 or more")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not value:
        raise ValueError("a number above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if value > 1:
        raise ValueError("a number from 0 to 1")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError("a whole number of 1 or more")
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("on or off")
    return text == "on"


def _start(text: str) -> str:
    if text not in ("encoder", "word"):
        raise ValueError("encoder or word")
    return text


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("a text")
    return text
