"""Base models as Hugging Face diffusers folders, read and written.

<folder>/model_index.json
         unet/ vae/ text_encoder/ [image_encoder/]      config.json and safetensors
         scheduler/scheduler_config.json   tokenizer/   [feature_extractor/preprocessor_config.json]
         [datencoder.json]      what is best done with this model; others ignore it
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.components import COMPONENTS, DIFFUSERS_VERSION, config_json, of_kind
from datencoder_jax.checkpoints.hub import DEFAULTS
from datencoder_jax.checkpoints.identity import base_fingerprint
from datencoder_jax.checkpoints.layouts import to_torch_layout
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import describing, read_json, read_params
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.typing import Params

_INDEX = "model_index.json"
_TRANSFORMERS = {
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "feature_extractor": "CLIPImageProcessor",
}


class BaseParts(NamedTuple):
    """The parts of a base model.

    Attributes:
        unet, vae, text_encoder: models with their parameters on the default device.
        image_encoder: a vision tower that shares the text tower's space, where the folder has one.
        scheduler: the content of `scheduler_config.json`.
        tokenizer: the folder of the tokenizer's files.
        feature_extractor: the content of `preprocessor_config.json`, how pictures enter `image_encoder`.
        defaults: the content of `datencoder.json`: `guidance` (a scale) and `prompts` with the placeholder `S*`.
        fingerprint: what `base_fingerprint` says of it; "" when the parts were not read from a folder.
    """

    unet: Model
    vae: Model
    text_encoder: Model
    scheduler: dict[str, Any]
    tokenizer: Path
    image_encoder: Model | None = None
    feature_extractor: dict[str, Any] | None = None
    defaults: dict[str, Any] | None = None
    fingerprint: str = ""


def read_component(folder: str | Path, name: str, kind: type, config_class: type, *, dtype: str = "float32") -> Model:
    """The model in `<folder>/<name>/`, its parameters stored as `dtype` and placed on the default device.

    Raises:
        UserError: the folder, its configuration or its weights are missing, damaged, unsupported or do not match.
    """
    config, params = _read_host(Path(folder) / name, kind, config_class, dtype)
    return Model(kind, config, _place(params, dtype))


def write_component(folder: str | Path, model: Model, *, dtype: str = "float16") -> None:
    """Writes `config.json` and the weights of `model` into `folder`, whole or not at all.

    Args:
        folder: made anew; one that already holds a `config.json` is replaced.
        dtype: the stored type, "float32", "float16" or "bfloat16".

    Raises:
        UserError: the folder cannot be written, or a value does not fit into `dtype`.
    """
    with atomic_write(folder, replaces="config.json") as temporary:
        temporary.mkdir()
        _write_files(temporary, model, dtype)


def read_base(folder: str | Path, *, dtype: str = "float32") -> BaseParts:
    """A base model from a diffusers folder; parameters are stored as `dtype`.

    Raises:
        UserError: the folder is no such folder, lacks a part, or a part is damaged or unsupported.
    """
    folder = expand_user(folder)
    _check_folder(folder)
    index = read_json(folder / _INDEX)
    second = [name for name in ("text_encoder_2", "transformer", "prior") if _present(index.get(name))]
    if second:
        raise UserError(f"{folder} is not a Stable Diffusion 1.x or 2.x model: it has a {second[0]}.")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}; fetch the model again.")
    tokenizer = folder / "tokenizer"
    if not ((tokenizer / "vocab.json").is_file() or (tokenizer / "tokenizer.json").is_file()):
        raise UserError(f"{tokenizer} holds neither vocab.json nor tokenizer.json; fetch the model again.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    extractor = folder / "feature_extractor" / "preprocessor_config.json"
    has_eyes = _present(index.get("image_encoder")) or (folder / "image_encoder" / "config.json").is_file()

    # bfloat16 comes last: the fingerprint is of the values as they are in the file.
    wide = "float32" if dtype == "bfloat16" else dtype
    host = {
        name: _read_host(folder / name, component.kind, component.config_class, wide)
        for name, component in COMPONENTS.items()
        if name != "image_encoder" or has_eyes
    }
    models = {
        name: Model(COMPONENTS[name].kind, config, _place(params, dtype)) for name, (config, params) in host.items()
    }
    width = models["text_encoder"].config.hidden_size
    if models["unet"].config.cross_attention_dim != width:
        raise UserError(
            f"{folder}: the UNet attends to vectors of {models['unet'].config.cross_attention_dim} and the text "
            f"encoder makes vectors of {width}; these parts are not of one model."
        )
    unet, latents = models["unet"].config, models["vae"].config.latent_channels
    if not unet.in_channels == unet.out_channels == latents:
        raise UserError(
            f"{folder}: the UNet takes {unet.in_channels} channels, makes {unet.out_channels}, and the VAE's latents "
            f"have {latents}: a model for inpainting or editing will not do; use one that draws from text alone."
        )
    return BaseParts(
        **models,
        scheduler=scheduler,
        tokenizer=tokenizer,
        feature_extractor=read_json(extractor) if extractor.is_file() else None,
        defaults=read_json(folder / DEFAULTS) if (folder / DEFAULTS).is_file() else None,
        fingerprint=base_fingerprint(host["unet"][1], host["text_encoder"][1]),
    )


def write_base(folder: str | Path, parts: BaseParts, *, dtype: str = "float16") -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` reads, whole or not at all.

    Args:
        folder: made anew; one that already holds a `model_index.json` is replaced.
        parts: `scheduler["_class_name"]` names the scheduler others will use, `DDIMScheduler` if there is none; the
            tokenizer's files are copied; `fingerprint` is not used.
        dtype: the stored type of all weights.

    Raises:
        UserError: the folder cannot be written, the tokenizer's files are missing, or a value does not fit `dtype`.
    """
    scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": DIFFUSERS_VERSION} | parts.scheduler
    scheduler.setdefault("clip_sample", False)  # diffusers' default clips latents as if they were pictures
    if not parts.tokenizer.is_dir():
        raise UserError(f"There is no folder {parts.tokenizer} with the tokenizer's files.")
    models = {name: getattr(parts, name) for name in COMPONENTS if getattr(parts, name) is not None}
    extras = {"scheduler": True, "tokenizer": True, "feature_extractor": parts.feature_extractor is not None}
    with atomic_write(folder, replaces=_INDEX) as temporary:
        temporary.mkdir()
        for name, model in models.items():
            (temporary / name).mkdir()
            _write_files(temporary / name, model, dtype)
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        shutil.copytree(parts.tokenizer, temporary / "tokenizer")
        if parts.feature_extractor is not None:
            _write_json(temporary / "feature_extractor" / "preprocessor_config.json", parts.feature_extractor)
        if parts.defaults is not None:
            _write_json(temporary / DEFAULTS, parts.defaults)
        present = set(models) | {name for name, there in extras.items() if there}
        _write_json(temporary / _INDEX, _index(present, scheduler["_class_name"], models))


def _index(present: set[str], scheduler: str, models: Mapping[str, Model]) -> dict[str, Any]:
    entries = {name: ["transformers", class_name] for name, class_name in _TRANSFORMERS.items()}
    entries["scheduler"] = ["diffusers", scheduler]
    entries |= {name: ["diffusers", models[name].kind.__name__] for name in ("unet", "vae")}
    entries = {name: entry if name in present else [None, None] for name, entry in entries.items()}
    head = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    return head | {"requires_safety_checker": False, "safety_checker": [None, None]} | dict(sorted(entries.items()))


def _place(params: dict[str, np.ndarray], dtype: str) -> Params:
    target = jnp.dtype(dtype)
    return jax.device_put({name: value.astype(target, copy=False) for name, value in params.items()})


def _present(entry: Any) -> bool:
    return isinstance(entry, list) and any(part is not None for part in entry)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a base model is a folder in diffusers format.")
    if not (folder / _INDEX).is_file():
        raise UserError(f"{folder} is not a diffusers folder: it has no {_INDEX}.")


def _read_host(path: Path, kind: type, config_class: type, dtype: str) -> tuple[Any, dict[str, np.ndarray]]:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.")
    file = path / "config.json"
    values = read_json(file)
    with describing(file, f"a {kind.__name__}"):
        config = config_class.from_dict(values)
        abstract = abstract_params(kind, config)
    return config, read_params(path, abstract, dtype=dtype)


def _write_files(folder: Path, model: Model, dtype: str) -> None:
    arrays = to_torch_layout(
        model.params, abstract_params(model.kind, model.config), dtype=dtype, origin=model.kind.__name__
    )
    # Readers other than this one refuse weights that do not say they are in PyTorch's layouts.
    save_tensors(folder / f"{of_kind(model.kind).weights}.safetensors", arrays, {"format": "pt"})
    _write_json(folder / "config.json", config_json(model.kind, model.config))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
