"""One run at a time per output folder, and what a run may replace there: what the same command wrote, and no more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from datencoder_jax.checkpoints.atomic import no_empty_folder
from datencoder_jax.errors import UserError

LOCK_FILE = ".datencoder.lock"
"""The file that a run holds locked in the folder it writes to. The system unlocks it when its process ends."""

REPORT, CONCEPT = "report.json", "concept.safetensors"
_locked: dict[Path, list[Path]] = {}
"""The folders that this process has locked, and what it made of them and their parents."""
_SHOWN = 3  # files that a sentence names before it counts the others


@contextmanager
def lock_folder(folder: Path, option: str = "--out", *, wait: float = 0.0) -> Iterator[None]:
    """Within it no other run writes to `folder`, which is made if it is missing and removed if it stays empty.

    Args:
        folder: where a run writes to.
        option: how a person names another folder.
        wait: seconds to wait for another run to end.

    Raises:
        UserError: another run writes there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with no_empty_folder(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot write to {folder}: {(error.strerror or str(error)).lower()}.") from error
        lock = _acquire_lock(folder, option, wait)
        _locked[folder] = made
        try:
            yield
        finally:
            del _locked[folder]
            if lock is not None:
                # Removed while it is locked: whoever opened it meanwhile sees that it is gone, and tries again.
                with suppress(OSError):
                    (folder / LOCK_FILE).unlink()
                lock.release()


def abandon_folders() -> None:
    """Removes locks, and folders that were made for them and are empty, for a process that ends without unwinding."""
    for folder, made in _locked.items():
        with suppress(OSError):
            (folder / LOCK_FILE).unlink(missing_ok=True)
            for path in made:
                path.rmdir()


def _acquire_lock(folder: Path, option: str, wait: float) -> FileLock | None:
    """The lock of a folder; None on storage that knows no locks, where runs go on without one."""
    lock = FileLock(folder / LOCK_FILE, timeout=wait, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use: another run of datencoder writes there; wait until it has ended, or choose another "
            f"{option}."
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock


def read_report(folder: Path) -> dict[str, Any]:
    """The content of `report.json` in a folder; empty where there is none or it is none of ours."""
    report = read_json_object(folder / REPORT)
    return report if isinstance(report.get("command"), str) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file, or no object in it."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_replaceable(
    folder: Path,
    command: str,
    names: Collection[str],
    is_own: Callable[[str], bool],
    *,
    overwrite: bool,
    option: str = "--out",
) -> None:
    """Raises `UserError` where a run would replace files that no run of the same command has written.

    Args:
        folder: where the run writes to.
        command: the run's.
        names: files, and folders, that it would replace or remove.
        is_own: whether an earlier run of the same command has written one of them.
        overwrite: whether all may be replaced.
        option: how a person names another folder.
    """
    if overwrite:
        return
    foreign = sorted({name for name in names if _is_there(folder / name) and not is_own(name)})
    if not foreign:
        return
    more = len(foreign) - _SHOWN
    files = f"{', '.join(foreign[:_SHOWN])}{f' and {more} more' if more > 0 else ''}"
    maker = read_report(folder).get("command")
    owner = f"`datencoder {maker}`" if maker not in (None, command) else "somebody else"
    raise UserError(
        f"{folder} holds files of {owner} that `datencoder {command}` would replace: {files}; choose another {option}, "
        "or add --overwrite."
    )


def _is_there(path: Path) -> bool:
    """Whether a path names a file, a link, or a folder that is not empty."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return os.path.lexists(path)
