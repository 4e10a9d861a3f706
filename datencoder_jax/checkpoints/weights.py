"""A component's safetensors on disk: plain, half-precision variant or sharded, memory-mapped."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from datencoder_jax.checkpoints.hub import PICKLES, conversion_hint
from datencoder_jax.checkpoints.keys import Renamed
from datencoder_jax.checkpoints.layouts import from_torch_layout
from datencoder_jax.errors import UserError

_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".non_ema")
_READABLE = ("F64", "F32", "F16", "BF16")


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
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{path} does not describe {what} ({reason}).") from error


def read_params(
    folder: Path, abstract: dict[str, jax.ShapeDtypeStruct], *, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """The parameters of the component in `folder`, in Flax layouts, on the host.

    Of several weights files the plain one is taken, then `.fp16`, then `.non_ema`; a sharded file counts as one.

    Raises:
        UserError: no safetensors (pickles are refused), damaged files, or tensors that do not match `abstract`.
    """
    files = _find(folder)
    origin = str(files[0]) if len(files) == 1 else str(folder)
    with ExitStack() as stack:
        source = {}
        for path in files:
            opened = stack.enter_context(open_tensors(path))
            names = list(opened.keys())
            for key in names:
                if key in source:
                    raise UserError(f"{origin}: {key} is in two of its files, {source[key][0].name} and {path.name}.")
                source[key] = (path, opened)

        def read(key: str) -> np.ndarray:
            path, opened = source[key]
            return read_tensor(path, opened, key)

        return from_torch_layout(Renamed(source, read, abstract, origin), abstract, dtype=dtype, origin=origin)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The safetensors file `path`, memory-mapped.

    Raises:
        UserError: the file is missing, unreadable, cut short or no safetensors file.
    """
    try:
        opened = safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        raise UserError(_damage(path, error)) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    with opened:
        yield opened


def read_tensor(path: Path, opened: Any, key: str) -> np.ndarray:
    """Tensor `key` of an opened file; a `UserError` if it is not floating point."""
    kind = opened.get_slice(key).get_dtype()
    if kind not in _READABLE:
        raise UserError(f"{path}: {key} is of type {kind}; supported: {', '.join(_READABLE)}.")
    return opened.get_tensor(key)


def _damage(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`."
    if not start:
        return f"{path} is empty; fetch or write it again."
    detail = str(error).removeprefix("Error while deserializing header: ")
    return f"{path} is damaged, cut short or not a safetensors file ({detail}); fetch or write it again."


def _find(folder: Path) -> list[Path]:
    """The files of the weights to read, checked to exist."""
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
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; "
            f"{conversion_hint(str(folder.parent))}."
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
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is missing.")
    return [index.parent / name for name in names]
