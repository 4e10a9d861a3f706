"""Safetensors on disk, memory-mapped (plain, half-precision variant or sharded), and as parameters on the device."""

import functools
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from datencoder_jax.checkpoints.identity import Traits, trait
from datencoder_jax.checkpoints.keys import Tensors, public
from datencoder_jax.checkpoints.layouts import cast, converted
from datencoder_jax.checkpoints.refusals import conversion_hint, is_pickle
from datencoder_jax.errors import UserError
from datencoder_jax.typing import Params

_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".non_ema")
_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: there is no such file, or it does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__} instead of a JSON object.")
    return value


@contextmanager
def describing(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong in the block with the content of the configuration `path` is a `UserError` that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {str(error).rstrip('.')}.") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{path} does not describe {what} ({reason}).") from error


def read_params(
    folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], *, dtype: str = "float32", traits: Traits | None = None
) -> Params:
    """The parameters of the component in `folder`; see `place`.

    Of several weights files the plain one is taken, then `.fp16`, then `.non_ema`; a sharded file counts as one.

    Raises:
        UserError: no safetensors (pickles are refused), damaged files, or tensors that do not match `abstract`.
    """
    files = find_weights(folder)
    origin = str(files[0]) if len(files) == 1 else str(folder)
    with opened(files, origin) as tensors:
        return place(public(tensors, abstract, origin), abstract, dtype=dtype, origin=origin, traits=traits)


def place(
    tensors: Mapping[str, np.ndarray],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: str,
    origin: str,
    traits: Traits | None = None,
) -> Params:
    """Parameters on the default device, in Flax layouts, from tensors under public names.

    One at a time: beside what is on the device, memory holds a single tensor.

    Args:
        tensors: in PyTorch layouts, of any float type.
        abstract: the shapes wanted, as `abstract_params` gives them.
        dtype: the stored type.
        origin: what the error messages call the tensors.
        traits: takes the traits of every parameter, by which the model is recognized.

    Raises:
        UserError: the tensors do not match `abstract`, or a value does not fit into `dtype`.
    """
    params = {}
    for name, array in converted(tensors, abstract, origin):
        if traits is not None:
            traits[name] = trait(array)  # of the values as they are in the file
        params[name] = jax.device_put(cast(array, dtype, name, origin))
    return params


@contextmanager
def opened(files: list[Path], origin: str) -> Iterator[Tensors]:
    """The tensors of `files` under the files' own names.

    Raises:
        UserError: a file is missing or damaged, or a tensor is in two of them; `origin` is what it calls them all.
    """
    with ExitStack() as stack:
        sources: dict[str, tuple[Path, Any]] = {}
        for path in files:
            file = stack.enter_context(open_tensors(path))
            for key in list(file.keys()):
                if key in sources:
                    raise UserError(f"{origin}: {key} is in two of its files, {sources[key][0].name} and {path.name}.")
                sources[key] = (path, file)
        yield Tensors({key: functools.partial(read_tensor, *source, key) for key, source in sources.items()})


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The safetensors file `path`, memory-mapped.

    Raises:
        UserError: the file is missing, unreadable, cut short or no safetensors file.
    """
    _check_file(path)
    try:
        opened = safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        raise UserError(_damage(path, error)) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    with opened:
        yield opened


def _check_file(path: Path) -> None:
    """Raises `UserError` unless there is an ordinary file: a pipe, which a shell's `<(...)` is, would be waited for."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"Cannot read {path}: {reason}.") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; name a file in it.")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not an ordinary file; write it to one first.")


def read_tensor(path: Path, opened: Any, key: str, *, integers: bool = False) -> np.ndarray:
    """Tensor `key` of an opened file.

    Args:
        path: the file's.
        opened: the file, as `open_tensors` gives it.
        integers: whether the tensor may be of integers too.

    Raises:
        UserError: it is of another type, or has more axes than an array can have.
    """
    kind, kinds = opened.get_slice(key).get_dtype(), _FLOATS + (_INTEGERS if integers else ())
    if kind not in kinds:
        raise UserError(f"{path}: {key} is of type {kind}; supported: {', '.join(kinds)}.")
    try:
        return opened.get_tensor(key)
    except ValueError as error:
        raise UserError(f"{path}: {key} cannot be read ({error}).") from error


def read_float32(path: Path, opened: Any, key: str) -> np.ndarray:
    """Tensor `key` of an opened file in float32, infinite where that is too narrow; raises what `read_tensor` does."""
    with np.errstate(over="ignore"):
        return read_tensor(path, opened, key).astype(np.float32)


def _damage(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`."
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            f"{path} is a pickled file under another ending, and reading that can run code; rename it to end in .pt, "
            "and the next try says how to convert it."
        )
    # What is in the Hugging Face cache is a link, and is downloaded again only when what it points to is gone.
    again = f"delete {path.resolve()} and fetch it again" if path.is_symlink() else "fetch or write it again"
    if not start:
        return f"{path} is empty; {again}."
    detail = str(error).removeprefix("Error while deserializing header: ")
    return f"{path} is damaged, cut short or not a safetensors file ({detail}); {again}."


def find_weights(folder: Path, *, hint: str | None = None) -> list[Path]:
    """The files of the weights of the component in `folder`, checked to exist.

    Args:
        hint: how to convert pickled weights; by default as a part of the pipeline in the folder above.

    Raises:
        UserError: there are none, only pickles, or a shard is missing.
    """
    for variant in _VARIANTS:
        for stem in _STEMS:
            whole = folder / f"{stem}{variant}.safetensors"
            if whole.is_file():
                return [whole]
            # diffusers puts the variant of an index before its last ending, transformers after the stem
            for index in (f"{stem}{variant}.safetensors.index.json", f"{stem}.safetensors.index{variant}.json"):
                if (folder / index).is_file():
                    return _shards(folder / index)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    pickles = sorted(path.name for path in folder.iterdir() if is_pickle(path))
    if pickles:
        raise UserError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; "
            f"{hint or conversion_hint(str(folder.parent))}."
        )
    raise UserError(f"{folder} holds no weights: expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors.")


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index} lists no shards under weight_map.")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not a file of its own folder.")
        if not os.path.isfile(index.parent / name):  # which no name makes raise
            raise UserError(f"{index} names {name}, which is missing.")
    return [index.parent / name for name in names]
