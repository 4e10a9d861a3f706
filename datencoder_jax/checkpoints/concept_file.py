"""Concept files: one safetensors file with a concept's vectors, the edits of its weights and what they belong to.

embeddings                 [n, d]         float32
offsets.<path>.down        [in, rank]     float32, `<path>` a projection of the UNet
offsets.<path>.up          [rank, out]    float32
metadata                   format, format_version, token, blend, base, fingerprint, nearest_word, details (JSON)

In the place of `down` and `up` other edits (`typing.Edit`) have `weight [in, out]`, `directions [out, rank]`,
`output [k, out]` or `residual [n, out]`. Gated ones come with `gate.direction`, `gate.dual` `[k, d]`, `gate.bias` and
`gate.temperature` `[k]`. `checkpoints.concept_reader` has what a reader comes with.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.concept_reader import PREFIX as _READER
from datencoder_jax.checkpoints.concept_reader import read_reader, reader_arrays, reader_metadata
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import open_tensors, read_float32
from datencoder_jax.errors import UserError
from datencoder_jax.printable import escape_hidden, is_printable
from datencoder_jax.typing import Concept, Dense, Edit, Gate, Gated, LowRank, Offsets, Removed, Residual

FORMAT = "datencoder-concept"
VERSION = "1"

_PREFIX, _GATE = "offsets.", "gate."

_AXES: dict[type, dict[str, tuple[str, str]]] = {
    LowRank: {"down": ("in", "rank"), "up": ("rank", "out")},
    Dense: {"weight": ("in", "out")},
    Removed: {"directions": ("out", "rank")},
    Gated: {"output": ("k", "out")},
    Residual: {"residual": ("n", "out")},
}
"""The arrays of every kind of edit, and what their axes are."""


def save_concept(path: str | Path, concept: Concept) -> None:
    """Writes `concept` at `path`, whole or not at all.

    Raises:
        UserError: the concept could not be loaded again, since it holds values that are not finite, shapes that do not
            fit, a placeholder that cannot be printed or a text that is empty; or `path` cannot be written.
    """
    host, metadata = _content(concept)
    with atomic_write(path) as temporary:
        save_tensors(temporary, host, metadata)


def concept_size(concept: Concept) -> int:
    """Bytes of the file that `save_concept` writes.

    Raises:
        UserError: it would write none.
    """
    return len(save(*_content(concept)))


def _content(concept: Concept) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of its file."""
    arrays = {"embeddings": concept.embeddings}
    for projection, edit in concept.offsets.items():
        arrays |= {f"{_PREFIX}{projection}.{part}": array for part, array in edit._asdict().items()}
    if concept.gate is not None:
        arrays |= {f"{_GATE}{part}": array for part, array in concept.gate._asdict().items()}
    arrays |= reader_arrays(concept.reader)
    with np.errstate(over="ignore"):  # what is infinite then is refused below
        host = {name: np.asarray(value).astype(np.float32) for name, value in arrays.items()}
    _check_values("The concept", host, concept.blend)
    _parts("The concept", host)
    about_reader = reader_metadata(concept.reader)
    read_reader("The concept", host, about_reader, host["embeddings"])
    metadata = about_reader | {
        "format": FORMAT,
        "format_version": VERSION,
        "token": concept.token,
        "blend": repr(float(concept.blend)),
        "base": escape_hidden(concept.base),
        "fingerprint": concept.fingerprint,
        "nearest_word": escape_hidden(concept.nearest_word),
        "details": json.dumps(
            {escape_hidden(key): escape_hidden(value) for key, value in concept.metadata.items()}, sort_keys=True
        ),
    }
    _check_text("The concept", metadata, {}, host)
    _check_lacking("The concept could not be loaded", metadata)
    _check_placeholders("The concept could not be loaded", metadata, host["embeddings"])
    return host, metadata


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
            holds values that are not finite, shapes that do not fit or text that is not one printable line.
    """
    path = expand_user(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the concept file in it.")
    with open_tensors(path) as file:
        metadata = dict(file.metadata() or {})
        _check_format(path, metadata)
        names = list(file.keys())
        host = {key: read_float32(path, file, key) for key in names}
    blend, details = _parse(path, metadata)
    _check_text(str(path), metadata, details, host)
    if fingerprint is not None and metadata["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} belongs to another base model: it was made for {metadata['base']} "
            f"({metadata['fingerprint'][:8]}) and this is {base} ({fingerprint[:8]}); "
            "load that model, or personalize again with this one."
        )
    _check_values(str(path), host, blend)
    offsets, gate = _parts(str(path), host)
    _check_placeholders(f"{path} is a damaged concept file", metadata, host["embeddings"])
    _check_fit(path, host["embeddings"], offsets, shapes, width)
    reader = read_reader(str(path), host, metadata, host["embeddings"])
    placed = jax.device_put((host["embeddings"], offsets, gate, reader))
    return Concept(
        embeddings=placed[0],
        offsets=placed[1],
        token=metadata["token"],
        blend=blend,
        base=metadata["base"],
        fingerprint=metadata["fingerprint"],
        nearest_word=metadata["nearest_word"],
        metadata=details,
        gate=placed[2],
        reader=placed[3],
    )


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file but not a concept file: its metadata does not say {FORMAT}.")
    version = metadata.get("format_version")
    if version != VERSION:
        raise UserError(f"{path} is a concept file of format version {version}; this program reads version {VERSION}.")
    _check_lacking(f"{path} is a damaged concept file", metadata)


def _check_lacking(origin: str, metadata: Mapping[str, str]) -> None:
    lacking = [key for key in ("token", "blend", "base", "fingerprint", "nearest_word") if not metadata.get(key)]
    if lacking:
        raise UserError(f"{origin}: its metadata lacks {', '.join(lacking)}.")


def _check_placeholders(origin: str, metadata: Mapping[str, str], embeddings: np.ndarray) -> None:
    tokens, words = metadata["token"].split(), metadata["nearest_word"].split()
    if not tokens or len(embeddings) % len(tokens) or (len(tokens) > 1 and len(words) != len(tokens)):
        raise UserError(f"{origin}: its placeholders, vectors and nearest words do not fit.")


def _parse(path: Path, metadata: Mapping[str, str]) -> tuple[float, dict[str, str]]:
    try:
        details = json.loads(metadata.get("details", "{}"))
        return float(metadata["blend"]), {str(key): str(value) for key, value in details.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is a damaged concept file: its metadata cannot be read ({error}).") from error


def _check_text(
    origin: str, metadata: Mapping[str, str], details: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> None:
    """Raises `UserError` unless every text of a concept is one printable line: it goes to terminals and model cards."""
    texts = {key: metadata[key] for key in ("token", "base", "fingerprint", "nearest_word")}
    odd = [key for key, text in texts.items() if not is_printable(text)]
    odd += [key for key, text in details.items() if not is_printable(key + text)]
    odd += [name for name in arrays if not is_printable(name)]
    if odd:
        raise UserError(
            f"{origin} holds text that is not one line of printable characters, in {', '.join(odd[:5])}; it may have "
            "been made to mislead, so take it from somebody you trust."
        )


def _check_values(origin: str, arrays: Mapping[str, np.ndarray], blend: float) -> None:
    odd = sorted(name for name, array in arrays.items() if not np.isfinite(array).all())
    if not math.isfinite(blend):
        odd.append("blend")
    if odd:
        raise UserError(f"{origin} holds values that are not finite (NaN or infinity) in {', '.join(odd[:5])}.")
    if not 0.0 <= blend <= 1.0:
        raise UserError(f"{origin} has a blend of {blend:g}, which must lie between 0 and 1.")


def _parts(origin: str, arrays: Mapping[str, np.ndarray]) -> tuple[Offsets, Gate | None]:
    """The edits and the gate among `arrays`; a `UserError` on what is no part of a concept."""
    embeddings = arrays.get("embeddings")
    if embeddings is None or embeddings.ndim != 2 or 0 in embeddings.shape:
        shape = "none" if embeddings is None else list(embeddings.shape)
        raise UserError(f"{origin} should hold embeddings of shape [n, d] and has {shape}.")
    edits: dict[str, dict[str, np.ndarray]] = {}
    gate: dict[str, np.ndarray] = {}
    known = {part for parts in _AXES.values() for part in parts}
    for name, array in arrays.items():
        path, _, part = name.removeprefix(_PREFIX).rpartition(".")
        if name.startswith(_PREFIX) and path and part in known:
            edits.setdefault(path, {})[part] = array
        elif name.startswith(_GATE) and name.removeprefix(_GATE) in Gate._fields:
            gate[name.removeprefix(_GATE)] = array
        elif name != "embeddings" and not name.startswith(_READER):
            raise UserError(f"{origin} holds {name}, which is no part of a concept.")
    offsets = {path: _edit(origin, path, edits[path]) for path in sorted(edits)}
    return offsets, _gate(origin, gate, [edit for edit in offsets.values() if isinstance(edit, Gated)])


def _edit(origin: str, path: str, parts: Mapping[str, np.ndarray]) -> Edit:
    """The edit of a projection, of the kind that has these parts, with axes that fit together."""
    kind = next((kind for kind, axes in _AXES.items() if set(parts) == set(axes)), None)
    if kind is None:
        if set(parts) <= {"down", "up"}:
            raise UserError(f"{origin} holds only one of the two factors of {path}.")
        raise UserError(f"{origin} holds {', '.join(sorted(parts))} of {path}, which is no kind of edit.")
    axes, sizes = _AXES[kind], {}
    for part, names in axes.items():
        shape = parts[part].shape
        if len(shape) != len(names) or any(sizes.setdefault(n, s) != s for n, s in zip(names, shape, strict=True)):
            wanted = " and ".join(f"[{', '.join(names)}]" for names in axes.values())
            found = " and ".join(str(list(parts[name].shape)) for name in axes)
            what = "factors" if kind is LowRank else "edit"
            raise UserError(f"{origin}: the {what} of {path} should be {wanted} and are {found}.")
    return kind(**parts)


def _gate(origin: str, parts: Mapping[str, np.ndarray], gated: list[Gated]) -> Gate | None:
    """The gate that gated edits need, and nothing else has."""
    if not parts and not gated:
        return None
    if set(parts) != set(Gate._fields) or not gated:
        raise UserError(f"{origin} is damaged: gated edits and their gate belong together, and a part is missing.")
    gate = Gate(**parts)
    count = gate.bias.shape
    fits = len(count) == 1 and gate.temperature.shape == count and gate.direction.shape == gate.dual.shape
    if not fits or gate.direction.ndim != 2 or any(len(each.output) != count[0] for each in [*gated, Gated(gate.dual)]):
        raise UserError(f"{origin} is damaged: its gate and its gated edits are of different numbers of concepts.")
    return gate


def _check_fit(
    path: Path,
    embeddings: np.ndarray,
    offsets: Mapping[str, Edit],
    shapes: Mapping[str, tuple[int, int]] | None,
    width: int | None,
) -> None:
    if width is not None and embeddings.shape[1] != width:
        raise UserError(f"{path} holds token vectors of {embeddings.shape[1]} and the model's are of {width}.")
    if shapes is None:
        return
    for name, edit in offsets.items():
        if name not in shapes:
            raise UserError(f"{path} holds an offset of {name}, which the model does not have.")
        wanted: dict[str, int] = dict(zip(("in", "out"), shapes[name], strict=True))
        found = {
            axis: size
            for part, axes in _AXES[type(edit)].items()
            for axis, size in zip(axes, np.shape(getattr(edit, part)), strict=True)
            if axis in wanted
        }
        if any(wanted[axis] != size for axis, size in found.items()):
            have, need = ([sizes[axis] for axis in sorted(found)] for sizes in (found, wanted))
            raise UserError(f"{path}: the offset of {name} is {have} and the model's is {need}.")
