"""Pictures in tar files, as img2dataset and webdataset write them, read at any place without unpacking.

`python -m datencoder_jax.data.shards FOLDER` makes the index of a folder beforehand, in several processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.data.folder import check_folder, listed, printable
from datencoder_jax.data.items import DAMAGED_CAPTION, DamagedItem, Item
from datencoder_jax.data.tar_index import BLOCK, JSON, build_index
from datencoder_jax.errors import UserError

_OPEN_FILES = 64


class Shards:
    """The pictures in the `*.tar` files of a folder and of the folders in it, or in one such file.

    Shards are in the order of their names, the pictures of each in the order in which they lie there. A caption is the
    member `.txt` of the same key or, if there is none, "caption" in the member `.json`. The index of a million pictures
    takes 16 MB of memory.

    Args:
        path: the folder or the file.
        captions: whether captions are read; one that is not UTF-8 is read as far as it can be, and counted.
        quiet: no progress bar.
        processes: how many processes index new shards.

    Raises:
        UserError: there are no shards, or no picture in any of them.
    """

    def __init__(self, path: str | Path, *, captions: bool = True, quiet: bool = False, processes: int = 1):
        root = expand_user(path)
        root = root if root.is_file() else check_folder(root)
        self.name = str(root)
        index = build_index(root, quiet=quiet, processes=processes)
        self._items, self._captions = index.items, captions
        self._ends = np.cumsum([shard.count for shard in index.shards], dtype=np.int64)
        self._names = [printable(shard.name) for shard in index.shards]
        folder = root if root.is_dir() else root.parent
        self._files = _Files([folder / shard.name for shard in index.shards])
        self._report, self.damaged_captions = Counter(), set[int]()
        for shard in index.shards:
            self._report.update(shard.report)
        if not len(self._items):
            raise UserError(f"{self.name} holds no pictures that can be used{listed(self.report)}.")
        digest = hashlib.blake2b(digest_size=8)
        for shard in index.shards:
            digest.update(f"{os.fsencode(shard.name).hex()} {shard.digest}\n".encode())
        self.identity = digest.hexdigest()

    @property
    def report(self) -> dict[str, int]:
        """What was left out, and how many captions read so far were damaged."""
        captions = {DAMAGED_CAPTION: len(self.damaged_captions)} if self.damaged_captions else {}
        return dict(self._report) | captions

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        block, size, text, text_size = self._items[index].tolist()
        try:
            with self._files.opened(shard) as file:
                header = os.pread(file, BLOCK, (block - 1) * BLOCK)
                picture = os.pread(file, size, block * BLOCK)
                caption = self._caption(file, text, text_size, index) if self._captions and text_size else None
        except OSError as error:
            raise DamagedItem(f"{self._names[shard]}:{index}", "cannot be read") from error
        key = self._key(shard, header, block)
        if len(picture) < size:
            raise DamagedItem(key, "cut short")
        return Item(key, picture, caption)

    def picture_key(self, index: int) -> str:
        """See `Source`: from the picture's header alone."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        block = int(self._items[index]["picture"])
        try:
            with self._files.opened(shard) as file:
                return self._key(shard, os.pread(file, BLOCK, (block - 1) * BLOCK), block)
        except OSError as error:
            raise DamagedItem(f"{self._names[shard]}:{index}", "cannot be read") from error

    def _key(self, shard: int, header: bytes, block: int) -> str:
        cut = f"...#{block}" if b"\0" not in header[:100] else ""  # a name that is longer, or may be
        return f"{self._names[shard]}:{_member_name(header)}{cut}"

    def _caption(self, file: int, block: int, size: int, index: int) -> str | None:
        content = os.pread(file, size & ~JSON, block * BLOCK)
        try:
            text = content.decode("utf-8")
            if size & JSON:
                values = json.loads(text)
                text = values.get("caption") if isinstance(values, dict) else None
        except (ValueError, RecursionError):
            self.damaged_captions.add(index)  # adding to a set is atomic
            text = None if size & JSON else content.decode("utf-8", "replace")
        if isinstance(text, str) and (encodable := text.encode("utf-8", "replace").decode("utf-8")) != text:
            self.damaged_captions.add(index)  # JSON can hold halves of surrogate pairs, which are no text
            text = encodable
        return text.strip() or None if isinstance(text, str) else None


class _Files:
    """Files opened when they are needed, a limited number at a time, for reading in several threads."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, list[int]] = OrderedDict()  # descriptor and number of readers, by file

    @contextmanager
    def opened(self, number: int) -> Iterator[int]:
        """The descriptor of a file, which stays open as long as the block runs."""
        with self._lock:
            known = number in self._open
        opened = None if known else os.open(self._paths[number], os.O_RDONLY)  # may be slow: nobody has to wait for it
        with self._lock:
            if number not in self._open:
                opened = opened or os.open(self._paths[number], os.O_RDONLY)
                self._open[number], opened = [opened, 0], None
            entry = self._open[number]
            entry[1] += 1
            self._open.move_to_end(number)
            self._close(_OPEN_FILES)
        if opened is not None:  # another thread was faster
            os.close(opened)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def _close(self, keep: int) -> None:
        idle = [number for number, (_, readers) in self._open.items() if not readers]
        for number in idle[: max(0, len(self._open) - keep)]:
            os.close(self._open.pop(number)[0])

    def __del__(self):
        self._close(0)


def _member_name(header: bytes) -> str:
    """The name in a tar's header, for messages: a very long one is cut."""
    name, prefix = (part.split(b"\0", 1)[0].decode("utf-8", "replace") for part in (header[:100], header[345:500]))
    path = f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name
    return printable(path.rpartition(".")[0] or path)


def main(arguments: list[str] | None = None) -> None:
    """Makes the index of a folder of shards and says what is in it."""
    parser = argparse.ArgumentParser(prog="python -m datencoder_jax.data.shards", description=main.__doc__)
    parser.add_argument("folder", help="the folder of shards, or one of them")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one for each core)")
    options = parser.parse_args(arguments)
    try:
        source = Shards(options.folder, processes=options.processes)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{source.name}: {len(source)} pictures{listed(source.report)}")


if __name__ == "__main__":
    main()
