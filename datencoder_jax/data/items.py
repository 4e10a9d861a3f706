"""What pretraining reads: sources of items, by number.

A `Source` is a list of pictures of known length that can be read at any place, from several threads at once. Sources
differ in where the bytes lie (a folder, tar shards, records); all that follows, from decoding to batches, is the same
for every one of them.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import numpy as np

from datencoder_jax.errors import is_passing

DAMAGED_CAPTION = "damaged caption"
"""The reason under which a source's `report` counts captions that it could not read as they are, though it used their
pictures. Such a source has the items' numbers in `damaged_captions`."""

OBJECT = " object "
"""Stands in the key of an item between that of its picture and the object's number, where it shows one of several."""

_WAITS = (0.1, 1.0)
"""Seconds before an item that storage did not give is asked for again."""


class Item(NamedTuple):
    """One picture of a source, as it is stored."""

    key: str
    """Names it in messages and logs, within its source: "00003.tar:000031001"."""
    picture: bytes | np.ndarray
    """A picture file's content, or uint8 `[H, W, 3]`."""
    caption: str | None = None
    box: tuple[float, float, float, float] | None = None
    """The part to show: top, left, bottom, right as shares of height and width in [0, 1]; None: all of it."""


class Prepared(NamedTuple):
    """What was computed of one picture beforehand; batches carry its arrays in the place of pictures."""

    key: str
    arrays: dict[str, np.ndarray]
    """By name, of the same shapes and types for every item."""
    caption: str | None = None


class Source(Protocol):
    """Items by number; `source[index]` is a pure function of the index, safe in several threads.

    A source whose items' keys are known without reading them, or of which several show one picture, says so in
    `picture_key(index)`. One in which every picture comes several times in a row, cropped differently, says how often
    in `views`.
    """

    name: str
    """Names it in messages."""
    identity: str
    """A hash that changes when the items or their order do; kept in checkpoints."""

    @property
    def report(self) -> dict[str, int]:
        """What was wrong with things that the source left out, or used all the same: how many, by reason."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item | Prepared:
        """The item of a number from 0 on.

        Raises:
            DamagedItem: it cannot be used; another takes its place.
        """
        ...


def read_item(source: Source, index: int) -> Item | Prepared:
    """The item of a number, asked for again where storage is away for a moment.

    Raises:
        DamagedItem: as the source does.
    """
    for wait in _WAITS:
        try:
            return source[index]
        except DamagedItem as error:
            if not is_passing(error):
                raise
        time.sleep(wait)
    return source[index]


class DamagedItem(Exception):
    """An item that cannot be used; where it could not be read for now, `errors.is_passing` says so.

    Args:
        key: the item's key.
        reason: why, in few words without particulars, so that equal reasons can be counted: "no picture", "too small".
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason
