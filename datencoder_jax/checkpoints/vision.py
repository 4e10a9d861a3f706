"""CLIP's vision tower from a folder or file of its own, in the format of transformers or of OpenCLIP.

<folder>/config.json  model.safetensors  [preprocessor_config.json]      transformers: the tower, or the whole of CLIP
<folder>/open_clip_config.json  open_clip_model.safetensors              OpenCLIP: the whole of CLIP

The text tower, where there is one, is known and not read.
"""

from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.hub import OPEN_CLIP
from datencoder_jax.checkpoints.keys import Tensors, public
from datencoder_jax.checkpoints.openclip import vision_tower
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import describing, find_weights, opened, place, read_json
from datencoder_jax.errors import UserError
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params

_TEXT = ("text_model.", "text_projection.", "logit_")
_VISUAL = "visual."
_OPEN_TEXT = (
    "text.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "logit_",
)
_OPEN_OPTIONS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"}
"""What is implemented of OpenCLIP's vision towers; the last has a part in training alone."""


def read_vision(path: str | Path, *, dtype: str = "float32") -> tuple[Model, dict[str, Any] | None]:
    """A vision tower, its parameters stored as `dtype` on the default device, and how pictures enter it.

    Args:
        path: a folder, or its `.safetensors` file; the configuration is beside the file.

    Returns:
        The `CLIPVisionModel`, and the content of `preprocessor_config.json` or what OpenCLIP's configuration says of
        it (`image_mean`, `image_std`, of pixels in [0, 1]); None where neither does.

    Raises:
        UserError: there is no such folder or file, or it is damaged, unsupported or holds no vision tower.
    """
    path = expand_user(path)
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    files, folder = _files(path)
    origin = str(files[0])
    with opened(files, origin) as tensors:
        if any(key.startswith(_VISUAL) for key in tensors):
            config, extractor = _open_clip_config(folder / OPEN_CLIP[0])
            tensors = vision_tower(_part(tensors, _OPEN_TEXT, _VISUAL))
        else:
            config, extractor = _config(folder / "config.json")
            tensors = _part(tensors, _TEXT, "")
        abstract = abstract_params(CLIPVisionModel, config)
        params = place(public(tensors, abstract, origin), abstract, dtype=dtype, origin=origin)
    return Model(CLIPVisionModel, config, params), extractor


def _files(path: Path) -> tuple[list[Path], Path]:
    """The weights of the tower `path`, and the folder they are in."""
    if path.is_file():
        return [path], path.parent
    only_open = (path / OPEN_CLIP[1]).is_file() and not (path / "config.json").is_file()
    return ([path / OPEN_CLIP[1]] if only_open else find_weights(path)), path


def _part(tensors: Tensors, skipped: tuple[str, ...], prefix: str) -> Tensors:
    """The tensors that do not begin with any of `skipped`, without `prefix`."""
    kept = {key: read for key, read in tensors.readers.items() if not key.startswith(skipped)}
    return Tensors({key.removeprefix(prefix): read for key, read in kept.items()})


def _config(file: Path) -> tuple[CLIPVisionConfig, dict[str, Any] | None]:
    values = read_json(file)
    with describing(file, "a CLIP vision tower"):
        kind = values.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise UserError(f"model_type {kind!r} is not supported; supported: clip, clip_vision_model")
        if kind == "clip":
            values = values["vision_config"] | {"projection_dim": values["projection_dim"], "with_projection": True}
        config = CLIPVisionConfig.from_dict(values)
        abstract_params(CLIPVisionModel, config)  # what does not fit together shows when the module is made
    extractor = file.with_name("preprocessor_config.json")
    return config, read_json(extractor) if extractor.is_file() else None


def _open_clip_config(file: Path) -> tuple[CLIPVisionConfig, dict[str, Any] | None]:
    values = read_json(file)
    with describing(file, "an OpenCLIP model"):
        model = values["model_cfg"]
        options = model["vision_cfg"]
        if odd := sorted(set(options) - _OPEN_OPTIONS):
            raise UserError(f"vision_cfg: option {odd[0]}={options[odd[0]]!r} is not supported")
        width = options["width"]
        config = CLIPVisionConfig.from_dict(
            {
                "hidden_size": width,
                "intermediate_size": int(width * options.get("mlp_ratio", 4.0)),
                "projection_dim": model["embed_dim"],
                "num_hidden_layers": options["layers"],
                "num_attention_heads": width // options.get("head_width", 64),
                "image_size": options["image_size"],
                "patch_size": options["patch_size"],
                "hidden_act": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
                "with_projection": True,
            }
        )
        abstract_params(CLIPVisionModel, config)
        pixels = values.get("preprocess_cfg") or {}
        found = {f"image_{name}": list(pixels[name]) for name in ("mean", "std") if name in pixels}
    return config, found or None
