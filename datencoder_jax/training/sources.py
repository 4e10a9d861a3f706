"""The sources of pictures that a recipe's `data` section names, by their `kind`."""

from collections.abc import Callable
from typing import Any

import jax

from datencoder_jax.data.items import Item, Source
from datencoder_jax.errors import UserError
from datencoder_jax.toyworld.dataset import sample_item
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import CLASSES, HELD_OUT, SPLITS, Instance


class World:
    """Inhabitants of the embedded world, drawn when they are asked for; none of the classes kept for tests.

    Args:
        count: how many pictures.
        size: their side in pixels.
        seed: another one gives other pictures.
        split: of `toyworld.world.SPLITS`.

    Raises:
        UserError: an argument has no meaning.
    """

    def __init__(self, count: int, size: int = 64, seed: int = 0, split: str = "train"):
        if not all(isinstance(value, int) for value in (count, size, seed)) or count < 0 or size < 1:
            raise UserError(
                "the embedded world takes a count of 0 or more pictures, a size of 1 or more pixels and a seed, all "
                f"whole numbers, not {count!r}, {size!r} and {seed!r}"
            )
        if split not in SPLITS:
            raise UserError(f"the embedded world has no split {split!r}; choose one of: {', '.join(SPLITS)}")
        self.count, self.size, self.seed, self.split = count, size, seed, split
        self.classes = tuple(name for name in CLASSES if name not in HELD_OUT)
        self.name, self.report = "the embedded world", {}
        self.identity = f"world-{split}-{count}-{size}-{seed}"

    def __len__(self) -> int:
        return self.count

    def picture_key(self, index: int) -> str:
        """See `Source`."""
        return f"{self.split}:{index}"

    def __getitem__(self, index: int) -> Item:
        item = sample_item(self.split, index, self.seed, self.classes)
        picture = render(Instance.from_id(item.instance_id), item.context, item.seed, self.size)
        return Item(self.picture_key(index), picture)


def _progress() -> dict[str, bool]:
    """Progress is shown by process 0."""
    return {"quiet": jax.process_index() > 0}


def _folder(**options: Any) -> Source:
    from datencoder_jax.data.folder import Folder

    return Folder(**_progress(), **options)


def _shards(**options: Any) -> Source:
    from datencoder_jax.data.shards import Shards

    return Shards(**_progress(), **options)


def _tfds(**options: Any) -> Source:
    from datencoder_jax.data.tfds_source import open_tfds

    return open_tfds(**_progress(), **options)


def _records(**options: Any) -> Source:
    from datencoder_jax.data.records import Records

    return Records(**options)


KINDS: dict[str, Callable[..., Source]] = {
    "folder": _folder,
    "shards": _shards,
    "tfds": _tfds,
    "records": _records,
    "world": World,
}


def open_source(section: Any) -> Source:
    """The source that a section such as `{"kind": "shards", "path": "...", "weight": 1.0}` describes.

    Raises:
        UserError: the kind is not known, an option does not belong to it, or the source cannot be opened.
    """
    options = dict(section)
    options.pop("weight", None)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"a source of kind {kind!r} is not known; choose one of: {', '.join(KINDS)}")
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"the options of a source of kind {kind} do not fit: {error}") from error
