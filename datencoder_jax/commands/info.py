"""`datencoder info`: versions, devices and cache folders, or what a concept file holds."""

import os
import platform
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from datencoder_jax.checkpoints.hub import TOYWORLD, resolve_base
from datencoder_jax.commands.shared import PACKAGES, count_things, device_name, read_concept, say
from datencoder_jax.errors import UserError
from datencoder_jax.typing import Dense, LowRank


def run(args: Namespace) -> None:
    """Prints it."""
    if args.words:
        if args.file is not None:
            raise UserError(f"--words lists the words of the embedded model; leave {args.file} out.")
        for word in _words():
            say(word)
        return
    rows = _machine() if args.file is None else _describe(args.file)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}")


def _words() -> list[str]:
    """The words that the embedded model was trained with."""
    from datencoder_jax import api

    pipeline = api.load(TOYWORLD)
    assert pipeline.known_tokens is not None
    return pipeline.tokenizer.words_of(pipeline.known_tokens)


def _machine() -> list[tuple[str, str]]:
    import huggingface_hub.constants

    from datencoder_jax.compilation import cache_folder

    cache = cache_folder()
    rows = [("datencoder", metadata.version("datencoder_jax")), ("python", platform.python_version())]
    rows += [(name, metadata.version(name)) for name in PACKAGES]
    rows += [("device", device_name())]
    embedded = resolve_base(TOYWORLD)
    rows += [("embedded model", str(embedded) if embedded.is_dir() else "not installed")]
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or (str(cache / "compiled") if cache else "not kept")
    rows += [("compiled programs", compiled)]
    return [*rows, ("downloaded models", huggingface_hub.constants.HF_HUB_CACHE)]


_KINDS = {
    "LowRank": "low rank",
    "Dense": "whole",
    "Removed": "directions removed",
    "Gated": "gated",
    "Residual": "residuals of values",
}
"""What people call each kind of edit."""


def _describe(file: str) -> list[tuple[str, str]]:
    concept = read_concept(file)
    vectors = np.asarray(concept.embeddings)
    kinds = {path: type(edit).__name__ for path, edit in concept.offsets.items()}
    norms = {path: _norm(edit) for path, edit in concept.offsets.items() if isinstance(edit, LowRank | Dense)}
    ranks = sorted({int(edit.down.shape[1]) for edit in concept.offsets.values() if isinstance(edit, LowRank)})
    parts = (concept.embeddings, concept.offsets, concept.gate, concept.reader)
    numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(parts))
    rows = [
        ("token", concept.token),
        ("nearest word", concept.nearest_word),
        ("base model", f"{concept.base} (fingerprint {concept.fingerprint[:8]})"),
        ("blend", f"{concept.blend:g}"),
        (
            "token vectors",
            f"{vectors.shape[0]} of {vectors.shape[1]}, norm "
            + ", ".join(f"{norm:.3g}" for norm in np.linalg.norm(vectors, axis=1)),
        ),
        (
            "weight offsets",
            count_things(len(kinds), "projection") + "".join(f", {_KINDS[k]}" for k in sorted(set(kinds.values()))),
        ),
    ]
    if ranks:
        rows[-1] = ("weight offsets", f"{count_things(len(norms), 'projection')} of rank {', '.join(map(str, ranks))}")
    if norms:
        largest = max(norms, key=lambda path: norms[path])
        rows += [
            (
                "offset norms",
                f"{np.mean(list(norms.values())):.3g} on average, at most {norms[largest]:.3g} ({largest})",
            )
        ]
    rows += [("size", f"{numbers:,} numbers, {Path(file).expanduser().stat().st_size / 1e6:.2f} MB")]
    return rows + sorted(concept.metadata.items())


def _norm(edit: LowRank | Dense) -> float:
    """The Frobenius norm of an offset; of `down @ up` without the product."""
    if isinstance(edit, Dense):
        return float(np.linalg.norm(edit.weight))
    down, up = np.asarray(edit.down), np.asarray(edit.up)
    return float(np.sqrt(max(0.0, np.vdot(down.T @ down, up @ up.T))))
