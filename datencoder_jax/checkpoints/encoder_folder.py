"""A tuning-encoder on disk: `config.json` (its sizes, and the base model it belongs to) and `model.safetensors`."""

import json
from pathlib import Path

import jax

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.layouts import to_torch_layout
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import describing, read_json, read_params
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params

_CLASS = "TuningEncoder"


def write_encoder(folder: str | Path, encoder: Model, fingerprint: str, *, dtype: str = "float16") -> None:
    """Writes a tuning-encoder, whole or not at all.

    Args:
        folder: made anew; one that already holds a `config.json` is replaced.
        fingerprint: of the base model it was trained on.
        dtype: the stored type.

    Raises:
        UserError: the folder cannot be written, or a value does not fit into `dtype`.
    """
    arrays = to_torch_layout(encoder.params, abstract_params(TuningEncoder, encoder.config), dtype=dtype)
    config = {"_class_name": _CLASS, "base_fingerprint": fingerprint, **encoder.config.to_dict()}
    with atomic_write(folder, replaces="config.json") as temporary:
        temporary.mkdir()
        save_tensors(temporary / "model.safetensors", arrays, {"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_encoder(folder: str | Path, fingerprint: str) -> Model:
    """The tuning-encoder in `folder`, float32.

    Args:
        fingerprint: of the base model it is to be used with.

    Raises:
        UserError: the folder is missing or damaged, holds something else, or an encoder of another base model.
    """
    folder = expand_user(folder)
    if not folder.is_dir():
        raise UserError(f"There is no encoder folder {folder}.")
    values = read_json(folder / "config.json")
    if values.get("_class_name") != _CLASS:
        raise UserError(f"{folder} does not hold a tuning-encoder (its config.json does not name the class {_CLASS}).")
    if values.get("base_fingerprint") != fingerprint:
        raise UserError(
            f"The tuning-encoder in {folder} was trained on another base model; name one made for this model."
        )
    with describing(folder / "config.json", "a tuning-encoder"):
        config = EncoderConfig.from_dict(values)
        abstract = abstract_params(TuningEncoder, config)
    params = read_params(folder, abstract)
    return Model(TuningEncoder, config, jax.device_put(params))
