"""What writes the files of cases. Every function returns a maker: given a folder it writes there and returns paths."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save, save_file

Maker = Callable[[Path], Any]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>\n"


def content(name: str, data: bytes | str) -> Maker:
    """A file with this content."""

    def make(_: Path) -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
        return Path(name)

    return make


def nothing(argument: Any) -> Maker:
    """No file at all, only an argument."""
    return lambda _: argument


def folder(name: str) -> Maker:
    """An empty folder."""

    def make(_: Path) -> Path:
        Path(name).mkdir(parents=True)
        return Path(name)

    return make


def link(name: str, target: str) -> Maker:
    """A symbolic link."""

    def make(_: Path) -> Path:
        Path(name).symlink_to(target)
        return Path(name)

    return make


def fifo(name: str) -> Maker:
    """A named pipe that nobody writes to."""

    def make(_: Path) -> Path:
        import os

        os.mkfifo(name)
        return Path(name)

    return make


def linked(make: Maker, name: str) -> Maker:
    """A symbolic link of this name to what another maker writes."""

    def make_link(where: Path) -> Path:
        Path(name).symlink_to(make(where))
        return Path(name)

    return make_link


def changed(make: Maker, change: Callable[[bytes], bytes]) -> Maker:
    """The file of another maker, with its content changed."""

    def make_changed(where: Path) -> Path:
        path = make(where)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make_changed


def cut(make: Maker, share: float) -> Maker:
    """The first part of the file of another maker."""
    return changed(make, lambda data: data[: int(share * len(data))])


# --- pictures


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    """A uint8 picture that does not compress."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def picture(name: str, image: Any = None, **options: Any) -> Maker:
    """A picture, of noise unless one is given, as Pillow saves it."""

    def make(_: Path) -> Path:
        shown = noise() if image is None else image
        shown = Image.fromarray(shown) if isinstance(shown, np.ndarray) else shown
        shown.save(name, **options)
        return Path(name)

    return make


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size, with these chunks in it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


# --- tensors


def tensors(name: str, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Maker:
    """A safetensors file."""

    def make(_: Path) -> Path:
        contiguous = {key: np.ascontiguousarray(value).reshape(np.shape(value)) for key, value in arrays.items()}
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, name, dict(metadata) if metadata else None)
        return Path(name)

    return make


def raw_tensors(name: str, header: Any, data: bytes = b"", length: int | None = None) -> Maker:
    """A safetensors file whose header is written as it is: a JSON value or bytes, with a length of choice."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return content(name, struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor_bytes(arrays: Mapping[str, Any]) -> bytes:
    """The content of a safetensors file."""
    return save({key: np.ascontiguousarray(value).reshape(np.shape(value)) for key, value in arrays.items()})


def damaged_tensors(kind: Any, file: str, arrays: Mapping[str, Any]) -> None:
    """Adds to a kind the ways in which every safetensors file can be damaged.

    Args:
        kind: a `Kind`.
        file: what the file is called.
        arrays: the tensors of a file that is right.
    """
    good = tensor_bytes(arrays)
    first, (key, array) = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, next(iter(arrays.items()))
    as_bytes = lambda data: content(file, data)  # noqa: E731
    raw = lambda header, data=b"", length=None: raw_tensors(file, header, data, length)  # noqa: E731
    ways: dict[str, Maker] = {
        "no file": nothing(Path(file)),
        "an empty file": as_bytes(b""),
        "a file of four bytes": as_bytes(b"\x01\0\0\0"),
        "a file cut in its header": as_bytes(good[:20]),
        "a file cut in its tensors": as_bytes(good[:-3]),
        "a file with bytes after its tensors": as_bytes(good + b"more"),
        "an error page of a web server under this name": as_bytes(HTML),
        "a pointer of Git LFS in the place of the file": as_bytes(LFS_POINTER),
        "a pickle of PyTorch under this name": as_bytes(b"PK\x03\x04" + bytes(99)),
        "an old pickle under this name": as_bytes(b"\x80\x02}q\0X\5\0\0\0alpha" + bytes(60)),
        "a header that is longer than the file": raw({key: first}, bytes(8), length=10_000),
        "a header of 2^63 bytes": raw({key: first}, bytes(8), length=2**63),
        "a header that is no JSON": raw(b"{this is no JSON", bytes(8)),
        "a header that is a list": raw([first], bytes(8)),
        "a header nested 100,000 deep": raw(b"[" * 100_000),
        "a header that is not UTF-8": raw(b'{"\xff\xfe": 1}', bytes(8)),
        "negative offsets": raw({key: first | {"data_offsets": [-8, 0]}}, bytes(8)),
        "offsets beyond the end": raw({key: first | {"data_offsets": [0, 8000]}}, bytes(8)),
        "offsets that overlap": raw({key: first, "b": first}, bytes(8)),
        "offsets that run backwards": raw({key: first | {"data_offsets": [8, 0]}}, bytes(8)),
        "a shape that does not fit its offsets": raw({key: first | {"shape": [3]}}, bytes(8)),
        "a shape of 2^62 numbers": raw({key: first | {"shape": [2**31, 2**31]}}, bytes(8)),
        "a type that does not exist": raw({key: first | {"dtype": "F33"}}, bytes(8)),
        "metadata that are not texts": raw({"__metadata__": {"a": 1}, key: first}, bytes(8)),
        "a link to nothing": link(file, "gone.safetensors"),
        "a link to itself": link(file, file),
        "a pipe in the place of the file": fifo(file),
        "a name of 300 letters": nothing(Path("n" * 300 + ".safetensors")),
        "a path of 5,000 letters": nothing(Path("n/" * 2500 + file)),
        "a name with a zero byte": nothing(Path(f"a\0{file}")),
        "a home folder of nobody": nothing(Path(f"~nosuchuser/{file}")),
        "numbers of 8 bits, quantized": _in_8_bits(file, arrays),
        "whole numbers": tensors(file, dict(arrays) | {key: array.astype(np.int32)}),
        "a value that is not a number": tensors(file, dict(arrays) | {key: np.full_like(array, np.nan)}),
        "an infinite value": tensors(file, dict(arrays) | {key: np.full_like(array, np.inf)}),
    }
    for name, make in ways.items():
        kind.refused(name, make)
    kind.used("a link to a good file", linked(as_bytes(good), f"link-{file}"))
    kind.used("a good file with a line break in its name", content(f"a\nb-{file}", good))
    kind.used("a good file in half precision", tensors(file, {k: v.astype(np.float16) for k, v in arrays.items()}))


def _in_8_bits(file: str, arrays: Mapping[str, Any]) -> Maker:
    """The tensors in a type of 8 bits, whose numbers are all 0."""
    header, end = {}, 0
    for key, array in arrays.items():
        header[key] = {"dtype": "F8_E4M3", "shape": list(array.shape), "data_offsets": [end, end + array.size]}
        end += array.size
    return raw_tensors(file, header, bytes(end))


# --- shards


def tar(name: str, *members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> Maker:
    """A tar of these members."""

    def make(_: Path) -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(name, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    archive.addfile(member)
                else:
                    info = tarfile.TarInfo(member[0])
                    info.size = len(member[1])
                    archive.addfile(info, io.BytesIO(member[1]))
        return Path(name)

    return make


def encoded(image: Any = None, kind: str = "JPEG", **options: Any) -> bytes:
    """A picture's file content, of noise unless one is given."""
    shown = Image.fromarray(noise()) if image is None else image
    with io.BytesIO() as file:
        shown.save(file, kind, **options)
        return file.getvalue()
