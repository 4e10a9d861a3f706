"""What an evaluation measured, as `metrics.json` holds it: scores, subjects, rows, and their intervals.

A row's score is its mean over subjects s, its 95 % interval the percentile bootstrap over them. Two rows are compared
on the subjects that both have, D the set of them:

    d(a, b) = 1/|D| sum_{s in D} (a_s - b_s)                                                        (1)

whose interval comes from resampling D. `a` is better where the interval lies wholly on the good side of 0, worse where
it lies wholly on the other, else it is undecided. Intervals are not widened for the number of comparisons. Fewer than
`scores.MIN_SUBJECTS` subjects have no interval, and no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datencoder_jax.benchmark.joining import FORMAT, JOINED, VERSION
from datencoder_jax.benchmark.learning_rates import lacks_chosen_rates
from datencoder_jax.benchmark.suites import PRODUCT
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.scores import Interval, bootstrap

_MAIN, _MAIN_STEPS = "datencoder", 12
_STAGES = ("predict", "tune", "draw")


@dataclass(frozen=True)
class Score:
    """One column: its name in `metrics.json`, how it is called and read.

    Attributes:
        name: the key of `scores` and of a row's `values`.
        label: what a reader calls it.
        unit: "share" is shown in per cent, anything else as it is.
        higher: whether more is better.
        about: what it is: model, prompt text, averaging.
    """

    name: str
    label: str
    unit: str = ""
    higher: bool = True
    about: str = ""

    @property
    def scale(self) -> float:
        """What a value is multiplied by before it is shown."""
        return 100.0 if self.unit == "share" else 1.0

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label} (%)" if self.unit == "share" else self.label

    def text(self, value: float, sign: bool = False) -> str:
        """A value of this score as people read it; "-0.0" is not one."""
        digits = 1 if self.unit == "share" else 3
        shown = round(self.scale * value, digits) + 0.0
        return f"{shown:{'+' if sign and shown else ''}.{digits}f}"


@dataclass(frozen=True)
class Row:
    """An entry at a number of steps, or a reference.

    Attributes:
        values: by score, one value per subject, NaN where it failed or there is none.
        seconds: by stage (predict, tune, draw), compiling left out; a stage that was not timed is missing.
        devices: what its units were made on; "" for those that do not tell.
        failed: subject, seed and error of each unit that failed.
        unfinished: how many of its units have not been made yet.
        pictures: the sheet of its tiles, relative to the folder; None if it has none.
        joined: command and device of the run that measured it, if that was another; it has no seconds then, which would
            say nothing beside this run's.
        rate_choice: where its learning rates come from, as `learning_rates.RateChoice` has it; None where that is not
            known, or there are none.
    """

    kind: str
    label: str
    steps: int | None
    values: Mapping[str, np.ndarray]
    rates: Sequence[float] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    bytes: int | None = None
    trained: int | None = None
    by_prompt: Mapping[str, np.ndarray] = field(default_factory=dict)
    failed: Sequence[Mapping[str, Any]] = ()
    unfinished: int = 0
    pictures: str | None = None
    joined: Mapping[str, str] | None = None
    rate_choice: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The label, and of a method the steps."""
        if self.steps is None or self.kind != "method":
            return self.label
        return f"{self.label}, {self.steps} step{'' if self.steps == 1 else 's'}"

    @property
    def personalizing(self) -> float | None:
        """Seconds from picture to concept: prediction and tuning, without drawing; None if neither was timed."""
        spent = [self.seconds[stage] for stage in ("predict", "tune") if stage in self.seconds]
        return sum(spent) if spent else None

    def interval(self, score: str, subjects: Sequence[int] | None = None) -> Interval | None:
        """The mean over `subjects` (all by default) that have a value; None if none has.

        Fewer than `scores.MIN_SUBJECTS` have a mean but no interval: its ends are NaN.
        """
        if (values := self.values.get(score)) is None:
            return None
        return _interval(values if subjects is None else values[list(subjects)])

    def minus(self, other: Row, score: str) -> Interval | None:
        """Equation (1); None if no subject has both."""
        if score not in self.values or score not in other.values:
            return None
        return _interval(self.values[score] - other.values[score])


@dataclass(frozen=True)
class Results:
    """The whole of `metrics.json`; `folder` is where it lies."""

    folder: Path
    suite: str
    model: str
    fingerprint: str
    command: str
    device: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Score]
    axes: Mapping[str, str]
    groups: Mapping[str, Sequence[int]]
    subjects: Sequence[str]
    rows: Sequence[Row]
    tiles: Mapping[str, Any]
    inputs: str | None
    goals: Sequence[Mapping[str, Any]]
    warnings: Sequence[str] = ()

    @cached_property
    def methods(self) -> list[Row]:
        """The rows that are methods, those of a label together and by steps."""
        rows = [row for row in self.rows if row.kind == "method"]
        order = list(dict.fromkeys(row.label for row in rows))
        return sorted(rows, key=lambda row: (order.index(row.label), -1 if row.steps is None else row.steps))

    @cached_property
    def references(self) -> list[Row]:
        """Ceilings and floors."""
        return [row for row in self.rows if row.kind != "method"]

    @cached_property
    def labels(self) -> list[str]:
        """Every method's label once."""
        return list(dict.fromkeys(row.label for row in self.methods))

    @cached_property
    def steps(self) -> list[int]:
        """Every number of steps once, rising."""
        return sorted({row.steps for row in self.methods if row.steps is not None})

    @cached_property
    def main(self) -> Row | None:
        """The row that others are compared with: `datencoder` at 12 steps, else the first label at 12, else at most.

        Rows of which everything failed are passed over, as long as there are others.
        """
        rows = [row for row in self.methods if any(np.isfinite(v).any() for v in row.values.values())] or self.methods
        first = [row for row in rows if row.label == rows[0].label]
        ours = [row for row in rows if row.label == _MAIN]
        at_main = [row for row in (*ours, *first) if row.steps == _MAIN_STEPS]
        return next(iter([*at_main, *first[-1:]]), None)

    @cached_property
    def leading(self) -> list[Score]:
        """The scores that decide: identity, prompt and their product, as far as there are."""
        names = [self.axes.get("identity"), self.axes.get("prompt"), PRODUCT]
        return [self.scores[name] for name in dict.fromkeys(names) if name in self.scores]

    @cached_property
    def columns(self) -> list[Score]:
        """All scores, those that decide first."""
        return list(dict.fromkeys([*self.leading, *self.scores.values()]))

    @property
    def prompts(self) -> list[str]:
        """The prompts that pictures were drawn for."""
        return [str(prompt) for prompt in self.settings.get("prompts", [])]

    def row(self, label: str, steps: int | None) -> Row | None:
        """The method of that label at that number of steps."""
        return next((row for row in self.methods if (row.label, row.steps) == (label, steps)), None)


def verdict(difference: Interval | None, score: Score) -> str:
    """ "better", "worse" or "undecided"; empty where there is nothing to compare, or no interval."""
    if difference is None or not difference.certain:
        return ""
    if difference.low > 0:
        return "better" if score.higher else "worse"
    if difference.high < 0:
        return "worse" if score.higher else "better"
    return "undecided"


def row_verdict(main: Row, other: Row, score: Score) -> str:
    """The verdict on `main` against another row; empty too where the learning rates of either are defaults."""
    if any(lacks_chosen_rates(row.rate_choice) for row in (main, other)):
        return ""
    return verdict(main.minus(other, score.name), score)


def best_and_ties(intervals: Sequence[Interval | None], score: Score) -> tuple[set[int], set[int]]:
    """Which are best (several if equal as shown), and which others' intervals overlap a best one's.

    Means without an interval are neither.
    """
    known = {k: interval for k, interval in enumerate(intervals) if interval is not None and interval.certain}
    if not known:
        return set(), set()
    top = (max if score.higher else min)(known.values(), key=lambda interval: interval.mean)
    best = {k for k, interval in known.items() if score.text(interval.mean) == score.text(top.mean)}
    ties = {k for k, interval in known.items() if interval.high >= top.low and interval.low <= top.high}
    return best, ties - best


def capital(text: str) -> str:
    """`text` as a sentence begins; the other letters stay, as those of CLIP-T should."""
    return text[:1].upper() + text[1:]


def read_results(folder: Path) -> Results:
    """Reads `metrics.json`.

    Raises:
        UserError: it is missing, damaged, of another kind or of a newer version.
    """
    path = Path(folder) / "metrics.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}; `datencoder evaluate --out {folder}` writes it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not an evaluation's metrics; name a folder that `datencoder evaluate` wrote.")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has version {content.get('version')}, this program reads {VERSION}; update it.")
    try:
        return _results(Path(folder), content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run `datencoder evaluate` again to write it.") from error


def _results(folder: Path, content: Mapping[str, Any]) -> Results:
    scores = {name: _score(name, about) for name, about in content["scores"].items()}
    subjects = [str(subject["name"]) for subject in content["subjects"]]
    rows = [_row(row, scores, len(subjects)) for row in content["rows"]]
    groups = {name: [int(k) for k in indices] for name, indices in (content.get("groups") or {}).items()}
    if outside := [k for indices in groups.values() for k in indices if not 0 <= k < len(subjects)]:
        raise ValueError(f"a group names subject {outside[0]} of {len(subjects)}")
    texts = {name: str(content.get(name) or "") for name in ("suite", "model", "fingerprint", "command", "device")}
    return Results(
        folder,
        **texts,
        settings=content.get("settings") or {},
        scores=scores,
        axes=content.get("axes") or {},
        groups=groups,
        subjects=subjects,
        rows=rows,
        tiles=content.get("tiles") or {},
        inputs=content.get("inputs"),
        goals=content.get("goals") or [],
        warnings=[str(sentence) for sentence in content.get("warnings") or ()],
    )


def _score(name: str, about: Mapping[str, Any]) -> Score:
    higher = about.get("better", "higher") != "lower"
    return Score(name, str(about.get("label") or name), str(about.get("unit") or ""), higher, about.get("about") or "")


def _row(row: Mapping[str, Any], scores: Mapping[str, Score], subjects: int) -> Row:
    values = {name: np.array(row["values"][name], np.float64) for name in scores if row["values"].get(name) is not None}
    for name, value in values.items():
        if value.shape != (subjects,):
            raise ValueError(f"{row['label']} has {len(value)} values of {name} for {subjects} subjects")
    seconds = {} if row.get(JOINED) else row.get("seconds") or {}
    return Row(
        kind=row["kind"],
        label=str(row["label"]),
        steps=row.get("steps"),
        values=values,
        rates=row.get("rates"),
        seconds={stage: float(seconds[stage]) for stage in _STAGES if seconds.get(stage) is not None},
        devices=tuple(row.get("devices") or ()),
        bytes=row.get("bytes"),
        trained=row.get("trained"),
        by_prompt={name: np.array(value, np.float64) for name, value in (row.get("by_prompt") or {}).items()},
        failed=row.get("failed") or [],
        unfinished=int(row.get("unfinished") or 0),
        pictures=row.get("pictures"),
        joined=row.get(JOINED),
        rate_choice=row.get("rate_choice"),
    )


def _interval(values: np.ndarray) -> Interval | None:
    values = values[~np.isnan(values)]
    return _bootstrap(values.tobytes()) if len(values) else None


@lru_cache(maxsize=16384)
def _bootstrap(values: bytes) -> Interval:
    return bootstrap(np.frombuffer(values))
