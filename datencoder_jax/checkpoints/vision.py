"""CLIP's towers from a folder or file of their own, in the format of transformers or of OpenCLIP.

<folder>/config.json  model.safetensors  [preprocessor_config.json]      transformers: the tower, or the whole of CLIP
<folder>/open_clip_config.json  open_clip_model.safetensors              OpenCLIP: the whole of CLIP

`read_vision` reads the vision tower, and `read_clip` the text tower with it, where there is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datencoder_jax.checkpoints.hub import OPEN_CLIP
from datencoder_jax.checkpoints.identity import Traits
from datencoder_jax.checkpoints.keys import Tensors, public
from datencoder_jax.checkpoints.openclip import text_tower, vision_tower
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import conversion_hint
from datencoder_jax.checkpoints.single_file_configs import text_config
from datencoder_jax.checkpoints.weights import describing, find_weights, opened, place, read_json
from datencoder_jax.errors import UserError
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params

_TEXT = ("text_model.", "text_projection.", "logit_")
_NOT_TEXT = ("vision_model.", "visual_projection.", "logit_")
_VISUAL = "visual."
_OPEN_TEXT = (
    "text.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
    "logit_",
)
_OPEN_OPTIONS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"}
"""What is implemented of OpenCLIP's vision towers; the last has a part in training alone."""
_OPEN_TEXT_OPTIONS = {"context_length", "vocab_size", "width", "heads", "layers"}
_ASSETS = Path(__file__).parent.parent / "assets"
_TOKENIZER = ("vocab.json", "tokenizer.json")
_VOCABULARY = 49408
"""Tokens of the one vocabulary that OpenAI's and OpenCLIP's models share; the package has it."""


class CLIPParts(NamedTuple):
    """The towers of a CLIP model.

    Attributes:
        vision: the `CLIPVisionModel`.
        text: the `CLIPTextModel`; None where the folder holds the vision tower alone.
        extractor: how pictures enter, as `read_vision` gives it.
        tokenizer: the folder of the text tower's tokenizer: the model's own or, where it has none, CLIP's; None without
            the text tower.
    """

    vision: Model
    text: Model | None
    extractor: dict[str, Any] | None
    tokenizer: Path | None


def read_vision(
    path: str | Path, *, dtype: str = "float32", traits: Traits | None = None
) -> tuple[Model, dict[str, Any] | None]:
    """A vision tower, its parameters stored as `dtype` on the default device, and how pictures enter it.

    Args:
        path: a folder, or its `.safetensors` file; the configuration is beside the file.
        traits: takes the traits of every parameter, by which the tower is recognized.

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
        params = place(public(tensors, abstract, origin), abstract, dtype=dtype, origin=origin, traits=traits)
    return Model(CLIPVisionModel, config, params), extractor


def read_clip(path: str | Path, *, dtype: str = "float32") -> CLIPParts:
    """Both towers of a CLIP model, or the one there is, their parameters stored as `dtype` on the default device.

    Args:
        path: as for `read_vision`; a tokenizer is looked for in the same folder.

    Raises:
        UserError: as `read_vision`; also when the text tower is unsupported, or has a vocabulary of its own and no
            tokenizer.
    """
    vision, extractor = read_vision(path, dtype=dtype)
    files, folder = _files(expand_user(path))
    origin = str(files[0])
    with opened(files, origin) as tensors:
        is_open = any(key.startswith(_VISUAL) for key in tensors)
        if is_open:
            tensors = text_tower(_part(tensors, (_VISUAL, "logit_"), "text."))
            config = _open_text_config(folder / OPEN_CLIP[0], tensors, vision.config.hidden_act)
        else:
            config = _text_config(folder / "config.json")
            tensors = _part(tensors, _NOT_TEXT, "")
        if config is None:
            return CLIPParts(vision, None, extractor, None)
        tokenizer = _tokenizer(folder, config, "open_clip_tokenizer" if is_open else "clip_tokenizer")
        abstract = abstract_params(CLIPTextModel, config)
        params = place(public(tensors, abstract, origin), abstract, dtype=dtype, origin=origin)
    return CLIPParts(vision, Model(CLIPTextModel, config, params), extractor, tokenizer)


def pixel_statistics(
    extractor: Mapping[str, Any] | None, origin: str | Path, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels that a vision tower is given, three numbers each, of pixels in [0, 1].

    Args:
        extractor: the content of a `preprocessor_config.json`, if there is one.
        origin: what an error names.
        mean, std: what they are where `extractor` does not say.

    Raises:
        UserError: they are no numbers of three colours.
    """
    found = []
    with describing(Path(origin), "how pictures enter a vision tower"):
        for name, default in (("image_mean", mean), ("image_std", std)):
            array = np.asarray((extractor or {}).get(name, default), np.float64)
            if array.shape not in ((3,), (1,), ()) or not np.isfinite(array).all():
                raise ValueError(f"{name} is {array.tolist()}")
            if name == "image_std" and (array <= 0).any():
                raise ValueError(f"{name} is {array.tolist()}")
            found.append(np.broadcast_to(array, 3).tolist())
    return found[0], found[1]


def _tokenizer(folder: Path, config: CLIPTextConfig, shipped: str) -> Path:
    if any((folder / name).is_file() for name in _TOKENIZER):
        return folder
    if config.vocab_size != _VOCABULARY:
        raise UserError(
            f"{folder} has a text tower of {config.vocab_size} tokens and no tokenizer; put its vocab.json and "
            "merges.txt there."
        )
    return _ASSETS / shipped


def _files(path: Path) -> tuple[list[Path], Path]:
    """The weights of the tower `path`, and the folder they are in."""
    if path.is_file():
        return [path], path.parent
    only_open = (path / OPEN_CLIP[1]).is_file() and not (path / "config.json").is_file()
    if only_open:
        return [path / OPEN_CLIP[1]], path
    return find_weights(path, hint=conversion_hint(str(path), "transformers.AutoModel")), path


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


def _text_config(file: Path) -> CLIPTextConfig | None:
    values = read_json(file)
    if values.get("model_type") != "clip":
        return None
    with describing(file, "a CLIP text tower"):
        shared = {"projection_dim": values["projection_dim"], "with_projection": True}
        config = CLIPTextConfig.from_dict(values["text_config"] | shared)
        abstract_params(CLIPTextModel, config)
    return config


def _open_text_config(file: Path, tensors: Tensors, hidden_act: str) -> CLIPTextConfig:
    values = read_json(file)
    with describing(file, "an OpenCLIP model"):
        options = values["model_cfg"]["text_cfg"]
        if odd := sorted(set(options) - _OPEN_TEXT_OPTIONS):
            raise UserError(f"text_cfg: option {odd[0]}={options[odd[0]]!r} is not supported")
        config = text_config(tensors, hidden_act)
        config = replace(config, num_attention_heads=options.get("heads", config.num_attention_heads))
        abstract_params(CLIPTextModel, config)
    return config


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
