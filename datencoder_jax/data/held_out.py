"""Pictures of a source that training never shows: previews, and the scores they choose a checkpoint by, are of these.

A picture is held out by a hash of its key alone,

    h(key) < share        h: 64 bits of BLAKE2b, as a number in [0, 1)                                      (1)

so it is on the same side in every process, pass and run, wherever it lies and whatever else the source holds; several
crops or objects of one picture are on the same side too. The share is that of about `_WANTED` pictures, within
[`_LEAST`, `_MOST`]. Of sources too small for chance every tenth picture is held out, those of the lowest hashes, and of
fewer than ten none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import numpy as np

from datencoder_jax.data.items import OBJECT, DamagedItem, Item, Prepared, Source, read_item
from datencoder_jax.errors import raise_if_passing

_WANTED = 64
_LEAST, _MOST = 0.01, 0.1
_SMALL = int(_WANTED / _MOST)
"""Sources of fewer items hold out an exact number: a share of their hashes may hit none."""
_LISTED = 1 << 16
"""Sources of at most so many items are searched in a random order without repeats."""


class HeldOut:
    """Which pictures of a source are held out.

    Args:
        source: the pictures. Of a small one all keys are read at once.

    Raises:
        PassingError: storage is away for a while.
    """

    def __init__(self, source: Source):
        self._source = source
        count = len(source)
        self._bound = max(_WANTED / max(count, 1), _LEAST)
        if count < _SMALL:
            hashes = sorted({hash_key(key) for key in self._readable_keys()})
            number = int(len(hashes) * _MOST)
            self._bound = hashes[number] if number else 0.0

    def _readable_keys(self) -> Iterator[str]:
        for index in range(len(self._source)):
            try:
                yield self.key(index)
            except DamagedItem as error:
                raise_if_passing(error, self._source.name)  # or processes might hold out different pictures

    def key(self, index: int, item: Item | Prepared | None = None) -> str:
        """The key of the picture that an item shows; `item` is the item, where it has been read already.

        Raises:
            DamagedItem: the item cannot be read.
        """
        picture_key = getattr(self._source, "picture_key", None)
        if item is None and picture_key is not None:
            return picture_key(index)
        return (item or read_item(self._source, index)).key.partition(OBJECT)[0]

    def contains(self, key: str) -> bool:
        """Equation (1)."""
        return hash_key(key) < self._bound

    def indices(self, seed: int, count: int) -> Iterator[int]:
        """Items of held-out pictures in a random order, each once: `count` of them as far as a search finds them."""
        return islice(self._search(seed, count), count)

    def _search(self, seed: int, count: int) -> Iterator[int]:
        rng, length = np.random.default_rng(seed), len(self._source)
        if not self._bound:
            return
        if length <= _LISTED:
            tries = rng.permutation(length).tolist()
        else:  # so many that one of `count` is missed is next to impossible
            tries = dict.fromkeys(rng.integers(length, size=int(20 * (count + 1) / self._bound)).tolist())
        for index in tries:
            with suppress(DamagedItem):
                if self.contains(self.key(index)):
                    yield index


def hash_key(key: str) -> float:
    """A number in [0, 1) that is the same for equal keys, and otherwise as good as random."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
