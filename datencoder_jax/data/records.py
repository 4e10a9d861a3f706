"""What frozen networks see of each picture, computed once: a folder of ArrayRecord files, and the source that reads it.

    records.json                     settings, and names, types and shapes of the arrays
    00000-of-00012.array_record      records of `per_file` pictures, with `views` records for each
    ...

A record is its header's length in 4 bytes, the header (JSON: key, caption), and the bytes of the arrays in the order of
`records.json`; numbers are little-endian. Which pictures a file is made from depends on its number alone, so several
processes can write different files, and what was interrupted goes on with the first file that is missing.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from datencoder_jax.checkpoints.atomic import atomic_write
from datencoder_jax.checkpoints.identity import part_fingerprint, trait
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import read_json
from datencoder_jax.data.items import DamagedItem, Prepared
from datencoder_jax.errors import UserError

METADATA = "records.json"
_FORMAT = "datencoder-records"
_VERSION = 1
_MISSING = 'Records of features need array_record: pip install "datencoder_jax[pretrain]".'

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Types and shapes of a record's arrays by name: `{"moments": ("float16", (64, 64, 8)), ...}`."""


class Settings(NamedTuple):
    """What the features depend on. All of it is compared when records are used, or when writing them goes on.

    Attributes:
        base: the base model's fingerprint.
        vae: `weights_fingerprint` of the autoencoder that gave the moments.
        vision: `weights_fingerprint` of the vision tower that gave classes and patches.
        resolution: the pictures' side in pixels, as the autoencoder saw them.
        crop: the least side of the random crops, as a share.
        flip: whether one half of the views was mirrored.
        seed: of crops and mirroring.
        views: of each picture.
        source: identity of the pictures' source.
    """

    base: str
    vae: str
    vision: str
    resolution: int
    crop: float
    flip: bool
    seed: int
    views: int
    source: str


def weights_fingerprint(params: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for the parameters of a network, by name; see `checkpoints.identity.trait`."""
    return part_fingerprint({name: trait(np.asarray(value)) for name, value in params.items()})


def write_records(
    folder: str | Path,
    settings: Settings,
    layout: Layout,
    pictures: int,
    produce: Callable[[int, int], Iterable[Prepared]],
    *,
    per_file: int = 1024,
    part: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> None:
    """Writes the files that are not there yet; each appears whole or not at all.

    Args:
        folder: where to; it is made.
        settings: what the features depend on.
        layout: of the arrays that records have.
        pictures: how many there are.
        produce: gives the records of the pictures from a first number to before another, in order, `settings.views` in
            turn for each picture, or none for a picture that cannot be used.
        per_file: pictures a file.
        part: the process' number and how many processes there are; each writes its share of the files.
        quiet: no progress bar.

    Raises:
        UserError: the folder holds records made with other settings, cannot be written, the values do not fit into
            the arrays' type, or array_record is not installed.
    """
    folder = expand_user(folder)
    count = -(-pictures // per_file)
    _describe(folder, settings, layout, pictures, per_file)
    numbers = range(part[0], count, part[1])
    missing = [number for number in numbers if not (folder / _name(number, count)).exists()]
    with tqdm(total=len(numbers) * per_file, desc=str(folder), unit="picture", mininterval=1, disable=quiet) as bar:
        bar.update((len(numbers) - len(missing)) * per_file)
        for number in missing:
            first = number * per_file
            last = min(first + per_file, pictures)
            _write_file(folder / _name(number, count), produce(first, last), settings.views, layout, bar)


class Records:
    """The records in a folder, as a source.

    Args:
        path: the folder.

    Raises:
        UserError: the folder holds no records, some are missing or damaged, or array_record is not installed.
    """

    def __init__(self, path: str | Path):
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise UserError(_MISSING) from error
        self.folder = expand_user(path)
        metadata = _read_metadata(self.folder)
        self.settings = Settings(**metadata["settings"])
        self.name, self.report = str(self.folder), {}
        self.views = self.settings.views
        """Consecutive items that show one picture."""
        self._layout: Layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in metadata["arrays"].items()}
        count = -(-metadata["pictures"] // metadata["per_file"])
        names = [_name(number, count) for number in range(count)]
        if missing := [name for name in names if not (self.folder / name).exists()]:
            raise UserError(
                f"{self.folder} is not finished: {len(missing)} of {count} files are missing, such as {missing[0]}; "
                "run the command that writes it again, it goes on where it stopped."
            )
        try:
            self._records = ArrayRecordDataSource([str(self.folder / name) for name in names])
        except Exception as error:  # damaged files fail in several ways
            raise UserError(f"The records in {self.folder} cannot be read ({_first_line(error)}).") from error
        if not len(self):
            raise UserError(f"{self.folder} holds no record: none of its pictures could be used.")
        content = json.dumps([metadata, len(self)], sort_keys=True)
        self.identity = f"records-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def check(self, **expected: Any) -> None:
        """Compares the fields of `Settings` that are given with what the records were made with.

        Raises:
            UserError: some differ.
        """
        found = self.settings._asdict()
        wrong = [f"{name} {found[name]} instead of {value}" for name, value in expected.items() if found[name] != value]
        if wrong:
            raise UserError(
                f"The records in {self.folder} were made with {', '.join(wrong)}; "
                "set these options alike, or write records anew to another folder."
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Prepared:
        index = range(len(self))[index]
        try:
            return _unpack(self._records[index], self._layout)
        except Exception as error:  # readers of damaged files fail in several ways
            raise DamagedItem(f"record {index}", "damaged record") from error


def _describe(folder: Path, settings: Settings, layout: Layout, pictures: int, per_file: int) -> None:
    """Writes the metadata, or compares it with what is there."""
    metadata = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "settings": settings._asdict(),
        "pictures": pictures,
        "per_file": per_file,
        "arrays": {name: [dtype, list(shape)] for name, (dtype, shape) in layout.items()},
    }
    path = folder / METADATA
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        return
    found = _read_metadata(folder)
    if found != metadata:
        before, now = ({**each, **each["settings"]} for each in (found, metadata))
        wrong = [f"{name} {before.get(name)} instead of {now[name]}" for name in now if before.get(name) != now[name]]
        wrong = [text for text in wrong if not text.startswith("settings ")]
        raise UserError(
            f"{folder} holds records made with {', '.join(wrong)}; set these options alike, or choose another folder."
        )


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    if not path.exists():
        raise UserError(f"{folder} holds no records of features: it has no {METADATA}.")
    metadata = read_json(path)
    if metadata.get("format") != _FORMAT or metadata.get("format_version") != _VERSION:
        raise UserError(f"{path} is of another format or version; write the records anew to another folder.")
    lacking = {"settings", "pictures", "per_file", "arrays"} - metadata.keys()
    settings = metadata.get("settings")
    if lacking or not isinstance(settings, dict) or set(settings) != set(Settings._fields):
        raise UserError(f"{path} is incomplete; write the records anew to another folder.")
    return metadata


def _write_file(path: Path, items: Iterable[Prepared], views: int, layout: Layout, bar: tqdm) -> None:
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise UserError(_MISSING) from error
    with atomic_write(path) as temporary:
        # Groups of one record are what random access wants. Halves of noise hardly shrink: without compression they
        # are written, and read, about twice as fast.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        written = 0
        try:
            for item in items:
                writer.write(_pack(item, layout))
                written += 1
                bar.update(written % views == 0)
            writer.close()
        except RuntimeError as error:
            if writer.ok():
                raise
            raise UserError(f"Cannot write {path}: {_first_line(error)}.") from error
        if written % views:
            raise ValueError(f"{written} records of {views} views each")


def _name(number: int, count: int) -> str:
    return f"{number:05d}-of-{count:05d}.array_record"


def _pack(item: Prepared, layout: Layout) -> bytes:
    header = json.dumps([item.key, item.caption]).encode()
    parts = [struct.pack("<I", len(header)), header]
    if item.arrays.keys() != layout.keys():
        raise ValueError(f"{item.key} has arrays {sorted(item.arrays)}, not {sorted(layout)}")
    for name, (dtype, shape) in layout.items():
        if item.arrays[name].shape != shape:
            raise ValueError(f"{name} of {item.key} is {list(item.arrays[name].shape)}, not {list(shape)}")
        with np.errstate(over="ignore"):
            array = item.arrays[name].astype(np.dtype(dtype).newbyteorder("<"))
        if not np.isfinite(array).all():
            raise UserError(f"{name} of {item.key} holds values that do not fit into {dtype}.")
        parts.append(array.tobytes())
    return b"".join(parts)


def _unpack(record: bytes, layout: Layout) -> Prepared:
    (length,) = struct.unpack_from("<I", record)
    place = 4 + length
    key, caption = json.loads(record[4:place])
    arrays = {}
    for name, (dtype, shape) in layout.items():
        kind = np.dtype(dtype).newbyteorder("<")
        arrays[name] = np.frombuffer(record, kind, int(np.prod(shape)), place).reshape(shape)
        place += arrays[name].nbytes
    if place != len(record):
        raise ValueError("a record of another length")
    return Prepared(key, arrays, caption)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
