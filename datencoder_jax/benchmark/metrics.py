"""From units to a table: scores per subject, seconds, sizes and failures of every row, in `metrics.json`.

A row's value for a subject is the mean over its prompts, pictures and seeds, as far as they are there; null where none
is. `product` is, of a subject, its mean identity times its mean prompt score. Seconds are medians over the units, which
leaves out what else the machine did, without compiling; bytes and trained numbers are those of the first unit.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datencoder_jax.benchmark.entries import BASE, Row
from datencoder_jax.benchmark.goals import goals
from datencoder_jax.benchmark.joining import FORMAT, VERSION, check_joined, joined_rows, left_out
from datencoder_jax.benchmark.making import Made, open_pipeline, open_suite
from datencoder_jax.benchmark.sheets import choose_tiles, write_sheet
from datencoder_jax.benchmark.suites import PRODUCT, TOYWORLD, Reference, Score, Setup, Suite, means
from datencoder_jax.benchmark.units import Unit, by_row, read_made, read_settings, shown_prompts, told_subjects
from datencoder_jax.checkpoints.atomic import atomic_write

METRICS = "metrics.json"
_AT_ONCE = 64
"""Units scored at a time."""
_STAGES = ("predict", "tune", "draw")


class Metrics:
    """The numbers of a run as far as it has come; a row whose units have not changed is scored once.

    Args:
        folder: of the run, which `units.enter` has been given its rows.
        units: all of them, done or not.
        about: what `metrics.json` says of the run: `command`, `device`, `settings`.
        others: runs whose rows are joined, as `joining.read_joined` gives them.
        warnings: what the command warns of, which the report has to say too.

    Raises:
        UserError: one of the others differs from this run.
    """

    def __init__(
        self,
        folder: Path,
        setup: Setup,
        rows: Sequence[Row],
        units: Sequence[Unit],
        about: Mapping[str, Any],
        others: Sequence[tuple[Path, Mapping[str, Any]]] = (),
        warnings: Sequence[str] = (),
    ):
        self.warnings = warnings
        self.folder, self.setup, self.rows, self.about = folder, setup, rows, about
        self.units, self.others = by_row(units), others
        self.suite = open_suite(setup)
        self._known: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._made_with = read_settings(folder)["rows"]
        check_joined(make_frame(setup, about), others)
        own = [{"label": r.entry.label, "steps": r.steps, "made_with": self._made_with[r.name]} for r in rows]
        self.left_out = left_out(own, others)
        """Sentences on rows of others that are not joined."""

    def row(self, row: Row) -> dict[str, Any]:
        """One row of `metrics.json`."""
        units = self.units.get(row.name, [])
        done = [unit for unit in units if unit.file.exists()]
        tried = len(done), sum(unit.error is not None for unit in units)
        known = self._known.get(row.name)
        if known is None or known[0] != tried:
            self._known[row.name] = tried, self._row(row, units, done)
        return self._known[row.name][1]

    def line(self, row: Row) -> str:
        """What is said of a row that is finished."""
        found = self.row(row)
        shown = [*dict.fromkeys([*self.suite.axes.values(), PRODUCT])]
        parts = [f"{name} {_mean(found['values'][name]):.3f}" for name in shown if found["by_prompt"].get(name)]
        seconds = found["seconds"]
        if spent := [seconds[stage] for stage in ("predict", "tune") if stage in seconds]:
            parts.append(f"{sum(spent):.2f} s")
        parts += [f"{len(found['failed'])} failed"] if found["failed"] else []
        parts += [f"{found['unfinished']} to come"] if found["unfinished"] else []
        return f"{row.name}: {', '.join(parts)}"

    def write(self) -> dict[str, Any]:
        """Writes `metrics.json` and the sheets of pictures, and returns the former."""
        suite, pipeline = self.suite, open_pipeline(self.setup.unscored)
        tiles = choose_tiles(suite, len(suite.prompts(0)), pipeline.resolution)
        shown = [suite.given(k)[0] for k in tiles["subjects"]]
        write_sheet(self.folder / "pictures" / "inputs.png", [shown], tiles["side"])
        rows = [self._reference(k, reference, tiles) for k, reference in enumerate(suite.references())]
        rows += [self._shown(row, tiles) for row in self.rows]
        rows += joined_rows(rows, tiles, self.others, self.folder)
        frame = make_frame(self.setup, self.about)
        content = {**frame, "rows": rows, "tiles": tiles, "inputs": "pictures/inputs.png"}
        content["warnings"] = [*self.warnings, *self.left_out]
        if self.setup.suite == TOYWORLD:
            content["goals"] = goals(content)
        with atomic_write(self.folder / METRICS) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
        return content

    def _row(self, row: Row, units: Sequence[Unit], done: Sequence[Unit]) -> dict[str, Any]:
        who, parts = [unit.subject for unit in done], []
        made: list[Made] = []
        for first in range(0, len(done), _AT_ONCE):
            pictures = _read(done[first : first + _AT_ONCE], made)
            parts.append(self.suite.score(who[first : first + _AT_ONCE], pictures))
        values, by_prompt = {}, {}
        for name in self.suite.scores:
            if not parts:
                values[name] = np.full(len(self.suite.subjects), np.nan)
                continue
            cells = np.concatenate([part[name] for part in parts])
            values[name] = means(who, cells, len(self.suite.subjects))
            by_prompt[name] = cells.mean(axis=(0, 2))
        self._add_product(values, by_prompt)
        base = row.entry.method == BASE
        failed = [(unit, unit.error) for unit in units]
        return {
            "kind": "reference" if base else "method",
            "label": "base model, class word" if base else row.entry.label,
            "method": row.entry.method,
            "options": {name: _plain(value) for name, value in row.entry.options.items()},
            "steps": None if base else row.steps,
            "rates": None if base or not row.steps else [float(rate) for rate in row.rates],
            "rate_choice": None if base or not row.steps or not any(row.rates) else row.choice._asdict(),
            "made_with": self._made_with[row.name],
            "seconds": _seconds(made),
            "devices": sorted({each.device for each in made}),
            "bytes": made[0].bytes if made and not base else None,
            "trained": made[0].trained if made and not base else None,
            **_numbers(values, by_prompt),
            "failed": [{"subject": u.subject, "seed": u.seed, "error": error} for u, error in failed if error],
            "unfinished": sum(not unit.done for unit in units),
        }

    def _reference(self, index: int, reference: Reference, tiles: Mapping[str, Any]) -> dict[str, Any]:
        values, by_prompt = dict(reference.values), dict(reference.by_prompt)
        self._add_product(values, by_prompt)
        row: dict[str, Any] = {"kind": "reference", "label": reference.label, **_numbers(values, by_prompt)}
        if reference.pictures is not None:
            row["pictures"] = f"pictures/reference-{index}.png"
            chosen = reference.pictures[np.ix_(tiles["subjects"], tiles["prompts"])]
            write_sheet(self.folder / row["pictures"], chosen, tiles["side"])
        return row

    def _shown(self, row: Row, tiles: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its sheet."""
        found = self.row(row)
        first = {unit.subject: unit for unit in self.units.get(row.name, []) if unit.seed == 0 and unit.file.exists()}
        if not first:
            return found | {"pictures": None}
        sheet = []
        for subject in tiles["subjects"]:
            drawn = read_made(first[subject]).pictures if subject in first else None
            # Copies, since a view keeps all that the unit drew.
            sheet.append([None if drawn is None else drawn[prompt, 0].copy() for prompt in tiles["prompts"]])
        name = f"pictures/{row.slug}.png"
        write_sheet(self.folder / name, sheet, tiles["side"])
        return found | {"pictures": name}

    def _add_product(self, values: dict[str, np.ndarray], by_prompt: dict[str, np.ndarray]) -> None:
        axes = _axes(self.suite)
        if axes is not None:
            for part in (values, by_prompt):
                if all(name in part for name in axes):
                    part[PRODUCT] = part[axes[0]] * part[axes[1]]


def make_frame(setup: Setup, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `metrics.json` says beside rows and pictures; `about` as `make_about` gives it."""
    suite, pipeline = open_suite(setup), open_pipeline(setup.unscored)
    return {
        "format": FORMAT,
        "version": VERSION,
        "suite": setup.suite,
        "model": pipeline.name,
        "fingerprint": pipeline.fingerprint,
        **about,
        "scores": {name: _score(score) for name, score in _scores(suite).items()},
        "axes": dict(suite.axes),
        "groups": {name: list(indices) for name, indices in suite.groups.items()},
        "subjects": told_subjects(setup),
    }


def _read(units: Sequence[Unit], made: list[Made]) -> Iterator[np.ndarray]:
    """The pictures of units, one after the other; what else they tell is added to `made`."""
    for unit in units:
        found = read_made(unit)
        made.append(replace(found, pictures=np.empty(0, np.uint8)))  # photographs of a whole row fill a memory
        yield found.pictures


def _scores(suite: Suite) -> dict[str, Score]:
    scores = dict(suite.scores)
    if (axes := _axes(suite)) is not None:
        first, second = (scores[name].label for name in axes)
        about = f"of each subject, its mean {first} times its mean {second}"
        scores[PRODUCT] = Score(f"{first} x {second}", "", about)
    return scores


def _axes(suite: Suite) -> tuple[str, str] | None:
    axes = suite.axes
    return (axes["identity"], axes["prompt"]) if {"identity", "prompt"} <= axes.keys() else None


def make_about(setup: Setup, seeds: int, command: str, device: str, **more: Any) -> dict[str, Any]:
    """What `metrics.json` says of a run beside its numbers."""
    suite, pipeline = open_suite(setup), open_pipeline(setup.unscored)
    settings = setup.content() | {
        "dtype": pipeline.dtype,
        "prompts": shown_prompts(setup),
        "seeds": list(range(seeds)),
        "guidance": pipeline.guidance if setup.guidance is None else setup.guidance,
        "draws": setup.draws or pipeline.memory.draws,
        "instances": len(suite.subjects),
        "subject": suite.about,
        "missing": list(suite.missing),
        **more,
    }
    return {"command": command, "device": device, "settings": settings}


def _score(score: Score) -> dict[str, str]:
    return {"label": score.label, "unit": score.unit, "better": score.better, "about": score.about}


def _numbers(values: Mapping[str, np.ndarray], by_prompt: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "values": {name: [_rounded(x) for x in value] for name, value in values.items()},
        "by_prompt": {name: [_rounded(x) for x in value] for name, value in by_prompt.items()},
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _seconds(made: Sequence[Made]) -> dict[str, float]:
    """Medians by stage; what else was timed (prior pictures) counts as tuning."""
    each = [dict(one.seconds) for one in made]
    for one in each:
        rest = sum(one.pop(name) for name in list(one) if name not in _STAGES)
        if rest:
            one["tune"] = one.get("tune", 0.0) + rest
    stages = [stage for stage in _STAGES if any(stage in one for one in each)]
    return {stage: round(float(np.median([one.get(stage, 0.0) for one in each])), 4) for stage in stages}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else str(value)
