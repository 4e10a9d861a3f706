"""Files and folders that appear whole or not at all.

Everything is written under a temporary sibling name, flushed to the disk and renamed, so neither a crash nor a full
disk leaves a file that looks finished and is not. Failures of the file system are `UserError`s that name the path.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.errors import UserError

CHECKPOINTS = "checkpoints"
"""The folder by which a training run's work folder is known: a `config.json` it has, as other folders of ours do."""
_PREFIX = ".tmp-"
_KEPT = 50  # letters of a name in that of its temporary sibling


@contextmanager
def atomic_write(path: str | Path, *, replaces: str | None = None, flushed: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write a file, or make a folder, at; it takes `path`'s place on a clean exit.

    Missing parent folders are made. The sibling keeps the ending of the name, by which some writers choose a format.

    Args:
        path: the file or folder to write. An existing file is replaced.
        replaces: a file whose presence marks an existing folder at `path` as one of ours; such a folder (or an empty
            one) is replaced as a whole where it holds no files but such as the new one has. Any other folder is left
            alone: it may hold somebody's files, or a run's checkpoints.
        flushed: the block itself flushes what it writes, and the caller the folder afterwards, so that nothing but the
            renaming is done on exit.

    Raises:
        UserError: the place cannot be written (no space, no permission, no name, a folder in the way); nothing is left
            there.
    """
    path = expand_user(path, to_write=True)
    if not path.name:
        raise UserError(f"Cannot write {path}: it is a folder; name a file in it.")
    # A name may be as long as names can be; the end of it leaves room for the rest, in letters of four bytes too.
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{path.name[-_KEPT:]}")
    try:
        check_destination(path, replaces)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not flushed:
            flush(temporary)
        if path.is_dir() and any(path.iterdir()):
            _check_contents(temporary, path)
            _swap_folder(temporary, path)
        else:
            os.replace(temporary, path)
        if not flushed:
            flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write {path}: {_reason(error)}.") from error
    finally:
        _remove(temporary)


def write_all(folder: str | Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files into `folder`, which is made if it is missing; other files there stay.

    Every file is first written in full under a temporary name and flushed to the disk. Only when all are there do they
    get their names, the first of `writers` last: where that one is new, so are the others.

    Args:
        folder: where to.
        writers: what writes a file, given the path to write at, by file name.

    Raises:
        UserError: something cannot be written. Then `folder` is as it was, unless it was the renaming itself that
            failed, or the flushing of the folder after it: files that had their names by then keep them.
    """
    folder = expand_user(folder, to_write=True)
    with no_empty_folder(folder):
        with ExitStack() as renames:
            for name, write in writers.items():
                temporary = renames.enter_context(atomic_write(folder / name, flushed=True))
                if (folder / name).is_dir():  # an empty one, which would show only when the file is renamed
                    raise UserError(f"Cannot write {folder / name}: a folder is in the way; choose another place.")
                write(temporary)
                flush(temporary)
        try:
            flush_folder(folder)
        except OSError as error:
            raise UserError(f"Cannot write to {folder}: {(error.strerror or str(error)).lower()}.") from error


@contextmanager
def no_empty_folder(folder: str | Path) -> Iterator[None]:
    """When the block fails, removes `folder` and its parents again as far as the block made them and they are empty."""
    folder = expand_user(folder, to_write=True)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one that holds something stays, and so do its parents
            for path in made:
                path.rmdir()
        raise


def save_tensors(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file at `path` (not atomic by itself: use inside `atomic_write`).

    Arrays are made contiguous first: the safetensors writer takes the memory of a strided view (such as a transpose)
    as it lies and silently writes scrambled values.
    """
    contiguous = {name: _contiguous(np.asarray(value)) for name, value in arrays.items()}
    save_file(contiguous, str(path), metadata=dict(metadata or {}))
    # The writer creates its file readable by the owner alone; give it what any other new file would have.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def _contiguous(array: np.ndarray) -> np.ndarray:
    # np.ascontiguousarray alone would turn a scalar into a vector of one.
    return np.ascontiguousarray(array).reshape(array.shape)


def check_destination(path: Path, replaces: str | None) -> None:
    """Raises `UserError` where `atomic_write` would not write a folder at `path`; arguments are those of it."""
    if not path.is_dir() or not any(path.iterdir()):
        return
    if replaces is None:
        raise UserError(f"Cannot write {path}: a folder of that name is in the way; choose another name.")
    if (path / CHECKPOINTS).exists():
        raise UserError(f"Cannot write {path}: it is the work folder of a training run; choose another name.")
    if not (path / replaces).exists():
        raise UserError(
            f"Cannot write {path}: the folder is not empty and holds no {replaces}, so it is not ours to replace; "
            "choose another name."
        )


def _check_contents(new: Path, old: Path) -> None:
    """Raises `UserError` where the folder `old` holds files that none of the folder `new` takes the place of."""
    files = sorted(path.relative_to(old) for path in old.rglob("*") if not path.is_dir() and path.name != ".DS_Store")
    for file in files:
        if not (new / file).exists():
            raise UserError(f"Cannot write {old}: it also holds {file}, which would be lost; choose another name.")


def _swap_folder(new: Path, old: Path) -> None:
    """Puts the folder `new` at `old`; a folder cannot be renamed over a full one, so `old` steps aside first."""
    aside = new.with_name(new.name + "-old")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if not path.is_dir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return
    for child in path.iterdir():
        flush(child)
    flush_folder(path)


def flush_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):  # whatever made the path unwritable has been reported already
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    text = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ").rstrip(".")
    return text[:1].lower() + text[1:]
