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
        _check_counts(config, len(found))
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
    if not odd:
        odd = [name for name, fits in _fits(config, parts).items() if not fits]
    if odd:
        raise UserError(f"{damaged} has parts that do not fit: {', '.join(odd[:5])}.")
    ordered = {name: params[name] for name in wanted}
    return Reader(Model(TuningEncoder, config, ordered), *(parts.get(name) for name in _RANKS))  # type: ignore[arg-type]


def _check_counts(config: EncoderConfig, tensors: int) -> None:
    """Raises `ValueError` for counts that no encoder has.

    More layers than there are tensors are among them: the shapes of a million layers would take hours.
    """
    if config.patch_taps < 1:
        raise ValueError(f"its patch_taps is {config.patch_taps} and can be 1 or more")
    counts = {"depth": config.depth, "vision_taps": config.vision_taps, "patch_taps": config.patch_taps}
    for name, count in counts.items():
        if count > tensors:
            raise ValueError(f"its {name} is {count} and its tensors are {tensors}")
    if config.depth and (config.heads < 1 or config.width % config.heads):
        raise ValueError(f"its width {config.width} is no multiple of its heads, {config.heads}")


def _fits(config: EncoderConfig, parts: Mapping[str, np.ndarray]) -> dict[str, bool]:
    """Whether the axes of a reader's parts are those of its encoder."""
    classes, patches, pooled = parts["classes"], parts["patches"], parts.get("pooled")
    return {
        "classes": "classes" not in config.sees or classes.shape[1:] == (config.vision_taps, config.vision_width),
        "patches": len(patches) == len(classes)
        and (
            "patches" not in config.sees
            or (patches.shape[1] % config.patch_taps, patches.shape[2]) == (0, config.vision_width)
        ),
        "context": len(parts["context"]) == 1,
        "pooled": pooled is None or len(pooled) == 1,
    }
