"""Base models as Hugging Face diffusers folders, read and written.

<folder>/model_index.json
         unet/ vae/ text_encoder/ [text_encoder_2/] [image_encoder/]      config.json and safetensors
         scheduler/scheduler_config.json   tokenizer/   [tokenizer_2/]   [feature_extractor/preprocessor_config.json]
         [datencoder.json]      what is best done with this model; others ignore it
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.components import COMPONENTS, DIFFUSERS_VERSION, config_json, of_kind
from datencoder_jax.checkpoints.hub import DEFAULTS
from datencoder_jax.checkpoints.layouts import to_torch_layout
from datencoder_jax.checkpoints.parts import BaseParts, read_models
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import check_index, is_present
from datencoder_jax.checkpoints.single_file import read_single_file
from datencoder_jax.checkpoints.weights import describing, read_json, read_params
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params

_INDEX = "model_index.json"
_ZEROS = "force_zeros_for_empty_prompt"
_REQUIRED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_TRANSFORMERS = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "feature_extractor": "CLIPImageProcessor",
}


def read_component(folder: str | Path, name: str, kind: type, config_class: type, *, dtype: str = "float32") -> Model:
    """The model in `<folder>/<name>/`, its parameters stored as `dtype` and placed on the default device.

    Raises:
        UserError: the folder, its configuration or its weights are missing, damaged, unsupported or do not match.
    """
    path = Path(folder) / name
    config = _read_config(path, kind, config_class)
    return Model(kind, config, read_params(path, abstract_params(kind, config), dtype=dtype))


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


def read_base(path: str | Path, *, dtype: str = "float32", prediction_type: str | None = None) -> BaseParts:
    """A base model from a diffusers folder or a checkpoint of one file; parameters are stored as `dtype`.

    Args:
        prediction_type: "epsilon" or "v_prediction" in place of what the model says of itself; see `read_single_file`
            for why the file of a Stable Diffusion 2.x model may need it.

    Raises:
        UserError: there is no such folder or file, it lacks a part, or a part is damaged or unsupported.
    """
    path = expand_user(path)
    if path.suffix.lower() == ".safetensors" and path.exists() and not path.is_dir():
        return read_single_file(path, dtype=dtype, prediction_type=prediction_type)
    parts = _read_folder(path, dtype)
    if prediction_type is None:
        return parts
    return parts._replace(scheduler=parts.scheduler | {"prediction_type": prediction_type})


def _read_folder(folder: Path, dtype: str) -> BaseParts:
    _check_folder(folder)
    index = read_json(folder / _INDEX)
    check_index(index, str(folder))
    has_two = is_present(index, "text_encoder_2")
    for part in _REQUIRED + (("text_encoder_2", "tokenizer_2") if has_two else ()):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}; fetch the model again.")
    tokenizers = [folder / name for name in ("tokenizer", "tokenizer_2") if name == "tokenizer" or has_two]
    for tokenizer in tokenizers:
        if not ((tokenizer / "vocab.json").is_file() or (tokenizer / "tokenizer.json").is_file()):
            raise UserError(f"{tokenizer} holds neither vocab.json nor tokenizer.json; fetch the model again.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    extractor = folder / "feature_extractor" / "preprocessor_config.json"
    has_eyes = is_present(index, "image_encoder") or (folder / "image_encoder" / "config.json").is_file()
    absent = {name for name, there in (("text_encoder_2", has_two), ("image_encoder", has_eyes)) if not there}
    configs = {
        name: _read_config(folder / name, component.kind, component.config_class)
        for name, component in COMPONENTS.items()
        if name not in absent
    }
    models = read_models(
        configs,
        lambda name, abstract, traits: read_params(folder / name, abstract, dtype=dtype, traits=traits),
        str(folder),
    )
    return BaseParts(
        **models,
        scheduler=scheduler,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if has_two else None,
        force_zeros_for_empty_prompt=has_two and bool(index.get(_ZEROS, True)),
        feature_extractor=read_json(extractor) if extractor.is_file() else None,
        defaults=read_json(folder / DEFAULTS) if (folder / DEFAULTS).is_file() else None,
    )


def write_base(folder: str | Path, parts: BaseParts, *, dtype: str = "float16") -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` reads (for XL, `StableDiffusionXLPipeline`'s).

    It appears whole or not at all.

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
    tokenizers = {"tokenizer": parts.tokenizer, "tokenizer_2": parts.tokenizer_2}
    tokenizers = {name: path for name, path in tokenizers.items() if path is not None}
    for path in tokenizers.values():
        if not path.is_dir():
            raise UserError(f"There is no folder {path} with the tokenizer's files.")
    models = {name: getattr(parts, name) for name in COMPONENTS if getattr(parts, name) is not None}
    with atomic_write(folder, replaces=_INDEX) as temporary:
        temporary.mkdir()
        for name, model in models.items():
            (temporary / name).mkdir()
            _write_files(temporary / name, model, dtype)
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        for name, path in tokenizers.items():
            shutil.copytree(path, temporary / name)
        if parts.feature_extractor is not None:
            _write_json(temporary / "feature_extractor" / "preprocessor_config.json", parts.feature_extractor)
        if parts.defaults is not None:
            _write_json(temporary / DEFAULTS, parts.defaults)
        _write_json(temporary / _INDEX, _index(parts, models, scheduler["_class_name"]))


def _index(parts: BaseParts, models: Mapping[str, Model], scheduler: str) -> dict[str, Any]:
    """The content of `model_index.json`: which class of which library reads each part."""
    entries = {name: ["transformers", class_name] for name, class_name in _TRANSFORMERS.items()}
    entries["scheduler"] = ["diffusers", scheduler]
    entries |= {name: ["diffusers", models[name].kind.__name__] for name in ("unet", "vae")}
    entries = {name: [None, None] if getattr(parts, name) is None else entry for name, entry in entries.items()}
    if parts.text_encoder_2 is None:
        entries = {name: entry for name, entry in entries.items() if not name.endswith("_2")}
        name, options = "StableDiffusionPipeline", {"requires_safety_checker": False, "safety_checker": [None, None]}
    else:
        name, options = "StableDiffusionXLPipeline", {_ZEROS: parts.force_zeros_for_empty_prompt}
    head = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    return head | options | dict(sorted(entries.items()))


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a base model is a diffusers folder or one .safetensors file.")
    if not (folder / _INDEX).is_file():
        raise UserError(f"{folder} is not a diffusers folder: it has no {_INDEX}.")


def _read_config(path: Path, kind: type, config_class: type) -> Any:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.")
    file = path / "config.json"
    values = read_json(file)
    with describing(file, f"a {kind.__name__}"):
        config = config_class.from_dict(values)
        abstract_params(kind, config)  # what does not fit together shows when the module is made
    return config


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
