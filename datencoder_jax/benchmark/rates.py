"""Learning rates for every row, chosen on development instances of the embedded world, never on those of the table.

    product = mean over individuals of identity x prompt                                        (1)

that is by the score of the table that neither copying the input picture nor forgetting it wins. Each row climbs from
its method's own rates until no neighbour is worth going to (`_WORTH`), the offsets' rate by halves of a power of ten
first and then by quarters, the embeddings' by halves; a rate of 0 stays 0. All rows climb at once, and every picture is
a unit of its own below `FOLDER/sweep/`, so a sweep goes on where it was killed too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datencoder_jax.benchmark.entries import Row
from datencoder_jax.benchmark.learning_rates import CHOSEN, RateChoice
from datencoder_jax.benchmark.making import open_suite
from datencoder_jax.benchmark.run import execute
from datencoder_jax.benchmark.suites import PRODUCT, Setup, means
from datencoder_jax.benchmark.units import Unit, folder_of, make_units, of_row, read_made
from datencoder_jax.checkpoints.atomic import atomic_write
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.suite import instances
from datencoder_jax.typing import LearningRates

RATES = "rates.json"
_FORMAT = "datencoder-rates"
_FACTORS = LearningRates(embeddings=10**0.5, offsets=10**0.25)
"""By what a place further on changes each rate: that of the offsets decides more."""

_WORTH = 0.002
"""What (1) must gain for a place to be gone to: less is the luck of a few individuals, and a row would walk for hours
along a rate that changes nothing."""
_FAILED = -1e9
"""What (1) is of rates that failed on somebody."""

Place = tuple[int, int]


@dataclass
class Climb:
    """A row's way to its rates: the place it is at, and what every place it has been tried at gave."""

    row: Row
    best: Place = (0, 0)
    stride: int = 2
    tried: dict[Place, dict[str, float]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether no neighbour is worth going to."""
        return not self.stride

    def rates(self, place: Place) -> LearningRates:
        """The rates at a place."""
        parts = zip(self.row.rates, _FACTORS, place, strict=True)
        return LearningRates(*(rate * factor**steps for rate, factor, steps in parts))

    def neighbours(self) -> list[Place]:
        """The place itself and those next to it, without the ones that change a rate of 0."""
        first, second = self.best
        moves = [(d, 0) for d in (-1, 1) if self.row.rates.embeddings]
        moves += [(0, d * self.stride) for d in (-1, 1) if self.row.rates.offsets]
        return [self.best, *((first + a, second + b) for a, b in moves)]

    def move(self) -> None:
        """Goes to the best neighbour, all of which have been tried; takes smaller steps where none is worth it."""
        better = max(self.neighbours(), key=lambda place: self.tried[place][PRODUCT])
        if self.tried[better][PRODUCT] > self.tried[self.best][PRODUCT] + _WORTH:
            self.best = better
        else:
            # Where only the embeddings are tuned there are no smaller steps.
            self.stride = self.stride // 2 if self.row.rates.offsets else 0


def sweep(folder: Path, setup: Setup, rows: Sequence[Row], count: int, run: Callable[..., None] = execute) -> list[str]:
    """Chooses the rates of rows on `count` development instances, and adds them to `FOLDER/rates.json`.

    Rows without steps, with rates of their own, or chosen in that file before, are left alone, as are those that the
    folder has units of, which were made at other rates; for a row that fails wherever it is tried, nothing is chosen.

    Args:
        run: does units; `run.execute` with the options of the command.

    Returns:
        The names of the rows whose units are there without their rates having been chosen.
    """
    chosen = read_rates(folder / RATES)["chosen"] if (folder / RATES).exists() else {}
    open_rows = [row for row in _rated(rows) if row.name not in chosen]
    climbs = [Climb(row) for row in open_rows if not folder_of(folder, row).exists()]
    settled = [row.name for row in open_rows if folder_of(folder, row).exists()]
    setup = replace(setup, split="development", instances=count)
    while active := [climb for climb in climbs if not climb.done]:
        trials = [
            (climb, place, _trial(folder, climb, place, setup))
            for climb in active
            for place in climb.neighbours()
            if place not in climb.tried
        ]
        run(setup, [unit for _, _, units in trials for unit in units], title="choosing rates")
        for climb, place, units in trials:
            climb.tried[place] = {**climb.rates(place)._asdict(), **_measure(setup, units)}
        for climb in active:
            climb.move()
            if climb.done and climb.tried[climb.best][PRODUCT] > _FAILED:
                _record(folder, climb, count)
    return settled


def read_rates(path: Path) -> dict[str, Any]:
    """A file of rates: `chosen`, `tried`, and as far as it is known what they were `chosen_on`, by row.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError("it is of another kind")
        {name: LearningRates(*map(float, rates)) for name, rates in content["chosen"].items()}
        [(about.get("individuals"), about.get("classes")) for about in content.get("chosen_on", {}).values()]
    except FileNotFoundError:
        raise UserError(f"There is no file of learning rates {path}; --sweep writes one.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} holds no learning rates ({error}); name a rates.json that --sweep wrote.") from error
    return content


def with_rates(rows: Sequence[Row], path: Path) -> tuple[list[Row], list[str]]:
    """The rows at the rates chosen in a file, and the names of those it says nothing of, which keep theirs."""
    content = read_rates(path)
    chosen = content["chosen"]
    told = _rated(rows)
    missing = [row.name for row in told if row.name not in chosen]
    found = {
        row.name: replace(row, rates=LearningRates(*chosen[row.name]), choice=_choice(content, row.name))
        for row in told
        if row.name in chosen
    }
    return [found.get(row.name, row) for row in rows], missing


def _choice(content: Mapping[str, Any], name: str) -> RateChoice:
    """On how many individuals a row's rates were chosen, as far as the file says."""
    about = content.get("chosen_on", {}).get(name, {})
    return RateChoice(CHOSEN, about.get("individuals"), about.get("classes"))


def _rated(rows: Sequence[Row]) -> list[Row]:
    """Those that are tuned, at rates that nobody named."""
    return [row for row in rows if row.steps and any(row.rates) and "rates" not in row.entry.options]


def _trial(folder: Path, climb: Climb, place: Place, setup: Setup) -> list[Unit]:
    rates = climb.rates(place)
    row = replace(climb.row, rates=rates)
    # What an earlier encoder or another momentum gave says nothing of these.
    digest = hashlib.sha256(json.dumps(of_row(setup, row)).encode()).hexdigest()[:8]
    return make_units(folder / "sweep" / f"{rates.embeddings:.3g}_{rates.offsets:.3g}-{digest}", [row], setup, 1)


def _measure(setup: Setup, units: Sequence[Unit]) -> dict[str, float]:
    """Means of every score over a trial's units, and equation (1); one that failed anywhere is worse than any other."""
    if any(not unit.file.exists() for unit in units):
        return {PRODUCT: _FAILED}
    suite, who = open_suite(setup), range(len(units))
    cells = suite.score([unit.subject for unit in units], (read_made(unit).pictures for unit in units))
    each = {name: means(who, value, len(units)) for name, value in cells.items()}
    each[PRODUCT] = each[suite.axes["identity"]] * each[suite.axes["prompt"]]
    return {name: round(float(value.mean()), 4) for name, value in each.items()}


def _record(folder: Path, climb: Climb, count: int) -> None:
    path = folder / RATES
    content = read_rates(path) if path.exists() else {"format": _FORMAT, "chosen": {}, "tried": {}}
    content["chosen"][climb.row.name] = list(climb.rates(climb.best))
    content["tried"][climb.row.name] = list(climb.tried.values())
    classes = len({individual.cls for individual in instances("development", count)})
    content.setdefault("chosen_on", {})[climb.row.name] = {"individuals": count, "classes": classes}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
