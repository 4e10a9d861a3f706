"""Units of work and their files: what is there need not be done again, which is all that going on takes.

FOLDER/units/ENTRY/STEPS/SUBJECT-SEED.npz           pictures, seconds, bytes, trained, device: whole or not at all
FOLDER/units/ENTRY/STEPS/SUBJECT-SEED.error.txt     one sentence: it failed
FOLDER/settings.json                                what the units were made with
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from datencoder_jax.benchmark.entries import BASE, Row, parse_entries, slug
from datencoder_jax.benchmark.learning_rates import CHOSEN, DEFAULT, NAMED, RateChoice
from datencoder_jax.benchmark.making import Made, open_pipeline, open_suite
from datencoder_jax.benchmark.suites import Setup, digest
from datencoder_jax.checkpoints.atomic import atomic_write
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS
from datencoder_jax.tuning import momentum_for
from datencoder_jax.typing import LearningRates

SETTINGS = "settings.json"
_FORMAT = "datencoder-evaluation-settings-2"


@dataclass(frozen=True)
class Unit:
    """A row's work on one subject with one seed.

    Attributes:
        folder: of the run, or of a trial of learning rates.
        subject: its index in the suite; `name` is what files call it.
    """

    folder: Path
    row: Row
    subject: int
    name: str
    seed: int

    @property
    def file(self) -> Path:
        """Where its result is."""
        return folder_of(self.folder, self.row) / f"{self.name}-{self.seed}.npz"

    @property
    def error_file(self) -> Path:
        """Where it says why it failed."""
        return self.file.with_suffix(".error.txt")

    @property
    def error(self) -> str | None:
        """Why it failed; None if it did not, or has not been tried."""
        if self.file.exists():  # tried again, and killed before the sentence was gone
            return None
        try:
            return self.error_file.read_text("utf-8").strip()
        except FileNotFoundError:
            return None

    @property
    def done(self) -> bool:
        """Whether it has been tried, with whatever outcome."""
        return self.file.exists() or self.error_file.exists()


def folder_of(folder: Path, row: Row) -> Path:
    """Where a run keeps a row's units; there is none before the first of them has been tried."""
    return folder / "units" / row.entry.slug / str(row.steps)


def make_units(folder: Path, rows: Sequence[Row], setup: Setup, seeds: int) -> list[Unit]:
    """All units, so ordered that a first table is there early: all rows with the first seed, then with the next."""
    subjects = [subject.name for subject in open_suite(setup).subjects]
    dashed = [subject.replace(" ", "-") for subject in subjects]
    # Where "red car" stands beside "red-car", dashes would give both the same files.
    names = [slug(dash if dashed.count(dash) == 1 else name) for name, dash in zip(subjects, dashed, strict=True)]
    return [
        Unit(folder, row, subject, name, seed)
        for seed in range(seeds)
        for row in rows
        for subject, name in enumerate(names)
    ]


def write_made(unit: Unit, made: Made) -> None:
    """Writes a unit's result."""
    seconds = {f"seconds_{name}": np.float64(value) for name, value in made.seconds.items()}
    arrays: dict[str, Any] = {"pictures": made.pictures, "bytes": np.int64(made.bytes)}
    arrays |= seconds | {"trained": np.int64(made.trained), "device": np.str_(made.device)}
    with atomic_write(unit.file) as temporary:
        np.savez_compressed(temporary, **arrays)
    unit.error_file.unlink(missing_ok=True)


def write_error(unit: Unit, sentence: str) -> None:
    """Writes why a unit failed."""
    with atomic_write(unit.error_file) as temporary:
        temporary.write_text(sentence + "\n", "utf-8", errors="backslashreplace")


def read_made(unit: Unit) -> Made:
    """A unit's result.

    Raises:
        UserError: the file is damaged; deleting it has the unit done again.
    """
    try:
        with open(unit.file, "rb") as stream, np.load(stream) as file:  # NumPy leaves a damaged one open
            seconds = {name.removeprefix("seconds_"): float(file[name]) for name in file if name.startswith("seconds_")}
            device = str(file["device"]) if "device" in file else ""
            return Made(file["pictures"], seconds, int(file["bytes"]), int(file["trained"]), device)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{unit.file} is damaged ({error}); delete it and run the same command again.") from error


def enter(folder: Path, setup: Setup, rows: Sequence[Row], seeds: int) -> tuple[list[Row], int]:
    """Takes a folder for a run: checks that what is there was made with the same settings, and adds what is new.

    Returns:
        The rows of this run and of those before, and the most seeds of any.

    Raises:
        UserError: the folder was made with other settings, or another encoder; names the first that differs.
    """
    content = _content(setup)
    told = {row.name: of_row(setup, row) for row in rows}
    path = folder / SETTINGS
    old: dict[str, Any] = {"settings": content, "rows": {}, "seeds": 0}
    if path.exists():
        old = read_settings(folder)
        before = old["settings"].pop("subjects", [])
        _check(path, old["settings"], {name: value for name, value in content.items() if name != "subjects"})
        _check_subjects(folder, before, content["subjects"])
        for row in rows:
            if row.name in old["rows"] and folder_of(folder, row).exists():
                _check(path, old["rows"][row.name], told[row.name], f" of {row.name}")
        _check_encoders(path, old["rows"], told)
    elif (folder / "units").exists():
        raise UserError(f"{folder} holds units but no {SETTINGS}, so nobody knows what they are; choose another --out.")
    seeds = max(seeds, old["seeds"])
    choices = _choices(old, rows, told)
    merged = {"format": _FORMAT, "settings": content, "seeds": seeds, "rows": old["rows"] | told, "choices": choices}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
    rows = [replace(row, choice=RateChoice(*choices[row.name])) for row in rows]
    return [*rows, *rows_of({name: about for name, about in old["rows"].items() if name not in told}, choices)], seeds


def rows_of(
    told: Mapping[str, Mapping[str, Any]], choices: Mapping[str, Sequence[Any]] = MappingProxyType({})
) -> list[Row]:
    """Rows as settings tell of them; where their rates come from is inferred where `choices` does not say."""
    rows = []
    for name, about in told.items():
        # Names are read with their steps, since labels too may hold an @.
        entry, rates = parse_entries([name])[0], LearningRates(*about["rates"])
        source = NAMED if "rates" in entry.options else DEFAULT if rates == entry.rates else CHOSEN
        choice = RateChoice(*choices[name]) if name in choices else RateChoice(source)
        rows.append(Row(entry, about["steps"], rates, choice))
    return rows


def _choices(old: Mapping[str, Any], rows: Sequence[Row], told: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Where every row's rates come from, by name.

    A row that now has its method's rates and had the same ones before, chosen, still has chosen ones.
    """
    before = old.get("choices", {})
    found = {name: list(choice) for name, choice in before.items()}
    for row in rows:
        same = row.name in before and old["rows"].get(row.name, {}).get("rates") == told[row.name]["rates"]
        if not (same and row.choice.source == DEFAULT):
            found[row.name] = list(row.choice)
    return found


def seeds_of(folder: Path) -> int:
    """How many seeds a folder has been entered with; 0 for a new one."""
    return read_settings(folder)["seeds"] if (folder / SETTINGS).exists() else 0


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder's units were made with: `settings`, `rows` by name, `seeds`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT or not {"settings", "rows", "seeds"} <= content.keys():
            raise ValueError("it is of another kind, or of an earlier version of this program")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no evaluation; there is no {path}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another --out.") from error
    return content


def _check(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], of: str = "") -> None:
    new = json.loads(json.dumps(new))
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            raise UserError(
                f"{path.parent} was made with other settings: {name}{of} was {_shown(old.get(name))} and is now "
                f"{_shown(new.get(name))}; choose another --out."
            )


def _check_subjects(folder: Path, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> None:
    names = [[subject["name"] for subject in some] for some in (old, new)]
    if names[0] != names[1]:
        raise UserError(
            f"{folder} was made with other settings: subjects was {_shown(names[0])} and is now {_shown(names[1])}; "
            "choose another --out."
        )
    for before, now in zip(old, new, strict=True):
        if before["class"] != now["class"]:
            raise UserError(f"{folder} was made when {now['name']} was a {before['class']}; choose another --out.")
        if before["given"] != now["given"]:
            raise UserError(f"{folder} was made with another picture of {now['name']}; choose another --out.")
        if before.get("prompts", now.get("prompts")) != now.get("prompts"):
            raise UserError(f"{folder} was made with other prompts of {now['name']}; choose another --out.")


def _check_encoders(path: Path, old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> None:
    """Sees that no label stands for two encoders, at different steps."""
    encoders = {name.rpartition("@")[0]: about.get("encoder") for name, about in new.items()}
    for name, about in old.items():
        if (label := name.rpartition("@")[0]) in encoders:
            _check(path, {"encoder": about.get("encoder")}, {"encoder": encoders[label]}, f" of {name}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _content(setup: Setup) -> dict[str, Any]:
    pipeline = open_pipeline(setup.unscored)
    content = setup.content() | {"guidance": pipeline.guidance if setup.guidance is None else setup.guidance}
    content |= {"draws": setup.draws or pipeline.memory.draws, "fingerprint": pipeline.fingerprint}
    content |= {"dtype": pipeline.dtype, "subjects": told_subjects(setup), "prompts": shown_prompts(setup)}
    return json.loads(json.dumps(content))


def told_subjects(setup: Setup) -> list[dict[str, Any]]:
    """The subjects: name, class, a digest of the pictures that methods are given, and the suite's own digests.

    Raises:
        UserError: one of these cannot be read.
    """
    suite = open_suite(setup)
    return [
        {"name": subject.name, "class": subject.word, "given": digest(suite.given(k)), **suite.digests(k)}
        for k, subject in enumerate(suite.subjects)
    ]


def shown_prompts(setup: Setup) -> list[str]:
    """The prompts by number; where subjects differ in theirs, all that have this number."""
    suite = open_suite(setup)
    each = zip(*(suite.prompts(k) for k in range(len(suite.subjects))), strict=True)
    return [" / ".join(dict.fromkeys(texts)) for texts in each]


def of_row(setup: Setup, row: Row) -> dict[str, Any]:
    """What a row depends on beside the settings of all: rates, options, how it is tuned, its encoder as it now is."""
    about: dict[str, Any] = {"steps": row.steps, "rates": list(row.rates)}
    if row.entry.method == BASE:
        return about
    method, options = METHODS[row.entry.method], row.entry.options
    if row.steps:
        tuning = {"momentum": momentum_for(row.steps), **method.own}
        about |= {name: options.get(name, value) for name, value in tuning.items()}
    encoder = method.encoder and getattr(open_pipeline(setup.unscored, row.entry.encoder), method.encoder)
    if not encoder:
        return about
    if method.encoder == "encoder" and not row.steps:
        about["gains"] = list(options.get("gains", encoder.config.gains))
    return about | {"encoder": _identity(encoder.params)}


def _identity(params: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode() + np.asarray(params[name]).tobytes())
    return digest.hexdigest()[:16]


def by_row(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Units by the name of their row."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.row.name, []).append(unit)
    return found
