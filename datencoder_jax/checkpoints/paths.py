"""Paths as people write them, and files that come with the package."""

from pathlib import Path

from datencoder_jax.errors import UserError


def expand_user(path: str | Path) -> Path:
    """`path` with a leading `~` or `~name` put out in full.

    Raises:
        UserError: the home folder it names is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} starts with a home folder that is not known; write the path in full.") from error


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
