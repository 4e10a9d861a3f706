"""The reader of a concept (`typing.Reader`) in its file.

reader.encoder.<name>      parameters of its encoder, in the layouts of `models`, float32
reader.classes             [pictures, taps, vision width]
reader.patches             [pictures, patches, vision width]
reader.context             [1, l, d]
reader.pooled              [1, p], of XL alone
reader.scale               [n]
metadata                   reader: the encoder's configuration (JSON)
"""

import json
from collections.abc import Mapping

import numpy as np

from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.typing import AnyArray, Reader

PREFIX = "reader."
_ENCODER = f"{PREFIX}encoder."
_RANKS = {"classes": 3, "patches": 3, "context": 3, "pooled": 2, "scale": 1}


def reader_arrays(reader: Reader | None) -> dict[str, AnyArray]:
    """What the file holds of a reader."""
    if reader is None:
        return {}
    parts = {f"{PREFIX}{part}": getattr(reader, part) for part in _RANKS if getattr(reader, part) is not None}
    return parts | {f"{_ENCODER}{name}": value for name, value in reader.encoder.params.items()}


def reader_metadata(reader: Reader | None) -> dict[str, str]:
    """What the file's metadata say of a reader."""
    return {} if reader is None else {"reader": json.dumps(reader.encoder.config.to_dict())}


def read_reader(
    origin: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], embeddings: np.ndarray
) -> Reader | None:
    """The reader among `arrays`, if there is one; the others are not looked at.

    Raises:
        UserError: a part is missing, or does not fit the others.
    """
    found = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    if not found and "reader" not in metadata:
        return None
    damaged = f"{origin} is damaged: its reader"
    try:
        config = EncoderConfig.from_dict(json.loads(metadata["reader"]))
        wanted = abstract_params(TuningEncoder, config)
    except (UserError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise UserError(f"{damaged} is not described ({' '.join(str(error).split())}).") from error
    parts = {name: array for name, array in found.items() if not name.startswith("encoder.")}
    params = {name.removeprefix("encoder."): array for name, array in found.items() if name.startswith("encoder.")}
    if set(parts) | {"pooled"} != set(_RANKS) or set(params) != set(wanted):
        raise UserError(f"{damaged} is not whole, or holds something else.")
    odd = [name for name, array in parts.items() if array.ndim != _RANKS[name] or 0 in array.shape]
    odd += [name for name, array in params.items() if array.shape != wanted[name].shape]
    if not odd and parts["scale"].shape != embeddings.shape[:1]:
        odd.append("scale")
    if not odd and config.embedding_dim != embeddings.shape[1]:
        odd.append("embedding_dim")
    if not odd and len(parts["classes"]) != len(parts["patches"]):
        odd.append("patches")
    if odd:
        raise UserError(f"{damaged} has parts that do not fit: {', '.join(odd[:5])}.")
    ordered = {name: params[name] for name in wanted}
    return Reader(Model(TuningEncoder, config, ordered), *(parts.get(name) for name in _RANKS))  # type: ignore[arg-type]
