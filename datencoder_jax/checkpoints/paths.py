"""Paths as people write them, and files that come with the package."""

import errno
import os
from pathlib import Path

from datencoder_jax.errors import UserError

_SHOWN = 60  # letters of a path that is too long


def expand_user(path: str | os.PathLike[str], *, to_write: bool = False) -> Path:
    """`path` with a leading `~` or `~name` put out in full.

    It may be the path of nothing. One that the system cannot look up at all is refused here, since `Path.exists` and
    its like answer for it with an `OSError` or a `ValueError`.

    Args:
        to_write: whether something is to be written there, for the sentence of a refusal.

    Raises:
        UserError: `path` is no path, the home folder it names is not known, a name in it is too long or holds what no
            name can, or it leads through a folder that may not be entered.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"A path must be a text or a pathlib.Path, not {type(path).__name__}.")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} starts with a home folder that is not known; write the path in full.") from error
    try:
        os.lstat(expanded)
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise UserError(f"{path} cannot be the path of a file ({error}).") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
            raise UserError(_refusal(str(path), error, to_write)) from error
    return expanded


def _refusal(path: str, error: OSError, to_write: bool) -> str:
    reason = (error.strerror or str(error)).lower()
    if error.errno == errno.ENAMETOOLONG:
        reason, path = f"{reason} ({len(path):,} letters)", f"{path[:_SHOWN]}{path[_SHOWN:] and '...'}"
    return f"Cannot write {path}: {reason}." if to_write else f"{path} cannot be read: {reason}."


_PACKAGE = Path(__file__).parents[1]


def shipped_files(folder: str) -> dict[str, Path]:
    """The recipes ("configs") or images ("examples") that come with the package, by file name.

    They lie among the package's assets where it is installed, and beside the package in a clone.
    """
    packaged = _PACKAGE / "assets" / folder
    place = packaged if packaged.is_dir() else _PACKAGE.parent / folder
    return {file.name: file for file in sorted(place.glob("*.p[yn]*"))}


def find_shipped(path: Path, folder: str) -> Path:
    """The file that comes with the package where `path` is its name ("examples/robot.png") and no file; else `path`."""
    shipped = shipped_files(folder).get(path.name) if str(path.parent) == folder else None
    return path if shipped is None or path.exists() else shipped
