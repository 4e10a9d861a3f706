"""From sources to batches: shuffled, mixed by weights, repeated for ever, and every row a pure function of its number.

Row i of the batch of step t is row n = t B + i of one endless sequence, for a global batch of B rows. Grain says which
item it is: the sources take turns in proportion to their weights, and each goes through all of its items in a new order
before any comes again. All that is drawn for the row (crop, mirroring, template) comes from a generator seeded with
(seed, n), so batches are the same however many processes share them, and wherever a run is taken up again.

A feed may hold pictures out (`data.held_out`): no row shows one, and `held_out` gives batches of nothing else.

An item that cannot be used, or is held out, is replaced by others of its source, drawn from the row's own generator,
until one can. One that storage does not give for the moment is replaced in its row alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, cast

import numpy as np

from datencoder_jax.data.folder import listed
from datencoder_jax.data.held_out import HeldOut
from datencoder_jax.data.items import DAMAGED_CAPTION, DamagedItem, Item, Prepared, Source, read_item
from datencoder_jax.data.views import Crop, draw_crop, make_views
from datencoder_jax.errors import UserError, is_passing, raise_if_passing

_LOUD = 10
"""So many damaged items of a kind are logged as warnings, the others for those who ask for them (level INFO)."""
_ENOUGH = 64
"""After so many rows of a source the share of damaged items is trusted, and after so many items that storage did not
give, one after the other, it is taken to be away."""
_SPARE = 4
"""So many held-out pictures are looked at for each that is asked for, since some may be damaged."""
_WHOLE = Crop(1.0, 0.5, 0.5, False)

Finding = tuple[int, int | None, str]
"""The number of a source, that of an item in it (None: storage did not give it for the moment), and what is wrong."""

_log = logging.getLogger("datencoder_jax")


class Feed:
    """Batches for training.

    Args:
        sources: where the items come from.
        weights: the shares of the sources, in any unit.
        batch_size: rows of the global batch.
        seed: of the order and of all that is drawn for the rows.
        resolution: side of "images" in pixels.
        vision_size: side of "vision" in pixels; None: batches come without.
        crop: the least side of a random crop, as a share of the picture's shorter side; 1: the largest square.
        flip: whether one half of the pictures is mirrored.
        templates: how many there are to draw from.
        min_side: pictures of which fewer pixels than this a side would be shown are left out; None: half of
            `resolution`.
        hold_out: whether some pictures are kept from all rows.

    Raises:
        UserError: a setting makes no sense, or Grain is not installed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        resolution: int,
        vision_size: int | None,
        crop: float = 0.8,
        flip: bool = True,
        templates: int = 1,
        min_side: int | None = None,
        hold_out: bool = False,
    ):
        if not sources or len(weights) != len(sources):
            raise UserError(f"There are {len(sources)} sources of data and {len(weights)} weights; give one for each.")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise UserError("Weights of sources of data are positive numbers; leave a source out to give it none.")
        if empty := [source.name for source in sources if not len(source)]:
            raise UserError(f"{empty[0]} is empty; name another source of data.")
        if not 0 < crop <= 1:
            raise UserError(f"crop is a share of the shorter side between 0 and 1, not {crop}.")
        self.sources, self.batch_size, self.seed = list(sources), batch_size, seed
        self._sizes = (resolution,) if vision_size is None else (resolution, vision_size)
        self._crop, self._flip, self._templates = crop, flip, templates
        self._min_side = resolution // 2 if min_side is None else min_side
        self._first = np.cumsum([0, *map(len, self.sources)]).tolist()
        self._order = _order([len(source) for source in self.sources], weights, seed)
        self._damage = [Damage(source) for source in self.sources]
        self._elsewhere: list[list[tuple[int | None, str]]] = [[] for _ in self.sources]
        self._captions: list[set[int]] = [set() for _ in self.sources]  # damaged ones that others were told of
        self._held_out = [HeldOut(source) for source in self.sources] if hold_out else []
        parts = [f"{len(source)} {source.identity} {weight}" for source, weight in zip(sources, weights, strict=True)]
        self.identity = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
        """Changes when the sources' items, their order or the weights do."""

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Some rows of the global batch of a step; safe in several threads.

        Returns:
            "images": uint8 `[b, R, R, 3]` and "vision": uint8 `[b, S, S, 3]`, two views of the same crops; or, in their
            place, the arrays of a `Prepared` item, stacked. "concepts": int32 `[b]`, equal for two visits of the same
            picture. "templates": int32 `[b]`, below `templates`.

        Raises:
            UserError: more than one half of a source is damaged.
            PassingError: storage is away for a while.
        """
        start, stop, _ = (rows or slice(None)).indices(self.batch_size)
        batch: dict[str, np.ndarray] = {}
        for place, row in enumerate(range(start, stop)):
            values = self.row(step * self.batch_size + row)
            for name, value in values.items():
                if name not in batch:
                    batch[name] = np.empty((stop - start, *value.shape), value.dtype)
                batch[name][place] = value
            if values.keys() != batch.keys():
                raise UserError("Prepared and other sources of data cannot be mixed; use one kind.")
        return batch

    def row(self, number: int) -> dict[str, np.ndarray]:
        """One row of the endless sequence."""
        rng = np.random.default_rng([self.seed, number])
        template = rng.integers(self._templates)
        crop = draw_crop(rng, self._crop, self._flip)
        which, index = self.planned(number)
        source, damage = self.sources[which], self._damage[which]
        for attempt in range(_ENOUGH):
            values = self._values(which, index, crop)
            damage.check(planned=attempt == 0, damaged=damage.known(index))
            if values is not None:
                break
            index = int(rng.integers(len(source)))
        else:
            damage.raise_if_away()
            raise UserError(
                f"{source.name}: {_ENOUGH} pictures one after the other cannot be used{listed(damage.report())}; "
                "check the data."
            )
        concept = (self._first[which] + index // getattr(source, "views", 1)) % 2**31
        return {**values, "concepts": np.array(concept, np.int32), "templates": np.array(template, np.int32)}

    def held_out(self, count: int, seed: int) -> dict[str, np.ndarray]:
        """A batch of held-out pictures, each in its largest square and not mirrored.

        Args:
            count: how many rows; there are fewer where fewer are held out and can be used, and there may be none.
            seed: of the choice.

        Returns:
            "images" and "vision", or the arrays of `Prepared` items, as `batch` gives them; empty without a picture.
        """
        rows: list[dict[str, np.ndarray]] = []
        left = [held.indices(seed + which, _SPARE * count) for which, held in enumerate(self._held_out)]
        turns = iter(range(_SPARE * count * max(len(left), 1)))
        while left and len(rows) < count and (turn := next(turns, None)) is not None:
            which = self.planned(turn)[0]
            index = next(left[which], None)
            values = None if index is None else self._arrays(which, index, _WHOLE)
            if values is not None:
                rows.append(values)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def planned(self, number: int) -> tuple[int, int]:
        """The number of the source and that of the item in it which a row shows, unless the item is damaged."""
        return cast(tuple[int, int], self._order[number])

    def _values(self, which: int, index: int, crop: Crop) -> dict[str, np.ndarray] | None:
        """The arrays of an item, or None if it cannot be used."""
        damage = self._damage[which]
        if damage.known(index):
            return None
        try:
            item = read_item(self.sources[which], index)
            if self._held_out and self._held_out[which].contains(self._held_out[which].key(index, item)):
                return None
            values = self._shown(item, crop)
        except DamagedItem as error:
            damage.add(index, error)
            return None
        damage.usable()
        return values

    def _arrays(self, which: int, index: int, crop: Crop) -> dict[str, np.ndarray] | None:
        """As `_values`, of a picture that is held out, whose damage nobody counts."""
        with suppress(DamagedItem):
            return self._shown(read_item(self.sources[which], index), crop)
        return None

    def _shown(self, item: Item | Prepared, crop: Crop) -> dict[str, np.ndarray]:
        if isinstance(item, Prepared):
            return dict(item.arrays)
        return dict(zip(("images", "vision"), make_views(item, crop, self._sizes, self._min_side), strict=False))

    def report(self) -> dict[str, int]:
        """What was left out by the sources, and what was found damaged so far, by reason.

        It counts what this process found, and what it was told of others' findings (`add_findings`), each item once.
        """
        total: Counter[str] = Counter()
        for which, (source, damage) in enumerate(zip(self.sources, self._damage, strict=True)):
            total.update(source.report)
            total.update(damage.report(self._elsewhere[which]))
            captions = getattr(source, "damaged_captions", frozenset())
            told = {index for index, reason in self._elsewhere[which] if reason == DAMAGED_CAPTION}
            if further := told - captions:
                total[DAMAGED_CAPTION] += len(further)
        return dict(total)

    def findings(self) -> list[Finding]:
        """What this process has found damaged since it was asked before."""
        found: list[Finding] = []
        for which, (source, damage) in enumerate(zip(self.sources, self._damage, strict=True)):
            captions = set(getattr(source, "damaged_captions", ())) - self._captions[which]
            self._captions[which] |= captions
            found += [(which, index, reason) for index, reason in damage.news()]
            found += [(which, index, DAMAGED_CAPTION) for index in sorted(captions)]
        return found

    def add_findings(self, findings: Iterable[Sequence[Any]]) -> None:
        """Counts what another process has found, as its `findings` gave it; items are used or not as before."""
        for which, index, reason in findings:
            self._elsewhere[which].append((index, reason))


def _order(lengths: list[int], weights: Sequence[float], seed: int):
    """The endless sequence of (source, index)."""
    try:
        import grain
    except ImportError as error:
        raise UserError('Training on data needs Grain: pip install "datencoder_jax[pretrain]".') from error
    sources = []
    for which, length in enumerate(lengths):
        own_seed = int(np.random.SeedSequence([seed, which]).generate_state(1)[0])
        shuffled = grain.MapDataset.range(length).shuffle(seed=own_seed).repeat()
        sources.append(shuffled.map(lambda index, which=which: (which, index)))
    return grain.MapDataset.mix(sources, weights)


class Damage:
    """The damaged items of one source, each counted and logged once, and those that storage does not give for now."""

    def __init__(self, source: Source):
        self._source = source
        self._lock = threading.Lock()
        self._items: dict[int, str] = {}
        self._passing: Counter[str] = Counter()
        self._news: list[tuple[int | None, str]] = []
        self._loud: Counter[str] = Counter()
        self._rows = self._damaged_rows = 0
        self._away = 0  # items one after the other that storage did not give
        self._last: DamagedItem | None = None  # of those

    def known(self, index: int) -> bool:
        return index in self._items

    def usable(self) -> None:
        self._away = 0

    def add(self, index: int, error: DamagedItem) -> None:
        """Raises `PassingError` after many items one after the other that storage did not give."""
        passing = is_passing(error)
        with self._lock:
            if index in self._items:  # by another thread
                return
            if passing:  # it may be there the next time
                self._away += 1
                self._last = error
                self._passing[error.reason] += 1
            else:
                self._items[index] = error.reason
            self._loud[error.reason] += 1
            self._news.append((None if passing else index, error.reason))
            level = logging.WARNING if self._loud[error.reason] <= _LOUD else logging.INFO
        _log.log(level, "%s: %s is left out: %s.", self._source.name, error.key, error.reason)
        if self._away >= _ENOUGH:
            self.raise_if_away()

    def raise_if_away(self) -> None:
        """Raises `PassingError` if storage did not give the items asked for last."""
        if self._away and self._last is not None:
            raise_if_passing(self._last, self._source.name)

    def check(self, *, planned: bool, damaged: bool) -> None:
        """Counts what a row was planned to show: each item of a pass once, so that the share is that of the source."""
        if planned:
            with self._lock:
                self._rows += 1
                self._damaged_rows += damaged
        share = self._damaged_rows / max(self._rows, 1)
        if len(self._items) == len(self._source) or (self._rows >= _ENOUGH and share > 0.5):
            raise UserError(
                f"{self._source.name}: more than one half of the pictures cannot be used{listed(self.report())}; "
                "check the data."
            )

    def report(self, elsewhere: Iterable[tuple[int | None, str]] = ()) -> dict[str, int]:
        """How many items were damaged, by reason, with those that other processes met: of each item its number, None
        for one that storage did not give for the moment, and the reason.
        """
        with self._lock:
            items, reasons = dict(self._items), Counter(self._passing)
        for index, reason in elsewhere:
            if index is None:
                reasons[reason] += 1
            elif reason != DAMAGED_CAPTION:
                items.setdefault(index, reason)
        reasons.update(items.values())
        return dict(reasons)

    def news(self) -> list[tuple[int | None, str]]:
        """What was added since this was asked before."""
        with self._lock:
            news, self._news = self._news, []
        return news
