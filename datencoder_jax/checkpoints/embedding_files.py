"""Embedding files of other programs: a placeholder's token vectors in and out.

    diffusers               {"<token>": [n, d]}
    A1111, Forge, ComfyUI   {"emb_params": [n, d]}
    any, of SDXL            {"clip_l": [n, 768], "clip_g": [n, 1280]}

The vectors of a model with two text encoders are one array here, the first encoder's beside the second's.
"""

from pathlib import Path

import numpy as np

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import refuse_pickle
from datencoder_jax.checkpoints.weights import open_tensors, read_float32
from datencoder_jax.errors import UserError
from datencoder_jax.typing import AnyArray, Concept

DIFFUSERS_FILE = "learned_embeds.safetensors"
"""The name under which diffusers looks for an embedding in a folder."""

PARAMS = "emb_params"
"""A1111's name for the vectors, which says nothing of the token: there an embedding is called as its file is."""

_ENCODERS = ("clip_l", "clip_g")
_NAMELESS = (PARAMS, "*")


def diffusers_token(token: str, count: int) -> str:
    """What a placeholder of `count` vectors is called in diffusers.

    Its tokenizer puts prompts into lower case, and a placeholder in capitals would lose all its vectors but the first.
    """
    return token if count == 1 else token.lower()


def numbered(file: str, count: int) -> list[str]:
    """The names of the files of `count` placeholders."""
    stem, dot, kind = file.rpartition(".")
    return [file] if count == 1 else [f"{stem}_{number}{dot}{kind}" for number in range(1, count + 1)]


def each(concept: Concept, file: str) -> list[tuple[str, str, AnyArray]]:
    """File name, placeholder and vectors of each of a concept's placeholders: of several, their files are numbered."""
    found, start = [], 0
    for name, (token, count) in zip(
        numbered(file, len(concept.placeholders)), concept.placeholders.items(), strict=True
    ):
        found.append((name, token, concept.embeddings[start : start + count]))
        start += count
    return found


def embedding_tensors(embeddings: AnyArray, widths: tuple[int, ...], key: str) -> dict[str, np.ndarray]:
    """The tensors of an embedding file, float32.

    Args:
        embeddings: `[n, sum(widths)]`.
        widths: the width of each text encoder's token vectors.
        key: what the vectors of a single text encoder are called: the token, or `PARAMS`.

    Raises:
        UserError: the widths do not add up, or there are more than two text encoders.
    """
    array = np.asarray(embeddings).astype(np.float32)
    if array.ndim != 2 or array.shape[1] != sum(widths) or len(widths) not in (1, 2):
        raise UserError(f"Token vectors {list(array.shape)} do not fit text encoders of widths {list(widths)}.")
    if len(widths) == 1:
        return {key: array}
    return dict(zip(_ENCODERS, np.split(array, [widths[0]], axis=1), strict=True))


def read_embedding(path: str | Path, widths: tuple[int, ...]) -> tuple[str | None, np.ndarray]:
    """The token and the vectors in an embedding file.

    Args:
        path: a safetensors file, or a folder that holds one under diffusers' name.
        widths: the width of each of the model's text encoders' token vectors.

    Returns:
        The token the file names, or None; vectors `[n, sum(widths)]` in float32.

    Raises:
        UserError: the file is missing, damaged, pickled, no embedding, or of another kind of model.
    """
    path = expand_user(path)
    refuse_pickle(path, "string_to_param")
    if path.is_dir():
        if not (path / DIFFUSERS_FILE).is_file():
            if (pickle := (path / DIFFUSERS_FILE).with_suffix(".bin")).is_file():
                refuse_pickle(pickle, "string_to_param")
            raise UserError(f"{path} is a folder without {DIFFUSERS_FILE}; name the embedding file itself.")
        path = path / DIFFUSERS_FILE
    with open_tensors(path) as file:
        keys = sorted(file.keys())
        names = _ENCODERS if set(keys) == set(_ENCODERS) else tuple(keys)
        if len(names) != 1 and names != _ENCODERS:
            raise UserError(
                f"{path} is not an embedding: it should hold one tensor, or {' and '.join(_ENCODERS)}, "
                f"and holds {len(keys)}."
            )
        vectors = [np.atleast_2d(read_float32(path, file, name)) for name in names]
    found = tuple(array.shape[-1] for array in vectors)
    if found != tuple(widths):
        raise UserError(
            f"{path} was made for another kind of model: its vectors are of {_listed(found)} and this one's "
            f"of {_listed(widths)}."
        )
    if any(array.ndim != 2 or len(array) != len(vectors[0]) or not len(array) for array in vectors):
        raise UserError(f"{path} should hold [n, d] for each text encoder: {[list(a.shape) for a in vectors]}.")
    joined = np.concatenate(vectors, axis=1)
    if not np.isfinite(joined).all():
        raise UserError(f"{path} holds values that are not finite (NaN or infinity).")
    return (names[0] if len(names) == 1 and names[0] not in _NAMELESS else None), joined


def _listed(widths: tuple[int, ...]) -> str:
    return " and ".join(str(width) for width in widths)
