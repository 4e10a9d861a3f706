"""The report's tables, as rows of cells that a page or a Markdown file prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from datencoder_jax.benchmark.learning_rates import describe_choice, differs_in_effort, lacks_chosen_rates
from datencoder_jax.benchmark.report.results import Results, Row, Score, best_and_ties, row_verdict
from datencoder_jax.evaluation.scores import Interval

NOTHING = "–"
_PROMPT_CHARACTERS = 60
_PERSONALIZING = "predict + tune (s)"
_CHOICE = "rates from"


@dataclass(frozen=True)
class Cell:
    """One value.

    Attributes:
        text: what it says; `NOTHING` where there is none.
        interval: "[low, high]", or empty.
        mark: "best", "tie"; "better", "worse", "undecided", "absent" (no verdict for want of values); or empty.
        number: what it is sorted by; None sorts last.
    """

    text: str
    interval: str = ""
    mark: str = ""
    number: float | None = None


@dataclass(frozen=True)
class Line:
    """One row of a table: what it is about, then its cells.

    Attributes:
        label: the method, or the reference.
        steps: of the method; None for references, and in tables whose lines are not of one number of steps.
        main: it is the row that others are compared with.
    """

    label: str
    cells: Sequence[Cell]
    steps: int | None = None
    main: bool = False


@dataclass(frozen=True)
class Table:
    """Sections of lines under one head.

    Attributes:
        name: an identifier within the page.
        head: the titles of the cells' columns; those of text are in `words`.
        sections: the lines of each method together; references apart, last.
        note: a sentence below.
    """

    name: str
    head: Sequence[str]
    sections: Sequence[Sequence[Line]]
    note: str = ""
    with_steps: bool = True
    words: Sequence[str] = ()
    apart: Sequence[Line] = field(default_factory=list)


def scores_table(
    results: Results,
    scores: Sequence[Score],
    subjects: Sequence[int] | None = None,
    name: str = "scores",
    timed: bool = False,
) -> Table:
    """Every row's scores with their intervals; the best method in each column marked, and what ties with it.

    Args:
        results: what was measured.
        scores: the columns.
        subjects: whom the means are over; all by default.
        name: of the table.
        timed: with a column of the seconds from picture to concept.
    """
    rows = results.methods
    marks = {score: best_and_ties([row.interval(score.name, subjects) for row in rows], score) for score in scores}

    def line(row: Row, index: int | None) -> Line:
        cells = []
        for score in scores:
            best, ties = marks[score] if index is not None else (set(), set())
            mark = "best" if index in best else "tie" if index in ties else ""
            cells.append(interval_cell(row.interval(score.name, subjects), score, mark))
        if timed:
            cells.append(_cell(row.personalizing if index is not None else None, seconds))
        return Line(row.label, cells, row.steps if index is not None else None, row is results.main)

    lines = [line(row, index) for index, row in enumerate(rows)]
    head = [f"{score.title}{'' if score.higher else ' ↓'}" for score in scores]
    if timed:
        head.append(_PERSONALIZING)
    return Table(name, head, _by_label(lines), apart=[line(row, None) for row in results.references])


def costs_table(results: Results) -> Table:
    """What every row took: learning rates and what they were chosen on, seconds, bytes, numbers that were trained."""
    explained = any(row.rate_choice for row in results.methods)
    words = ["learning rates", *([_CHOICE] if explained else [])]
    head = [*words, "predict (s)", "tune (s)", _PERSONALIZING, "draw (s)", "file", "trained numbers"]
    counted: list[tuple[str, Callable[[Row], int]]] = [
        ("failed units", lambda row: len(row.failed)),
        ("units to come", lambda row: row.unfinished),
    ]
    counted = [(name, count) for name, count in counted if any(count(row) for row in results.rows)]
    lines = []
    for row in results.methods:
        stages = [row.seconds.get("predict"), row.seconds.get("tune"), row.personalizing, row.seconds.get("draw")]
        cells = [
            Cell(" / ".join(_rate(rate) for rate in row.rates)) if row.rates else Cell(NOTHING),
            *([Cell(describe_choice(row.rate_choice) or NOTHING)] if explained else []),
            *(_cell(value, seconds) for value in stages),
            _cell(row.bytes, file_size),
            _cell(row.trained, lambda value: f"{value:,.0f}"),
            *(_cell(count(row), str) for _, count in counted),
        ]
        lines.append(Line(row.label, cells, row.steps, row is results.main))
    return Table("costs", [*head, *(name for name, _ in counted)], _by_label(lines), words=words)


def steps_table(results: Results, score: Score) -> Table:
    """One score of every method at every number of steps, the best of each number of steps marked."""
    columns = []
    for steps in results.steps:
        found = [results.row(label, steps) for label in results.labels]
        intervals = [row.interval(score.name) if row else None for row in found]
        best, ties = best_and_ties(intervals, score)
        marks = ["best" if k in best else "tie" if k in ties else "" for k in range(len(found))]
        columns.append([interval_cell(i, score, mark) for i, mark in zip(intervals, marks, strict=True)])
    lines = [Line(label, cells) for label, *cells in zip(results.labels, *columns, strict=True)]
    head = [f"{steps} steps" for steps in results.steps]
    return Table(f"steps-{score.name}", head, [lines], with_steps=False)


def prompts_table(results: Results, score: Score) -> Table | None:
    """One score of every row, at the main row's number of steps, prompt by prompt; None if nobody has it."""
    if results.main is None:
        return None
    rows = [row for row in results.methods if row.steps == results.main.steps] + results.references
    rows = [row for row in rows if len(row.by_prompt.get(score.name, ())) == len(results.prompts)]
    if not rows or not results.prompts:
        return None
    lines = []
    for k, prompt in enumerate(results.prompts):
        values = [row.by_prompt[score.name][k] for row in rows]
        cells = [interval_cell(None if np.isnan(v) else Interval(v, np.nan, np.nan), score) for v in values]
        lines.append(Line(shortened(prompt), cells))
    return Table(f"prompts-{score.name}", [row.label for row in rows], [lines], with_steps=False)


def differences_table(results: Results) -> Table | None:
    """The main row minus every other on the same subjects, with verdicts; None without a main row.

    Where learning rates were not chosen alike, every row says what its own were chosen on.
    """
    main = results.main
    if main is None:
        return None
    unequal = any(differs_in_effort(main.rate_choice, row.rate_choice) for row in results.methods)
    unequal = unequal or any(lacks_chosen_rates(row.rate_choice) for row in results.methods)

    def line(row: Row) -> Line:
        cells = []
        for score in results.leading:
            difference = main.minus(row, score.name)
            cells.append(interval_cell(difference, score, row_verdict(main, row, score) or "absent", sign=True))
        if unequal:
            cells.append(Cell(describe_choice(row.rate_choice) or NOTHING))
        return Line(row.label, cells, row.steps if row.kind == "method" else None)

    head = [score.title for score in results.leading]
    words = [f"{_CHOICE} ({main.name}: {describe_choice(main.rate_choice) or NOTHING})"] if unequal else []
    sections = _by_label([line(row) for row in results.methods if row is not main])
    apart = [line(row) for row in results.references]
    return Table("differences", [*head, *words], sections, apart=apart, words=words)


def interval_cell(interval: Interval | None, score: Score, mark: str = "", sign: bool = False) -> Cell:
    """A mean with its interval; no interval where its ends are NaN."""
    if interval is None:
        return Cell(NOTHING, mark=mark)
    mean, low, high = (score.text(value, sign) if not np.isnan(value) else "" for value in interval)
    return Cell(mean, f"[{low}, {high}]" if low else "", mark, interval.mean)


def seconds(value: float) -> str:
    """Seconds with three figures, fewer where there are less than one."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def file_size(value: float) -> str:
    """Bytes in the unit that people read: 1 kB is 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def shortened(text: str, characters: int = _PROMPT_CHARACTERS) -> str:
    """`text` in at most that many characters."""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def _cell(value: float | None, text: Callable[[float], str]) -> Cell:
    return Cell(NOTHING) if value is None else Cell(text(value), number=value)


def _rate(rate: float) -> str:
    return f"{rate:.3g}".replace("e-0", "e-")


def _by_label(lines: Sequence[Line]) -> list[list[Line]]:
    return [list(group) for _, group in groupby(lines, key=lambda line: line.label)]
