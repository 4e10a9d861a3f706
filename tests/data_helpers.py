"""What the tests of data share: pictures, tar files, sources."""

import io
import os
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from datencoder_jax.data.items import DamagedItem, Item

TINY = {"batch_size": 8, "seed": 5, "resolution": 16, "vision_size": 8, "templates": 4}


def colour(number):
    """A colour of its own for each number below 512."""
    return tuple(36 * (number // base % 8) for base in (1, 8, 64))


def encoded(picture, kind="JPEG", **options):
    """A picture's file content; `picture` is an image or the number of its colour."""
    image = picture if isinstance(picture, Image.Image) else Image.new("RGB", (24, 20), colour(picture))
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def bomb(side):
    """A PNG that claims `side` x `side` pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def write_tar(path, members):
    """A tar of `(name, content)` or ready-made `tarfile.TarInfo`s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def triple(key, number):
    """A picture, its caption and its json, as img2dataset writes them."""
    caption = f"picture {number}"
    return [
        (f"{key}.jpg", encoded(number)),
        (f"{key}.json", f'{{"caption": "{caption}", "key": "{key}"}}'.encode()),
        (f"{key}.txt", caption.encode()),
    ]


def damaged_folder(folder):
    """Shards with one or more of everything that can be wrong, and how many pictures are good."""
    write_tar(folder / "good.tar", [member for key in range(9) for member in triple(f"{key:03d}", key)])
    cut = write_tar(folder / "cut.tar", [member for key in range(9, 13) for member in triple(f"{key:03d}", key)])
    with tarfile.open(cut) as tar:
        third = [member for member in tar if member.name.endswith(".jpg")][2]
    os.truncate(cut, third.offset_data + third.size // 2)
    header = write_tar(folder / "header.tar", triple("13", 13) + triple("14", 14))
    with tarfile.open(header) as tar, open(header, "rb+") as file:
        file.seek(tar.getmembers()[3].offset)
        file.write(b"\xff" * 512)
    (folder / "empty.tar").touch()
    (folder / "text.tar").write_text("no tar at all, but text " * 99)
    animation = [Image.new("RGB", (24, 20), colour(each)) for each in (20, 21)]
    cmyk = Image.new("CMYK", (24, 20), (0, 255, 255, 0))
    write_tar(
        folder / "odd.tar",
        [
            ("empty.jpg", b""),
            ("empty.txt", b"a caption of nothing"),
            ("half.jpg", encoded(1)[:300]),
            ("text.jpg", b"<html>404</html>"),
            ("large.png", bomb(30_000)),
            ("tiny.png", encoded(Image.new("RGB", (3, 3)), "PNG")),
            ("page.html", b"<html>"),
            ("film.mp4", b"film"),
            ("cmyk.jpg", encoded(cmyk)),
            ("film.webp", encoded(animation[0], "WEBP", save_all=True, append_images=animation[1:], lossless=True)),
            ("latin.jpg", encoded(22)),
            ("latin.txt", "café".encode("latin-1")),
            ("json.jpg", encoded(23)),
            ("json.json", b'{"caption": '),
            *triple("twice", 24),
            *triple("twice", 25),
            ("twice.png", encoded(26, "PNG")),
        ],
    )
    return 9 + 2 + 1 + 5


# What the index, the captions and the decoder are to say of them.
INDEX_REPORT = {
    "tar cut short": 2,
    "empty tar": 1,
    "not a tar": 1,
    "empty": 1,
    "unknown ending": 2,
    "duplicate key": 2,
}
CAPTION_REPORT = {"damaged caption": 2}
READ_REPORT = {"damaged": 1, "no picture": 1, "too large": 1, "too small": 1}


class Colours:
    """A source of plain pictures, some of them damaged."""

    report: dict = {}  # noqa: RUF012

    def __init__(self, count, damaged=(), name="colours"):
        self.count, self.damaged, self.name = count, damaged, name
        self.identity = f"{count}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.damaged:
            raise DamagedItem(f"{index}", "odd" if index % 2 else "even")
        return Item(str(index), np.full((24, 20, 3), colour(index), np.uint8))


def numbers(images):
    """Which numbers' colours plain pictures have."""
    digits = np.round(np.asarray(images)[:, 4, 4].astype(float) / 36).astype(int)
    return (digits @ np.array([1, 8, 64])).tolist()
