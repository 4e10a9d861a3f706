"""What the report says and in which order: sections of blocks, which a page and a Markdown file print alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datencoder_jax.benchmark.learning_rates import lacks_chosen_rates
from datencoder_jax.benchmark.report.pictures import Gallery
from datencoder_jax.benchmark.report.plots import Plot
from datencoder_jax.benchmark.report.results import Results, Row, capital, row_verdict
from datencoder_jax.benchmark.report.tables import (
    Cell,
    Line,
    Table,
    costs_table,
    differences_table,
    interval_cell,
    prompts_table,
    scores_table,
    seconds,
    steps_table,
)
from datencoder_jax.benchmark.suites import PRODUCT
from datencoder_jax.evaluation.scores import MIN_SUBJECTS

NO_PLOTS = (
    'There are no plots, for matplotlib is not installed: pip install "datencoder_jax[report]" and run the same '
    "command again; what is measured already is kept."
)
_BEST = "Bold: the best of a column among the methods. ≈: its interval overlaps the best one's."
_INTERVALS = f"Brackets hold 95 % bootstrap intervals over subjects, {MIN_SUBJECTS} at least."
VERDICTS: Mapping[bool | None, tuple[str, str]] = {
    True: ("met", "✓ met"),
    False: ("missed", "✗ missed"),
    None: ("open", "– no verdict"),
}
"""How a goal is marked and what is said of it, by its `met`."""


class Figure(NamedTuple):
    """A number of the headline."""

    label: str
    cell: Cell
    note: str = ""


class Named(NamedTuple):
    """A plot under its name, which is also its file's."""

    name: str
    plot: Plot


class Pairs(NamedTuple):
    """Terms and what they mean; a list of texts is printed one below the other."""

    pairs: Sequence[tuple[str, str | list[str]]]


class Goals(NamedTuple):
    """What was aimed at, and whether it was reached."""

    goals: Sequence[Mapping[str, Any]]


class Lead(NamedTuple):
    """A line above what it is about."""

    text: str


class Command(NamedTuple):
    """A line for a shell."""

    text: str


Block = str | Table | Named | Gallery | Pairs | Goals | Lead | Command | list[Figure]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    name: str
    title: str
    blocks: Sequence[Block]


def sections(results: Results, plots: Mapping[str, Plot] | None, galleries: Sequence[Gallery]) -> list[Section]:
    """The report; `plots` is None where none can be drawn."""
    made = [
        Section("goals", "Goals", [Goals(results.goals)] if results.goals else []),
        Section("headline", "In short", _headline(results)),
        Section("plots", "Plots", _plots(plots)),
        Section("differences", "Paired differences", _differences(results)),
        Section("scores", "Scores", _scores(results)),
        Section("costs", "Time and size", _costs(results)),
        Section("groups", "Groups of subjects", _groups(results)),
        Section("prompts", "By prompt", _prompts(results)),
        Section("pictures", "Pictures", list(galleries)),
        Section("failures", "Failures", _failures(results)),
        Section("definitions", "What the scores are", _definitions(results)),
        Section("settings", "Settings", _settings(results)),
    ]
    return [section for section in made if section.blocks]


def goal_details(goal: Mapping[str, Any]) -> list[str]:
    """What stands beside a goal's verdict: its numbers, why there is no verdict, unequal choices of learning rates."""
    reason = f"no verdict: {goal['reason']}" if goal.get("reason") else ""
    return [str(detail) for detail in (goal.get("numbers"), reason, goal.get("effort")) if detail]


def title(results: Results) -> str:
    """Of the whole."""
    return f"Evaluation on {results.suite}" if results.suite else "Evaluation"


def measured(results: Results) -> str:
    """One sentence: what was measured on what."""
    prompts, seeds = len(results.prompts), len(results.settings.get("seeds", []))
    steps = f", at {_listed([str(s) for s in results.steps])} optimiser steps" if results.steps else ""
    on = [_count(len(results.subjects), "subject")]
    on += [_count(prompts, "prompt")] if prompts else []
    on += [_count(seeds, "seed")] if seeds else []
    where = f", on {results.device}" if results.device else ""
    model = f" on the model {results.model}" if results.model else ""
    return f"{_count(len(results.labels), 'method')}{model}{steps}: {' × '.join(on)}{where}."


def _headline(results: Results) -> list[Block]:
    main = results.main
    blocks: list[Block] = [f"Warning: {sentence}" for sentence in results.warnings]
    if len(results.subjects) < MIN_SUBJECTS:
        count = _count(len(results.subjects), "subject")
        blocks.append(f"There are no intervals and no verdicts: {count} of the {MIN_SUBJECTS} that they take at least.")
    if defaults := [row.name for row in results.methods if lacks_chosen_rates(row.rate_choice)]:
        blocks.append(
            f"There are no verdicts on {_listed(defaults)}: their learning rates are the method's defaults, which "
            "nobody chose for this suite."
        )
    if main is not None:
        figures = [
            Figure(score.title, interval_cell(main.interval(score.name), score), _standing(results, main, score))
            for score in results.leading
        ]
        if main.personalizing is not None:
            figures.append(Figure("seconds from picture to concept", Cell(seconds(main.personalizing))))
        blocks += [Lead(main.name), figures]
    if waiting := sum(row.unfinished for row in results.rows):
        blocks.append(f"The run is not finished: {_count(waiting, 'unit')} to come, of which nothing is counted here.")
    if results.command:
        blocks.append(Command(results.command))
    if PRODUCT in results.scores and len(results.steps) > 1:
        score = results.scores[PRODUCT]
        blocks += [f"{capital(score.title)} by optimiser steps. {_INTERVALS} {_BEST}", steps_table(results, score)]
    return blocks


def _standing(results: Results, main: Row, score) -> str:
    """How many others the main row is told from, and which way."""
    others = [row for row in results.methods if row is not main]
    said = [row_verdict(main, row, score) for row in others]
    counts = [f"{word} than {said.count(word)}" for word in ("better", "worse") if said.count(word)]
    counts += [f"undecided with {said.count('undecided')}"] if said.count("undecided") else []
    counts += [f"no verdict on {said.count('')}"] if counts and said.count("") else []
    return f"{', '.join(counts)} of {len(others)} other rows" if counts else ""


def _plots(plots: Mapping[str, Plot] | None) -> list[Block]:
    return [NO_PLOTS] if plots is None else [Named(name, plot) for name, plot in plots.items()]


def _differences(results: Results) -> list[Block]:
    table = differences_table(results)
    if table is None or results.main is None:
        return []
    note = (
        f"{results.main.name} minus each other row, over the subjects that both have. The verdict is about "
        f"{results.main.label}: better or worse where the 95 % interval of the mean difference excludes 0, else "
        "undecided. Intervals are not widened for the number of comparisons. There is no verdict where a row's "
        f"learning rates are defaults, or where fewer than {MIN_SUBJECTS} subjects have both."
    )
    return [note, table]


def _scores(results: Results) -> list[Block]:
    note = f"{_INTERVALS} {_BEST}"
    if any(not score.higher for score in results.columns):
        note += " ↓: lower is better."
    if any(row.failed for row in results.rows):
        note += " Where units failed, a row is the mean over the subjects that remain."
    return [note, scores_table(results, results.columns, timed=True)]


def _costs(results: Results) -> list[Block]:
    note = (
        "Seconds are those of one subject and leave compiling out. predict: from the picture to where tuning starts; "
        "tune: the optimiser's steps; draw: the pictures of all prompts. The file is the concept as it is saved."
    )
    if any(row.joined for row in results.rows):
        note += " Rows that another run measured have no seconds here."
    timed: dict[str, list[str]] = {}
    for row in results.rows:
        if row.seconds:
            where = _listed([device or "an unknown device" for device in row.devices or ("",)])
            timed.setdefault(where, []).append(row.name)
    if len(timed) > 1:
        parts = (f"on {device}: {_listed(names)}" for device, names in timed.items())
        note += f" They compare within one device alone; {'; '.join(parts)}."
    return [note, costs_table(results)]


def _groups(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, subjects) in enumerate(results.groups.items()):
        if subjects:
            blocks.append(f"{capital(name)}: {_count(len(subjects), 'subject')}.")
            blocks.append(scores_table(results, results.leading, subjects, f"group-{number}"))
    return [f"{_INTERVALS} {_BEST}", *blocks] if blocks else []


def _prompts(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for score in results.leading:
        if (table := prompts_table(results, score)) and results.main:
            about = f"{capital(score.title)}, means at {results.main.steps} optimiser steps"
            about += ", multiplied." if score.name == PRODUCT else "."
            blocks += [about, table]
    return blocks


def _failures(results: Results) -> list[Block]:
    """One line for each row and error, with everybody it befell."""
    sections = []
    for row in [*results.methods, *results.references]:
        befell: dict[str, list[tuple[Any, Any]]] = {}
        for unit in row.failed:
            error = " ".join(str(unit.get("error") or "no reason given").split())
            befell.setdefault(error, []).append((unit.get("seed"), unit.get("subject")))
        steps = row.steps if row.kind == "method" else None
        lines = [
            Line(row.label, [Cell(str(len(units)), number=len(units)), Cell(error), Cell(_who(results, units))], steps)
            for error, units in befell.items()
        ]
        sections += [lines] if lines else []
    if not sections:
        return ["No unit failed."]
    head = ["units", "error", "subjects"]
    note = "A unit is one subject under one seed. Those that failed are missing from the scores."
    return [note, Table("failures", head, sections, words=head[1:])]


def _who(results: Results, units: Sequence[tuple[Any, Any]]) -> str:
    """The subjects of failed units by seed."""
    said = []
    for seed in dict.fromkeys(seed for seed, _ in units):
        subjects = [subject for other, subject in units if other == seed]
        if len(subjects) > 1 and len(set(subjects)) == len(results.subjects):
            names = f"all {len(results.subjects)}"
        else:
            names = ", ".join(dict.fromkeys(_subject(results, subject) for subject in subjects))
        said.append(f"{names} (seed {seed})")
    return "; ".join(said)


def _subject(results: Results, index: Any) -> str:
    known = isinstance(index, int) and 0 <= index < len(results.subjects)
    return results.subjects[index] if known else f"subject {index}"


def _definitions(results: Results) -> list[Block]:
    pairs = []
    for score in results.columns:
        way = "higher is better" if score.higher else "lower is better"
        about = f"{score.about.rstrip('.')}; {way}." if score.about else f"{capital(way)}."
        pairs.append((score.label, about))
    return [Pairs(pairs)] if pairs else []


def _settings(results: Results) -> list[Block]:
    pairs: list[tuple[str, str | list[str]]] = [
        (name, value)
        for name, value in (
            ("model", results.model),
            ("fingerprint", results.fingerprint),
            ("device", results.device),
            ("subjects", str(len(results.subjects))),
        )
        if value
    ]
    for name, value in results.settings.items():
        if value in ([], {}, "", None):
            continue
        if isinstance(value, list) and any(isinstance(item, str) for item in value):
            pairs.append((name, [str(item) for item in value]))
        elif isinstance(value, list):
            pairs.append((name, ", ".join(json.dumps(item) for item in value)))
        else:
            pairs.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    joined = [f"{row.name}: {row.joined['command']}, on {row.joined['device']}" for row in results.rows if row.joined]
    if joined:
        pairs.append(("measured by other runs", joined))
    return [Pairs(pairs)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
