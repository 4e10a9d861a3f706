"""Where in tar files the pictures lie: found once with the standard library's `tarfile`, kept beside the files.

Nothing is ever extracted: a member's name is no more than the key under which picture and caption belong together.
Names are read as webdataset does: `a/000.jpg` has the key `a/000` and the ending `jpg`, all after the first dot.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.data.folder import PICTURES, files_under
from datencoder_jax.errors import UserError, raise_if_passing

BLOCK = tarfile.BLOCKSIZE
"""Every member of a tar starts at a multiple of this many bytes."""

ITEM = np.dtype([("picture", "<u4"), ("size", "<u4"), ("caption", "<u4"), ("caption_size", "<u4")])
"""Where an item lies in its shard: first blocks and sizes in bytes; a size of 0 means that there is no caption."""

JSON = 1 << 31
"""Set in `caption_size` when the caption is in a member `.json`, under "caption"."""

_SCHEMA = "2"
_NAME = "datencoder_index.safetensors"

Key = tuple[int, str]
"""The number of an archive in its file, and a key in it."""
_PART = 1 << 20  # bytes that are looked at together behind the end of a tar
_SAVE_EVERY = 60.0  # seconds of indexing that may be lost


@dataclass(frozen=True)
class Shard:
    """One tar file as it was when it was indexed."""

    name: str
    """Relative to the folder of shards, with `/`."""
    size: int
    mtime: int
    count: int = 0
    """Items in it."""
    report: dict[str, int] = field(default_factory=dict)
    """What was left out, by reason."""
    digest: str = ""
    """Of its items' places."""


@dataclass(frozen=True)
class TarIndex:
    """The items of all shards, one shard after the other."""

    shards: list[Shard]
    items: np.ndarray
    """`[n]` of `ITEM`."""


def scan(path: Path) -> tuple[np.ndarray, dict[str, int]]:
    """The items of one tar in the order of their pictures, `[n]` of `ITEM`, and what was left out, by reason.

    Items before the place where a tar is cut short or damaged are found; of pictures with the same key, the first.
    Tars that were joined to one file are read one after the other, each with keys of its own.

    Raises:
        PassingError: storage is away for a while.
    """
    report: Counter[str] = Counter()
    pictures: dict[Key, tuple[int, int]] = {}
    texts: dict[Key, tuple[int, int]] = {}
    jsons: dict[Key, tuple[int, int]] = {}
    try:
        for number, member in _members(path, report):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key, ending = (number, f"{folder}/{stem}"), ending.lower()
            place = member.offset_data // BLOCK, member.size
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                report["not a file"] += 1
            elif ending == "txt" and member.size < JSON:
                texts.setdefault(key, place)
            elif ending == "json" and member.size < JSON:
                jsons.setdefault(key, place)
            elif ending not in PICTURES or not stem:  # names that start with a dot are no pictures
                report["unknown ending"] += 1
            elif not member.size:
                report["empty"] += 1
            elif member.size >= 2**32:
                report["too large"] += 1
            elif key in pictures:
                report["duplicate key"] += 1
            else:
                pictures[key] = place
    except OSError as error:
        raise_if_passing(error, path)
        report["tar cannot be read"] += 1
    items = np.zeros(len(pictures), ITEM)
    for row, (key, picture) in enumerate(pictures.items()):
        block, size = texts.get(key) or jsons.get(key) or (0, 0)
        from_json = JSON if size and key not in texts else 0
        items[row] = (*picture, block, size | from_json)
    return items, dict(report)


def _members(path: Path, report: Counter[str]) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """The members of a tar that are there in full, each with the number of its archive: there may be several joined."""
    end = path.stat().st_size
    if not end:
        report["empty tar"] += 1
        return
    with open(path, "rb") as file:
        start = 0
        for number in count():
            try:
                file.seek(start)
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - holds nothing but the file
            except OSError:
                raise
            except Exception:  # what is no tar makes `tarfile` fail in many ways
                report["tar cut short" if number else "not a tar"] += 1
                return
            for member in _archive(tar, start, end, report):
                yield number, member
            behind = None if report["tar cut short"] else _behind(file, tar.offset)
            if behind is None:
                return
            start = behind


def _archive(tar: tarfile.TarFile, start: int, end: int, report: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """The members of one archive, from `start` in a file of `end` bytes on."""
    position = start - 1
    while True:
        try:
            member = tar.next()
        except OSError:
            raise
        except Exception:
            report["tar cut short"] += 1
            return
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - or it keeps them all
        if member is None:
            break
        is_inside = 0 <= member.size <= end - member.offset_data
        if not position < member.offset < tar.offset or not is_inside:
            report["tar cut short"] += 1  # or it claims sizes that lead back or beyond its end
            return
        position = member.offset
        yield member
    file = cast(BinaryIO, tar.fileobj)
    file.seek(tar.offset)
    block = file.read(BLOCK)
    if not block or block.strip(b"\0"):  # a tar that is whole ends in zeros
        report["tar cut short"] += 1


def _behind(file: BinaryIO, position: int) -> int | None:
    """Where something other than zeros follows the zeros at `position`, as when tars are joined with `cat`.

    None if nothing does, or if there are no zeros: then the tar is damaged there.
    """
    file.seek(position)
    zeros = False
    while part := file.read(_PART):
        rest = part.lstrip(b"\0")
        ahead = (len(part) - len(rest)) // BLOCK * BLOCK
        zeros = zeros or ahead > 0
        if rest:
            return position + ahead if zeros else None
        position += len(part)
    return None


def build_index(root: Path, *, quiet: bool = False, processes: int = 1) -> TarIndex:
    """The index of the `*.tar` files below a folder, or of one such file.

    What is known of shards that have kept their name, size and time of change is taken from the index kept before.

    Args:
        root: the folder or the file.
        quiet: no progress bar.
        processes: how many read shards at the same time.

    Raises:
        UserError: there is no tar below `root`.
        PassingError: storage is away for a while; what was indexed before is kept.
    """
    folder = root if root.is_dir() else root.parent
    known = _load(root)
    shards: dict[str, Shard] = {}
    rows: dict[str, np.ndarray] = {}
    for name in _tars(root):
        with suppress(FileNotFoundError):  # it has just gone
            status = os.stat(folder / name)
            stamp = (name, status.st_size, status.st_mtime_ns)
            if stamp in known:
                shards[name], rows[name] = known[stamp]
            else:
                shards[name] = Shard(*stamp)
    new = [name for name in shards if name not in rows]
    try:
        saved = time.monotonic()
        for name, items, report in _scan_all(folder, new, shards, quiet, processes):
            digest = hashlib.blake2b(items.tobytes(), digest_size=8).hexdigest()
            shard = shards[name]
            shards[name] = Shard(name, shard.size, shard.mtime, len(items), report, digest)
            rows[name] = items
            if time.monotonic() - saved > _SAVE_EVERY:
                _save(root, shards, rows)
                saved = time.monotonic()
    finally:  # an interrupted run goes on from here
        if new and any(len(items) for items in rows.values()):  # where there is nothing to use nothing is left behind
            _save(root, shards, rows)
    return TarIndex(list(shards.values()), np.concatenate([rows[name] for name in shards]))


def _tars(root: Path) -> list[str]:
    if not root.is_dir():
        return [root.name]
    names = sorted(name for name, is_file in files_under(root) if is_file and name.lower().endswith(".tar"))
    if not names:
        raise UserError(f"There are no .tar files in {root}; name the folder that holds the shards.")
    return names


def _scan_all(folder: Path, names: list[str], shards: dict[str, Shard], quiet: bool, processes: int):
    total = sum(shards[name].size for name in names)
    several = processes > 1 and len(names) > 1
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if several else nullcontext()
    bar = tqdm(total=total, desc=f"indexing {folder}", unit="B", unit_scale=True, delay=2, disable=quiet)
    with pool as workers, bar:
        paths = [folder / name for name in names]
        for name, (items, report) in zip(names, workers.map(scan, paths) if workers else map(scan, paths), strict=True):
            bar.update(shards[name].size)
            yield name, items, report


def _places(root: Path) -> Iterator[Path]:
    """Where the index may be kept: beside the shards, or in the user's cache folder."""
    yield root / _NAME if root.is_dir() else root.with_name(f"{root.name}.{_NAME}")
    from datencoder_jax.compilation import cache_folder  # imports JAX, which processes that only scan do without

    if cache := cache_folder():
        yield (
            cache / "indexes" / f"{hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()}.safetensors"
        )


def _load(root: Path) -> dict[tuple[str, int, int], tuple[Shard, np.ndarray]]:
    """What is kept of each shard, by name, size and time of change; an index that cannot be used counts as none."""
    known = {}
    for path in _places(root):
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("schema") != _SCHEMA:
                    continue
                items = file.get_tensor("items").view(ITEM).reshape(-1)
                shards = [Shard(**entry) for entry in json.loads(metadata["shards"])]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            continue
        ends = np.cumsum([shard.count for shard in shards], dtype=np.int64)
        if len(items) == (ends[-1] if len(ends) else 0):
            for shard, end in zip(shards, ends, strict=True):
                known[shard.name, shard.size, shard.mtime] = shard, items[end - shard.count : end]
    return known


def _save(root: Path, shards: dict[str, Shard], rows: dict[str, np.ndarray]) -> None:
    done = [name for name in shards if name in rows and "tar cannot be read" not in shards[name].report]
    items = np.concatenate([rows[name] for name in done]) if done else np.zeros(0, ITEM)
    metadata = {"schema": _SCHEMA, "shards": json.dumps([asdict(shards[name]) for name in done])}
    for path in _places(root):
        try:
            with atomic_write(path) as temporary:
                save_tensors(temporary, {"items": items.view("<u4").reshape(-1, 4)}, metadata)
            return
        except UserError:  # not writable: the next place, or none, and it is found again next time
            continue
