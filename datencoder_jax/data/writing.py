"""What a run leaves in its output folder: all of its files or, when one of them cannot be written, none of them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datencoder_jax.checkpoints.atomic import write_all
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.errors import UserError

_PROBE = b"\0" * 65536  # enough for a full disk to show


def check_writable(folder: str | Path) -> Path:
    """Tries whether files can be written to a folder that may not exist yet; leaves nothing there.

    Returns:
        The folder, with the home in the place of `~`.

    Raises:
        UserError: they cannot: a file is in the way, it is not permitted, there is no space, or the folder is a link to
            a place that is not there.
    """
    folder = expand_user(folder, to_write=True)
    nearest = folder
    try:
        while not nearest.exists() and nearest != nearest.parent:
            if nearest.is_symlink():
                raise UserError(
                    f"Cannot write to {folder}: {nearest} is a link to {os.readlink(nearest)}, which is away."
                )
            nearest = nearest.parent
        if not nearest.is_dir():
            raise UserError(f"Cannot write to {folder}: {nearest} is a file, not a folder.")
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(_PROBE)
            file.flush()
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {(error.strerror or str(error)).lower()}.") from error
    return folder


@contextmanager
def reserve_room(folder: Path, size: int) -> Iterator[None]:
    """Within it a nameless file takes `size` bytes of the disk that `folder` is on, which is free again at its end.

    Raises:
        UserError: the disk has no such room.
    """
    with ExitStack() as stack:
        try:
            _allocate(stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0)), size)
        except OSError as error:
            raise UserError(
                f"Cannot write to {folder}: {(error.strerror or str(error)).lower()}, where {size / 1e6:.1f} MB are to "
                "be written."
            ) from error
        yield


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _allocate(file: Any, size: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # not on macOS, and not on every file system
        if isinstance(error, OSError) and _is_full(error):
            raise
        for start in range(0, size, len(_PROBE)):
            file.write(_PROBE[: size - start])


def write_files(folder: str | Path, files: Mapping[str, Any]) -> None:
    """Writes files into `folder`, which is made if it is missing; other files there stay.

    Args:
        folder: where to.
        files: content by file name: a picture (`PIL.Image` or uint8 `[H, W, 3]`) becomes a PNG, anything else JSON.

    Raises:
        UserError: something cannot be written; see `write_all`.
    """
    write_all(folder, {name: partial(_write, content=content) for name, content in files.items()})


def picture_name(row: int, prompt: str, column: int) -> str:
    """The file name of picture `column` of prompt number `row` (both from 0): `01_a-photo-of-a-s_0.png`."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain)[:48].strip("-") or "prompt"
    return f"{row + 1:02d}_{slug}_{column}.png"


def _write(path: Path, content: Any) -> None:
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    if isinstance(content, Image.Image):
        content.save(path, format="PNG")
    else:
        path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    """`value` as JSON knows it; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if np.ndim(value):
        return [_plain(item) for item in value]
    number = np.asarray(value).item()
    return None if isinstance(number, float) and not math.isfinite(number) else number
