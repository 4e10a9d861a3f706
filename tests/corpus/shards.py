"""Bad pictures and captions for pretraining: tar shards, folders and records."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

from data_helpers import bomb
from PIL import Image

from corpus import files
from corpus.case import Kind
from corpus.files import content, encoded, noise, nothing, picture, tar
from datencoder_jax.data.feed import Feed
from datencoder_jax.data.folder import Folder
from datencoder_jax.data.items import DamagedItem
from datencoder_jax.data.reading import DamagedPicture, decode
from datencoder_jax.data.records import METADATA
from datencoder_jax.data.shards import Shards
from datencoder_jax.errors import UserError
from datencoder_jax.training.sources import open_source

KIND = Kind(
    "Shards and folders of pictures",
    "The pictures of `datencoder pretrain`, as tar shards unless the input says something else. Damaged pictures are "
    "counted and left out; an input without any good picture is refused.",
    lambda path: read_all(Shards(path, quiet=True)),
)


def read_all(source: Any) -> None:
    """Reads and decodes every picture of a source; one that has none that can be used is refused."""
    good = 0
    for index in range(len(source)):
        try:
            item = source[index]
            decode(item.picture, item.key)
            good += 1
        except (DamagedItem, DamagedPicture):
            continue
    if not good:
        raise UserError(f"{source.name} holds no picture that can be used.")


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _header_damaged(data: bytes) -> bytes:
    return data[:512] + b"\xff" * 512 + data[1024:]


def _size_of_first(text: bytes) -> files.Maker:
    """A tar whose first member claims another size."""

    def change(data: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = text.ljust(12, b"\0")[:12]
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        return bytes(header) + data[512:]

    return files.changed(tar("0.tar", *GOOD), change)


def _with_index(make: files.Maker) -> files.Maker:
    """The tar of another maker, with its index, which is kept beside it."""

    def index(where: Path) -> Path:
        path = make(where)
        Shards(path, quiet=True)
        return path

    return index


JPEG = encoded()
GOOD = [("0.jpg", JPEG), ("0.txt", b"a cat")]
MORE = [("1.jpg", JPEG), ("1.txt", b"a dog")]

for _name, _make in {
    "no file": nothing("0.tar"),
    "an empty folder": files.folder("shards"),
    "a folder of texts": lambda w: content("shards/0.txt", "a cat")(w).parent,
    "a name of 300 letters": nothing("n" * 300 + ".tar"),
    "a path of 5,000 letters": nothing("n/" * 2500 + "0.tar"),
    "a name with a zero byte": nothing("a\0.tar"),
    "a home folder of nobody": nothing("~nosuchuser/0.tar"),
    "a link to nothing": files.link("0.tar", "gone.tar"),
    "a link to itself": files.link("0.tar", "0.tar"),
    "a pipe": files.fifo("0.tar"),
    "an address in a bucket": nothing("gs://bucket/laion"),
    "an empty tar": content("0.tar", b""),
    "a tar of zeros": content("0.tar", bytes(10_240)),
    "a text": content("0.tar", "no tar at all"),
    "an error page of a web server": content("0.tar", files.HTML),
    "a pointer of Git LFS": content("0.tar", files.LFS_POINTER),
    "a packed tar": tar("0.tar", *GOOD, mode="w:gz"),
    "a zip": content("0.tar", b"PK\x03\x04" + bytes(1000)),
    "a tar without pictures": tar("0.tar", ("0.txt", b"a cat"), ("0.json", b"{}")),
    "a tar of a picture without a name": tar("0.tar", (".jpg", JPEG)),
    "a tar of unknown endings": tar("0.tar", ("0.heic", JPEG), ("1", JPEG)),
    "a tar of links": tar(
        "0.tar", _member("0.jpg", tarfile.SYMTYPE, "/etc/passwd"), _member("1.jpg", tarfile.LNKTYPE, "../x")
    ),
    "a tar of devices": tar("0.tar", _member("0.jpg", tarfile.CHRTYPE), _member("1.jpg", tarfile.FIFOTYPE)),
    "a tar of an empty picture": tar("0.tar", ("0.jpg", b"")),
    "a tar cut in its first picture": files.cut(tar("0.tar", ("0.jpg", encoded(None, "BMP"))), 0.1),
    "a tar whose first header is damaged": files.changed(tar("0.tar", *GOOD), lambda data: b"\xff" * 512 + data[512:]),
    "a member that claims 2^60 bytes": _size_of_first(b"\x80\0\0\0\x10"),
    "a member that claims a negative size": _size_of_first(b"\xff" * 11 + b"\x80"),
    "a member whose size is no number": _size_of_first(b"many"),
}.items():
    KIND.refused(_name, _make)
for _name, _make in {
    "a good tar": tar("0.tar", *GOOD),
    "an ending in capitals": tar("0.TAR", *GOOD),
    "a folder with one empty tar": lambda w: (tar("a/0.tar", *GOOD)(w), content("a/1.tar", b"")(w).parent)[1:],
    "two tars joined to one file": lambda w: files.changed(
        tar("0.tar", *GOOD), lambda d: d + tar("1.tar", *MORE)(w).read_bytes()
    )(w),
    "a tar cut after its first picture": files.cut(tar("0.tar", *GOOD, ("1.bmp", encoded(None, "BMP"))), 0.4),
    "a tar without its end": files.changed(tar("0.tar", *GOOD), lambda data: data.rstrip(b"\0")),
    "members at absolute paths": tar("0.tar", ("/etc/0.jpg", JPEG), ("/etc/0.txt", b"a cat")),
    "members in the folder above": tar("0.tar", ("../../0.jpg", JPEG), ("../../0.txt", b"a cat")),
    "a name with a line break": tar("0.tar", ("a\nb.jpg", JPEG), ("a\nb.txt", b"a cat")),
    "a name that is not UTF-8": tar("0.tar", (os.fsdecode(b"caf\xe9.jpg"), JPEG)),
    "a name of 300 letters inside": tar("0.tar", ("n" * 300 + ".jpg", JPEG)),
    "a link beside a picture": tar("0.tar", _member("1.jpg", tarfile.SYMTYPE, "/etc/passwd"), *GOOD),
    "a folder inside": tar("0.tar", _member("a", tarfile.DIRTYPE), ("a/0.jpg", JPEG)),
    "two pictures of one key": tar("0.tar", *GOOD, ("0.png", encoded(None, "PNG"))),
    "two captions of one key": tar("0.tar", *GOOD, ("0.txt", b"a dog")),
    "an empty caption": tar("0.tar", ("0.jpg", JPEG), ("0.txt", b"")),
    "a caption of blanks": tar("0.tar", ("0.jpg", JPEG), ("0.txt", b" \n ")),
    "a caption in Latin-1": tar("0.tar", ("0.jpg", JPEG), ("0.txt", "café".encode("latin-1"))),
    "a caption in UTF-16": tar("0.tar", ("0.jpg", JPEG), ("0.txt", "a cat".encode("utf-16"))),
    "a caption with a byte order mark": tar("0.tar", ("0.jpg", JPEG), ("0.txt", b"\xef\xbb\xbfa cat")),
    "a caption with zero bytes and escape sequences": tar("0.tar", ("0.jpg", JPEG), ("0.txt", b"a\0 \x1b[2J cat")),
    "a caption of a megabyte": tar("0.tar", ("0.jpg", JPEG), ("0.txt", b"cat " * 250_000)),
    "a caption in JSON that is cut": tar("0.tar", ("0.jpg", JPEG), ("0.json", b'{"caption": ')),
    "a caption in JSON that is a list": tar("0.tar", ("0.jpg", JPEG), ("0.json", b"[1]")),
    "a caption in JSON that is a number": tar("0.tar", ("0.jpg", JPEG), ("0.json", b'{"caption": 7}')),
    "a caption in JSON that is nested 100,000 deep": tar("0.tar", ("0.jpg", JPEG), ("0.json", b"[" * 100_000)),
    "an empty picture beside a good one": tar("0.tar", ("1.jpg", b""), *GOOD),
    "half a picture beside a good one": tar("0.tar", ("1.jpg", JPEG[:100]), *GOOD),
    "an index that is damaged": lambda w: (
        content("a/datencoder_index.safetensors", "damaged")(w),
        tar("a/0.tar", *GOOD)(w).parent,
    )[1:],
    "a folder in the place of the index": lambda w: (
        files.folder("a/datencoder_index.safetensors/x")(w),
        tar("a/0.tar", *GOOD)(w).parent,
    )[1:],
    "a file of a Mac beside a picture": tar("0.tar", ("._0.jpg", b"\0\5\x16\7"), *GOOD),
}.items():
    KIND.used(_name, _make)


def train(path: Any) -> None:
    """Takes a batch for training."""
    options = {"batch_size": 8, "seed": 0, "resolution": 16, "vision_size": None}
    Feed([Shards(path, quiet=True)], [1.0], **options).batch(0)  # pyright: ignore[reportArgumentType]


for _name, _make in {
    "a tar of texts that are called pictures": tar("0.tar", *((f"{i}.jpg", b"text") for i in range(300))),
    "a tar of pictures of 30,000 pixels a side": tar("0.tar", *((f"{i}.png", bomb(30_000)) for i in range(300))),
    "a tar of pictures of one pixel": tar(
        "0.tar", *((f"{i}.png", encoded(Image.fromarray(noise()[:1, :1]), "PNG")) for i in range(300))
    ),
}.items():
    KIND.refused(f"{_name}, in training", _with_index(_make), train)


def _of_folder(path: Any) -> None:
    read_all(Folder(path, quiet=True))


def _pictures(*makers: files.Maker) -> files.Maker:
    """A folder of what these write into it."""

    def make(where: Path) -> Path:
        Path("pictures").mkdir()
        for each in makers:
            each(where)
        return Path("pictures")

    return make


_CAT = picture("pictures/0.png")
for _name, _make in {
    "that is not there": nothing("pictures"),
    "that is a file": content("pictures", "text"),
    "that is empty": files.folder("pictures"),
    "of texts alone": _pictures(content("pictures/0.txt", "a cat")),
    "of unknown endings": _pictures(content("pictures/0.heic", "heic")),
    "of empty pictures": _pictures(content("pictures/0.png", b"")),
    "of links to nothing": _pictures(files.link("pictures/0.png", "gone.png")),
    "of files that begin with a dot": _pictures(picture("pictures/.0.png")),
    "of folders that are called pictures": _pictures(files.folder("pictures/0.png")),
    "of pipes": _pictures(files.fifo("pictures/0.png")),
    "whose name has 300 letters": nothing("n" * 300),
    "whose name has a zero byte": nothing("a\0b"),
    "that links to itself": files.link("pictures", "pictures"),
}.items():
    KIND.refused(f"a folder {_name}", _make, _of_folder)
for _name, _make in {
    "of pictures": _pictures(_CAT, content("pictures/0.txt", "a cat")),
    "with a link to itself inside": _pictures(_CAT, files.link("pictures/again", ".")),
    "with a caption that is a folder": _pictures(_CAT, files.folder("pictures/0.txt")),
    "with a caption that is a pipe": _pictures(_CAT, files.fifo("pictures/0.txt")),
    "with a caption in Latin-1": _pictures(_CAT, content("pictures/0.txt", "café".encode("latin-1"))),
    "with a picture whose name is not UTF-8": _pictures(picture(os.fsdecode(b"pictures/caf\xe9.png"))),
    "with a picture whose name has a line break": _pictures(picture("pictures/a\nb.png")),
    "with a damaged picture": _pictures(_CAT, content("pictures/1.png", "damaged")),
}.items():
    KIND.used(f"a folder {_name}", _make, _of_folder)


def records(text: str | bytes) -> files.Maker:
    """A folder whose metadata of records are this text."""
    return lambda where: {"kind": "records", "path": str(content(f"records/{METADATA}", text)(where).parent)}


_METADATA = {
    "format": "datencoder-records",
    "format_version": 1,
    "settings": {},
    "pictures": 1,
    "per_file": 1,
    "arrays": {},
}
for _name, _section in {
    "of an unknown kind": {"kind": "laion", "path": "a"},
    "without a kind": {"path": "a"},
    "whose kind is a number": {"kind": 3},
    "whose kind is a list": {"kind": ["shards"], "path": "a"},
    "without a path": {"kind": "shards"},
    "whose path is a number": {"kind": "shards", "path": 3},
    "whose path is null": {"kind": "folder", "path": None},
    "whose path is a list": {"kind": "folder", "path": ["a", "b"]},
    "with an option of another kind": {"kind": "folder", "path": "a", "split": "train"},
    "of records that are not there": {"kind": "records", "path": "records"},
    "of records with a path of 300 letters": {"kind": "records", "path": "n" * 300},
    "of the embedded world in no known split": {"kind": "world", "count": 3, "split": "half"},
    "of the embedded world without any picture": {"kind": "world", "count": 0},
    "of the embedded world with a negative count": {"kind": "world", "count": -3},
    "of the embedded world with a count that is a text": {"kind": "world", "count": "many"},
    "of the embedded world with pictures of no size": {"kind": "world", "count": 1, "size": 0},
}.items():
    KIND.refused(f"a source {_name}", nothing(_section), lambda section: read_all(open_source(section)))
for _name, _text in {
    "that are empty": "",
    "that are a list": "[]",
    "of another format": json.dumps(_METADATA | {"format": "other"}),
    "that are incomplete": json.dumps({key: value for key, value in _METADATA.items() if key != "arrays"}),
    "whose settings are a list": json.dumps(_METADATA | {"settings": [1]}),
    "whose settings are null": json.dumps(_METADATA | {"settings": None}),
}.items():
    KIND.refused(f"records with metadata {_name}", records(_text), lambda section: read_all(open_source(section)))
