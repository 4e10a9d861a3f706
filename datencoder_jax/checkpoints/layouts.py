"""PyTorch's array layouts and Flax's, converted strictly both ways on the host.

    linear       [out, in]              <->  [in, out]
    convolution  [out, in, high, wide]  <->  [high, wide, in, out]
    embedding    [rows, width]          <->  [rows, width]
    vectors, scalars                         unchanged

Strictly: every tensor is used once and every parameter filled once, or it is an error that names the keys.
"""

from collections.abc import Iterable, Iterator, Mapping

import jax
import ml_dtypes
import numpy as np

from datencoder_jax.errors import UserError

FLOATS = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)}


def _is_table(name: str) -> bool:
    # A table of embeddings has the rank of a linear layer; only its name tells them apart.
    return name.endswith("embedding.weight")


def _order(name: str, rank: int, *, to_torch: bool) -> tuple[int, ...]:
    """The axes of one layout in the order of the other."""
    if rank == 4:
        return (3, 2, 0, 1) if to_torch else (2, 3, 1, 0)
    if rank == 2 and not _is_table(name):
        return (1, 0)
    return tuple(range(rank))


def _swap(name: str, array: np.ndarray, *, to_torch: bool) -> np.ndarray:
    """An array in the other layout."""
    return array.transpose(_order(name, array.ndim, to_torch=to_torch))


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the parameter `name` of Flax shape `shape` has in a checkpoint."""
    return tuple(shape[axis] for axis in _order(name, len(shape), to_torch=True))


def from_torch_layout(
    arrays: Mapping[str, np.ndarray],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: str = "float32",
    origin: str = "the weights",
) -> dict[str, np.ndarray]:
    """Parameters in Flax layouts from a checkpoint's tensors.

    Args:
        arrays: tensors by public name, in PyTorch layouts, of any float type; read one at a time, so it may be lazy.
        abstract: the shapes wanted, as `abstract_params` gives them.
        dtype: the type of the result.
        origin: what the error messages call the tensors.

    Returns:
        Contiguous arrays of the shapes of `abstract`, in its order.

    Raises:
        UserError: parameters are missing, unexpected, of the wrong shape, or not floating point.
    """
    return {name: cast(array, dtype, name, origin) for name, array in converted(arrays, abstract, origin)}


def converted(
    arrays: Mapping[str, np.ndarray], abstract: Mapping[str, jax.ShapeDtypeStruct], origin: str
) -> Iterator[tuple[str, np.ndarray]]:
    """As `from_torch_layout`, one parameter at a time and of the type it has in the checkpoint.

    What is wrong with shapes is raised after the last.
    """
    check_names(arrays, abstract, origin)
    odd = []
    for name, wanted in abstract.items():
        array = arrays[name]
        expected = torch_shape(name, wanted.shape)
        if tuple(array.shape) != expected:
            odd.append(f"{name} is {list(array.shape)} instead of {list(expected)}")
            continue
        if array.dtype not in FLOATS:
            raise UserError(f"{origin}: {name} is of type {array.dtype}, which is not supported.")
        # Transposing and casting in one pass would take longer than both.
        yield name, np.ascontiguousarray(_swap(name, array, to_torch=False))
    if odd:
        raise UserError(f"{origin}: {len(odd)} tensor(s) have the wrong shape: {list_some(odd, '; ')}.")


def to_torch_layout(
    params: Mapping[str, jax.Array],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: str = "float32",
    origin: str = "the parameters",
) -> dict[str, np.ndarray]:
    """The inverse of `from_torch_layout`: contiguous arrays in PyTorch layouts, cast to `dtype`.

    Raises:
        UserError: as `from_torch_layout`; also when a finite value does not fit into `dtype`.
    """
    check_names(params, abstract, origin)
    odd = [
        f"{name} is {list(params[name].shape)} instead of {list(wanted.shape)}"
        for name, wanted in abstract.items()
        if tuple(params[name].shape) != tuple(wanted.shape)
    ]
    if odd:
        raise UserError(f"{origin}: {len(odd)} parameter(s) have the wrong shape: {list_some(odd, '; ')}.")
    return {name: cast(_swap(name, np.asarray(params[name]), to_torch=True), dtype, name, origin) for name in abstract}


def check_names(found: Iterable[str], wanted: Iterable[str], origin: str) -> None:
    """Raises `UserError` unless both hold the same names."""
    found, wanted = set(found), set(wanted)
    parts = [
        f"{len(names)} {what} ({list_some(sorted(names), ', ')})"
        for what, names in (("missing", wanted - found), ("unexpected", found - wanted))
        if names
    ]
    if parts:
        raise UserError(f"{origin}: the tensors do not match the configuration: {' and '.join(parts)}.")


def cast(array: np.ndarray, dtype: str, name: str, origin: str) -> np.ndarray:
    """A contiguous copy of type `dtype`; a `UserError` if a finite value does not fit."""
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        # Never a view: the reader's memory may be unmapped later.
        result = np.array(array, dtype=target, order="C")
    narrows = result.dtype == np.float16 and array.dtype != np.float16
    if narrows and (np.isinf(result) & ~np.isinf(array.astype(np.float32))).any():
        raise UserError(f"{origin}: {name} holds values too large for {dtype}; use bfloat16 or float32.")
    return result


def list_some(items: list[str], separator: str, most: int = 5) -> str:
    """The first `most` of the items, and how many more there are."""
    return separator.join(items[:most]) + (f"{separator}and {len(items) - most} more" if len(items) > most else "")
