"""An encoder on disk: `config.json` (its kind, its sizes, and the models it belongs to) and `model.safetensors`.

There are two kinds: tuning-encoders, and the encoders of one domain that E4T has (`encoder.domain_encoder`).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from datencoder_jax.checkpoints.atomic import atomic_write, check_destination, save_tensors
from datencoder_jax.checkpoints.layouts import to_torch_layout
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import describing, read_json, read_params
from datencoder_jax.encoder.domain_encoder import DomainConfig, DomainEncoder
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class _Kind(NamedTuple):
    module: type[TuningEncoder]
    config: type[EncoderConfig]
    name: str


_KINDS = {
    "TuningEncoder": _Kind(TuningEncoder, EncoderConfig, "a tuning-encoder"),
    "DomainEncoder": _Kind(DomainEncoder, DomainConfig, "an E4T encoder"),
}
"""By the class that a `config.json` names."""


def describe_encoder(config: EncoderConfig, fingerprint: str, vision: str) -> dict[str, Any]:
    """What says of an encoder all but its weights, as plain JSON values; arguments are those of `write_encoder`."""
    name = next(name for name, kind in _KINDS.items() if kind.config is type(config))
    return {"_class_name": name, "base_fingerprint": fingerprint, "vision_fingerprint": vision, **config.to_dict()}


def described_encoder(path: Path, values: dict[str, Any]) -> tuple[type[TuningEncoder], EncoderConfig]:
    """Class and configuration of the encoder that `values`, the content of `path`, describe.

    Raises:
        UserError: they describe none.
    """
    kind = _KINDS.get(values.get("_class_name", "TuningEncoder"))
    if kind is None:
        raise UserError(f"{path} does not describe an encoder: its class is {values['_class_name']!r}.")
    with describing(path, kind.name):
        return kind.module, kind.config.from_dict(values)


def write_encoder(folder: str | Path, encoder: Model, fingerprint: str, vision: str, *, dtype: str = "float16") -> None:
    """Writes an encoder of either kind, whole or not at all.

    Args:
        folder: made anew; one that holds an encoder, and nothing else, is replaced.
        fingerprint: of the base model it was trained on.
        vision: fingerprint of the vision tower it was trained with; "" if that is not known.
        dtype: the stored type.

    Raises:
        UserError: the folder cannot be written, or a value does not fit into `dtype`.
    """
    check_encoder_place(folder)
    arrays = to_torch_layout(encoder.params, abstract_params(encoder.kind, encoder.config), dtype=dtype)
    config = describe_encoder(encoder.config, fingerprint, vision)
    with atomic_write(folder, replaces=_CONFIG) as temporary:
        temporary.mkdir()
        save_tensors(temporary / _WEIGHTS, arrays, {"format": "pt"})
        (temporary / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def check_encoder_place(folder: str | Path) -> None:
    """Raises `UserError` where `write_encoder` would replace a folder that holds something else than an encoder."""
    folder = expand_user(folder, to_write=True)
    check_destination(folder, _CONFIG)
    if not (folder / _CONFIG).is_file():
        return
    try:
        is_encoder = read_json(folder / _CONFIG).get("_class_name") in _KINDS
    except UserError:  # it cannot be read
        is_encoder = False
    others = sorted({path.name for path in folder.iterdir()} - {_CONFIG, _WEIGHTS, ".DS_Store"})
    if not is_encoder or others:
        what = f"it also holds {others[0]}" if is_encoder else "it holds another model than an encoder"
        raise UserError(f"Cannot write {folder}: {what}, which would be lost; choose another name.")


def read_encoder(folder: str | Path, fingerprint: str, vision: str) -> Model:
    """The encoder in `folder`, float32; its `kind` says which it is, `TuningEncoder` or `DomainEncoder`.

    Args:
        fingerprint: of the base model it is to be used with.
        vision: fingerprint of the vision tower it is to look through.

    Raises:
        UserError: the folder is missing or damaged, holds something else, or an encoder of another base model or of
            another vision tower.
    """
    folder = expand_user(folder)
    if not folder.is_dir():
        raise UserError(f"There is no encoder folder {folder}.")
    path = folder / _CONFIG
    values = read_json(path)
    kind = _KINDS.get(str(values.get("_class_name")))
    if kind is None:
        raise UserError(
            f"{folder} does not hold a tuning-encoder (its config.json names none of the classes {', '.join(_KINDS)})."
        )
    if values.get("base_fingerprint") != fingerprint:
        raise UserError(
            f"The {kind.name.partition(' ')[2]} in {folder} was trained on another base model; name one made for this "
            "model."
        )
    if values.get("vision_fingerprint", "") not in ("", vision):  # older encoders do not name their tower
        raise UserError(
            f"The {kind.name.partition(' ')[2]} in {folder} was trained with another vision tower; name its own with "
            "--vision (in a recipe: vision), or none where the model has it."
        )
    module, config = described_encoder(path, values)
    with describing(path, kind.name):
        abstract = abstract_params(module, config)
    params = read_params(folder, abstract)
    return Model(module, config, jax.device_put(params))
