"""The annotated objects of a TFDS data set as a source: one item per box that is large enough.

Which example has which boxes is written in the examples alone, so all of them are read once. The index of what was
found is kept beside the data (or in the user's cache folder, where that cannot be written), 12 bytes an object.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.compilation import cache_folder
from datencoder_jax.data.items import OBJECT, DamagedItem, Item
from datencoder_jax.data.reading import FORMATS
from datencoder_jax.data.tfds_source import Pictures, Reader, digest
from datencoder_jax.errors import UserError, raise_if_passing

_VERSION = 1
_THREADS = 8
_CHUNK = 1024
# Shares of a side are kept in 16 bits: to a hundredth of a pixel in a picture of 1000 pixels.
_UNITS = 65535

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# Annotations of boxes that do not show one object from outside, and what they are counted as.
_UNFIT = {"is_group_of": "group of objects", "is_inside": "seen from inside"}

_log = logging.getLogger("datencoder_jax")


class Objects:
    """Annotated objects, in the order of the examples and of the boxes in them.

    Args:
        pictures: the data set.
        boxes: its feature that is a sequence of objects with a `bbox`. Where objects are marked `is_group_of` or
            `is_inside`, those are left out.
        min_side: objects with a side of fewer pixels are left out.
        quiet: no progress bar.

    Raises:
        UserError: there is no such feature, or no object is left.
    """

    def __init__(self, pictures: Pictures, boxes: str, min_side: int, *, quiet: bool = False):
        inner = _inner(pictures, boxes)
        self._pictures = pictures
        self.name = f"{pictures.name}, {boxes}"
        self.identity = f"tfds-objects-{digest(_VERSION, pictures.identity, boxes, min_side)}"
        file = f"{self.identity}.safetensors"
        places = [pictures.folder / file]
        if cache := cache_folder():
            places.append(cache / "tfds" / file)
        index = next(filter(None, map(_load, places)), None)
        if index is None:
            index = _build(pictures, pictures.reader(**{boxes: inner}), boxes, min_side, quiet)
            _keep(places, *index)
        self._examples, self._boxes, self.report = index
        if not len(self):
            said = ", ".join(f"{count} {reason}" for reason, count in self.report.items()) or "there are none"
            raise UserError(f"{self.name}: no object is left ({said}); lower min_side or choose other data.")

    def __len__(self) -> int:
        return len(self._examples)

    def picture_key(self, index: int) -> str:
        """See `Source`: all objects of a picture have its key."""
        return self._pictures.picture_key(int(self._examples[index]))

    def __getitem__(self, index: int) -> Item:
        example = int(self._examples[index])
        item = self._pictures[example]
        top, left, bottom, right = (self._boxes[index] / _UNITS).tolist()
        number = index % len(self) - int(np.searchsorted(self._examples, example))
        return item._replace(key=f"{item.key}{OBJECT}{number}", box=(top, left, bottom, right))


def _inner(pictures: Pictures, boxes: str) -> dict[str, Any]:
    """The features of an object that matter: its box, and marks that exclude it."""
    feature = pictures.features.get(boxes)
    objects: Any = getattr(feature, "feature", None)
    if type(feature).__name__ != "Sequence" or "bbox" not in getattr(objects, "keys", list)():
        raise UserError(
            f"{pictures.name} has no sequence of objects {boxes!r} with a bbox; "
            f"its features are {', '.join(pictures.features)}."
        )
    layout = getattr(objects["bbox"], "bbox_format", None)
    if layout is not None and layout.name != "REL_YXYX":
        raise UserError(f"The boxes of {pictures.name} are stored as {layout.name}; only REL_YXYX can be read.")
    return {name: objects[name] for name in ("bbox", *_UNFIT) if name in objects.keys()}  # noqa: SIM118


Index = tuple[np.ndarray, np.ndarray, dict[str, int]]
"""Numbers of examples int32 `[n]`, ascending; boxes uint16 `[n, 4]`; how many objects were left out, by reason."""


def _build(pictures: Pictures, read: Reader, boxes: str, min_side: int, quiet: bool) -> Index:
    """Reads every example once."""
    report: Counter[str] = Counter()

    def objects(index: int) -> tuple[np.ndarray, Counter[str]]:
        try:
            example = pictures.example(index, read, "")
            with Image.open(io.BytesIO(example[pictures.image]), formats=FORMATS) as image:  # no more than its head
                width, height = image.size
        except (DamagedItem, OSError, ValueError, *_BOMBS) as error:
            raise_if_passing(error, pictures.name)
            return np.zeros((0, 4), np.uint16), Counter({"damaged examples": 1})
        return _select(example[boxes], height, width, min_side)

    count = len(pictures)
    examples, kept = [], []
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=count, desc=f"objects of {pictures.name}", unit="picture", delay=2, disable=quiet) as bar,
    ):
        for start in range(0, count, _CHUNK):
            numbers = np.arange(start, min(start + _CHUNK, count), dtype=np.int32)
            found, left_out = zip(*pool.map(objects, numbers.tolist()), strict=True)
            examples.append(np.repeat(numbers, [len(each) for each in found]))
            kept.append(np.concatenate(found))
            report.update(sum(left_out, Counter()))
            bar.update(len(numbers))
    return np.concatenate(examples), np.concatenate(kept), dict(sorted(report.items()))


def _select(objects: dict[str, Any], height: int, width: int, min_side: int) -> tuple[np.ndarray, Counter[str]]:
    """The boxes of one picture to keep, uint16 `[n, 4]`, and what the others are counted as."""
    left_out: Counter[str] = Counter()
    boxes = np.asarray(objects["bbox"], np.float64).reshape(-1, 4).clip(0, 1)
    keep = np.ones(len(boxes), bool)
    for name, reason in _UNFIT.items():
        marked = keep & (np.asarray(objects.get(name, np.zeros(len(boxes)))) == 1)  # -1 stands for unknown
        left_out[reason] += int(marked.sum())
        keep &= ~marked
    sides = (boxes[:, 2:] - boxes[:, :2]) * [height, width]
    large = (sides >= min_side).all(axis=1)  # NaN is not
    left_out["too small"] += int((keep & ~large).sum())
    return np.round(boxes[keep & large] * _UNITS).astype(np.uint16), +left_out


def _load(file: Path) -> Index | None:
    """The index in a file; None where there is none."""
    try:
        if not file.is_file():
            return None
        with safe_open(file, "numpy") as tensors:
            report = json.loads(tensors.metadata()["report"])
            return tensors.get_tensor("examples"), tensors.get_tensor("boxes"), report
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        _log.warning("%s is damaged and is made anew.", file)
        return None


def _keep(places: list[Path], examples: np.ndarray, boxes: np.ndarray, report: dict[str, int]) -> None:
    """Writes the index to the first place that can be written."""
    for file in places:
        try:
            with atomic_write(file) as temporary:
                save_tensors(temporary, {"examples": examples, "boxes": boxes}, {"report": json.dumps(report)})
            return
        except UserError:
            continue
    _log.warning("The index of objects cannot be kept in %s, so it is made anew every time.", places[0].parent)
