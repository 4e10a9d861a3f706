"""Bad encoders and vision towers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from corpus import files, models
from corpus.case import Kind
from corpus.files import content, nothing, tensors
from datencoder_jax.loading import with_encoder
from datencoder_jax.pipeline import with_vision

KIND = Kind(
    "Encoders and vision towers",
    "The folder of `--encoder`, and the folder or file of `--vision`, read for the embedded model.",
    lambda path: use_encoder(path),
)


def use_encoder(path: Path) -> None:
    """Reads an encoder for the embedded model."""
    with_encoder(models.toyworld(), path)


def use_vision(path: Path) -> None:
    """Reads a vision tower for the embedded model."""
    with_vision(models.toyworld(), path)


_CONFIG = {"_class_name": "TuningEncoder", "base_fingerprint": "?"}


def encoder(text: str | bytes) -> files.Maker:
    """A folder with the configuration of an encoder."""
    return lambda where: content("encoder/config.json", text)(where).parent


def described(**values: Any) -> files.Maker:
    """A folder with the configuration of an encoder of the embedded model."""
    return lambda where: encoder(json.dumps(_CONFIG | {"base_fingerprint": models.toyworld().fingerprint} | values))(
        where
    )


for _name, _make in {
    "that is not there": nothing(Path("encoder")),
    "that is a file": content("encoder", b"x"),
    "that is an empty folder": files.folder("encoder"),
    "whose path has 5,000 letters": nothing(Path("n/" * 2500)),
    "whose name has 300 letters": nothing(Path("n" * 300)),
    "with an empty configuration": encoder(""),
    "with a configuration that is a list": encoder("[]"),
    "with a configuration of another class": encoder('{"_class_name": ["x"]}'),
    "of another base model": encoder(json.dumps(_CONFIG)),
    "with a configuration of nothing else": described(),
    "with widths that are texts": described(width="wide", depth=1, heads=1),
    "that is a base model": lambda _: Path(shutil.copytree(models.tiny_folder(), "base")),
}.items():
    KIND.refused(f"an encoder {_name}", _make, use_encoder)
for _name, _make in {
    "that is not there": nothing(Path("tower")),
    "that is an empty folder": files.folder("tower"),
    "whose name has 300 letters": nothing(Path("n" * 300)),
    "that is a pickle": content("tower.bin", b"PK\x03\x04"),
    "that is a text": content("tower.txt", b"text"),
    "with an empty configuration": lambda w: (
        tensors("tower/model.safetensors", {"a": np.ones(2, "f4")})(w),
        content("tower/config.json", "")(w).parent,
    )[1:],
    "of another kind": lambda w: (
        tensors("tower/model.safetensors", {"a": np.ones(2, "f4")})(w),
        content("tower/config.json", '{"model_type": "siglip"}')(w).parent,
    )[1:],
    "of CLIP without a vision part": lambda w: (
        tensors("tower/model.safetensors", {"a": np.ones(2, "f4")})(w),
        content("tower/config.json", '{"model_type": "clip"}')(w).parent,
    )[1:],
    "of OpenCLIP without settings": lambda w: (
        tensors("tower/open_clip_model.safetensors", {"visual.a": np.ones(2, "f4")})(w).parent
    ),
    "of OpenCLIP with settings that are a list": lambda w: (
        content("tower/open_clip_config.json", "[]")(w),
        tensors("tower/open_clip_model.safetensors", {"visual.a": np.ones(2, "f4")})(w).parent,
    )[1:],
    "of OpenCLIP with settings of nothing": lambda w: (
        content("tower/open_clip_config.json", "{}")(w),
        tensors("tower/open_clip_model.safetensors", {"visual.a": np.ones(2, "f4")})(w).parent,
    )[1:],
}.items():
    KIND.refused(f"a vision tower {_name}", _make, use_vision)
