"""Paths as people write them."""

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
