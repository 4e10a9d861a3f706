"""A folder of pictures, and of the folders in it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.data.items import DamagedItem, Item
from datencoder_jax.errors import UserError, raise_if_passing

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff"})
"""Endings of names that pictures have."""
CAPTIONS = frozenset({"txt", "json"})
"""Endings of names that captions have."""


class Folder:
    """The pictures in a folder, by name; `a/b.txt` beside `a/b.jpg` is its caption.

    Names that start with a dot are left alone.

    Args:
        path: the folder.
        captions: whether captions are read.
        quiet: no progress bar.

    Raises:
        UserError: there is no such folder, it cannot be listed, or there is no picture in it.
    """

    def __init__(self, path: str | Path, *, captions: bool = True, quiet: bool = False):
        self._root = check_folder(path)
        self.name = str(self._root)
        names, texts, skipped = [], set(), Counter()
        with tqdm(desc=f"listing {self.name}", unit="files", delay=2, disable=quiet) as bar:
            for name, is_file in files_under(self._root):
                bar.update()
                ending = name.rpartition(".")[2].lower()
                if not is_file:
                    skipped["not a file"] += 1
                elif ending in PICTURES:
                    names.append(name)
                elif ending not in CAPTIONS:
                    skipped["unknown ending"] += 1
                elif captions and name.endswith(".txt"):
                    texts.add(name[:-4])
        self.report = dict(skipped)
        if not names:
            raise UserError(f"{self.name} holds no pictures{listed(self.report)}; name another folder.")
        names.sort()
        self._names = _Names(names)
        self._captioned = np.array([name.rpartition(".")[0] in texts for name in names])
        self.identity = self._names.digest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        name = self._names[index]
        path = self._root / name
        try:
            picture = path.read_bytes()
        except OSError as error:
            raise DamagedItem(printable(name), "cannot be read") from error
        if not picture:
            raise DamagedItem(printable(name), "empty")
        return Item(printable(name), picture, self._caption(path) if self._captioned[index] else None)

    def picture_key(self, index: int) -> str:
        """See `Source`."""
        return printable(self._names[index])

    def _caption(self, path: Path) -> str | None:
        try:
            return path.with_suffix(".txt").read_text("utf-8", errors="replace").strip() or None
        except OSError:  # a picture without a caption is still one
            return None


class _Names:
    """A list of texts in one piece of memory: a Python object for each would take several times as much."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])

    def digest(self) -> str:
        return hashlib.blake2b(self._ends.astype("<i8").tobytes() + self._bytes, digest_size=8).hexdigest()


def check_folder(path: str | Path) -> Path:
    """`path` without `~`, if it is a folder that can be listed; a `UserError` otherwise."""
    path = expand_user(path)
    try:
        if not path.exists():
            raise UserError(f"There is no folder {path}.")
        if not path.is_dir():
            raise UserError(f"{path} is not a folder.")
        os.scandir(path).close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    return path


def files_under(root: Path) -> Iterator[tuple[str, bool]]:
    """Names below a folder, relative to it and with `/`, and whether each is an ordinary file; in no order.

    Links are followed, though never in circles. Folders below that cannot be listed are reported as not files.

    Raises:
        PassingError: storage is away for a while.
    """
    pending, seen = [""], set()
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise_if_passing(error, root / folder)
            yield folder, False
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            try:
                folder_there, file_there = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself, say
                raise_if_passing(error, root / name)
                folder_there = file_there = False
            if folder_there:
                pending.append(name)
            else:
                yield name, file_there


def printable(name: str) -> str:
    """`name` for messages, whatever bytes it is made of."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def listed(report: dict[str, int]) -> str:
    """` (2 empty, 1 too small)`, or nothing."""
    return f" ({', '.join(f'{count} {reason}' for reason, count in sorted(report.items()))})" if report else ""
