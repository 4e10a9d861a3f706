"""Concept files: one safetensors file with a concept's vectors, its weight offsets and what they belong to.

embeddings                 [n, d]         float32
offsets.<path>.down        [in, rank]     float32, `<path>` a projection of the UNet
offsets.<path>.up          [rank, out]    float32
metadata                   format, format_version, token, blend, base, fingerprint, nearest_word, details (JSON)
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import open_tensors, read_tensor
from datencoder_jax.errors import UserError
from datencoder_jax.typing import Concept, LowRank

FORMAT = "datencoder-concept"
VERSION = "1"

_PREFIX = "offsets."


def save_concept(path: str | Path, concept: Concept) -> None:
    """Writes `concept` at `path`, whole or not at all.

    Raises:
        UserError: the concept holds values that are not finite or shapes that do not fit, or `path` cannot be written.
    """
    arrays = {"embeddings": concept.embeddings}
    for name, offset in concept.offsets.items():
        arrays[f"{_PREFIX}{name}.down"], arrays[f"{_PREFIX}{name}.up"] = offset.down, offset.up
    host = {name: np.asarray(value).astype(np.float32) for name, value in arrays.items()}
    _check_values("The concept", host, concept.blend)
    _offsets("The concept", host)
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "token": concept.token,
        "blend": repr(float(concept.blend)),
        "base": concept.base,
        "fingerprint": concept.fingerprint,
        "nearest_word": concept.nearest_word,
        "details": json.dumps(concept.metadata, sort_keys=True),
    }
    with atomic_write(path) as temporary:
        save_tensors(temporary, host, metadata)


def load_concept(
    path: str | Path,
    fingerprint: str | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    *,
    base: str = "the loaded model",
    width: int | None = None,
) -> Concept:
    """The concept in the file `path`.

    Args:
        path: the file.
        fingerprint: of the base model it is to be used with; None skips the check.
        shapes: `(in, out)` of that model's projections by module path; None skips the check.
        base: what to call that base model in an error.
        width: the width of that model's token vectors; None skips the check.

    Raises:
        UserError: the file is missing, damaged, no concept file, of an unknown version, made for another base model, or
            holds values that are not finite or shapes that do not fit.
    """
    path = expand_user(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the concept file in it.")
    with open_tensors(path) as file:
        metadata = dict(file.metadata() or {})
        _check_format(path, metadata)
        names = list(file.keys())
        host = {key: read_tensor(path, file, key).astype(np.float32) for key in names}
    if fingerprint is not None and metadata["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} belongs to another base model: it was made for {metadata['base']} "
            f"({metadata['fingerprint'][:8]}) and this is {base} ({fingerprint[:8]}); "
            "load that model, or personalize again with this one."
        )
    blend, details = _parse(path, metadata)
    _check_values(str(path), host, blend)
    offsets = _offsets(str(path), host)
    _check_fit(path, host["embeddings"], offsets, shapes, width)
    placed = jax.device_put((host["embeddings"], offsets))
    return Concept(
        embeddings=placed[0],
        offsets=placed[1],
        token=metadata["token"],
        blend=blend,
        base=metadata["base"],
        fingerprint=metadata["fingerprint"],
        nearest_word=metadata["nearest_word"],
        metadata=details,
    )


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file but not a concept file: its metadata does not say {FORMAT}.")
    version = metadata.get("format_version")
    if version != VERSION:
        raise UserError(f"{path} is a concept file of format version {version}; this program reads version {VERSION}.")
    lacking = [key for key in ("token", "blend", "base", "fingerprint", "nearest_word") if not metadata.get(key)]
    if lacking:
        raise UserError(f"{path} is a damaged concept file: its metadata lacks {', '.join(lacking)}.")


def _parse(path: Path, metadata: Mapping[str, str]) -> tuple[float, dict[str, str]]:
    try:
        details = json.loads(metadata.get("details", "{}"))
        return float(metadata["blend"]), {str(key): str(value) for key, value in details.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is a damaged concept file: its metadata cannot be read ({error}).") from error


def _check_values(origin: str, arrays: Mapping[str, np.ndarray], blend: float) -> None:
    odd = sorted(name for name, array in arrays.items() if not np.isfinite(array).all())
    if not math.isfinite(blend):
        odd.append("blend")
    if odd:
        raise UserError(f"{origin} holds values that are not finite (NaN or infinity) in {', '.join(odd[:5])}.")


def _offsets(origin: str, arrays: Mapping[str, np.ndarray]) -> dict[str, LowRank]:
    """The offsets among `arrays`, which hold nothing else but `embeddings`; a `UserError` on any other content."""
    embeddings = arrays.get("embeddings")
    if embeddings is None or embeddings.ndim != 2 or 0 in embeddings.shape:
        shape = "none" if embeddings is None else list(embeddings.shape)
        raise UserError(f"{origin} should hold embeddings of shape [n, d] and has {shape}.")
    paths = set()
    for name in arrays:
        path, _, part = name.removeprefix(_PREFIX).rpartition(".")
        if name.startswith(_PREFIX) and path and part in ("down", "up"):
            paths.add(path)
        elif name != "embeddings":
            raise UserError(f"{origin} holds {name}, which is no part of a concept.")
    offsets = {}
    for path in sorted(paths):
        down, up = (arrays.get(f"{_PREFIX}{path}.{part}") for part in ("down", "up"))
        if down is None or up is None:
            raise UserError(f"{origin} holds only one of the two factors of {path}.")
        if down.ndim != 2 or up.ndim != 2 or down.shape[1] != up.shape[0]:
            raise UserError(
                f"{origin}: the factors of {path} should be [in, rank] and [rank, out] and are "
                f"{list(down.shape)} and {list(up.shape)}."
            )
        offsets[path] = LowRank(down, up)
    return offsets


def _check_fit(
    path: Path,
    embeddings: np.ndarray,
    offsets: Mapping[str, LowRank],
    shapes: Mapping[str, tuple[int, int]] | None,
    width: int | None,
) -> None:
    if width is not None and embeddings.shape[1] != width:
        raise UserError(f"{path} holds token vectors of {embeddings.shape[1]} and the model's are of {width}.")
    if shapes is None:
        return
    for name, offset in offsets.items():
        if name not in shapes:
            raise UserError(f"{path} holds an offset of {name}, which the model does not have.")
        found = (offset.down.shape[0], offset.up.shape[1])
        if found != tuple(shapes[name]):
            raise UserError(f"{path}: the offset of {name} is {list(found)} and the model's is {list(shapes[name])}.")
