"""Base models as one `.safetensors` file, under the names of the program that Stable Diffusion was trained with.

    model.diffusion_model.*             the UNet
    first_stage_model.*                 the VAE
    cond_stage_model.transformer.*      Stable Diffusion 1.x: CLIP's text tower
    cond_stage_model.model.*            2.x: OpenCLIP's
    conditioner.embedders.0.transformer.*, .1.model.*     XL: both

Such a file has no configurations. Sizes are those of the tensors; what tensors do not show is what all models of the
family share: `_FAMILIES`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datencoder_jax.checkpoints.keys import Tensors, is_extra, public, renamed, warn_of_extras
from datencoder_jax.checkpoints.openclip import text_tower
from datencoder_jax.checkpoints.parts import BaseParts, read_models
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import is_lora, refiner
from datencoder_jax.checkpoints.single_file_configs import count, text_config, unet_config, vae_config
from datencoder_jax.checkpoints.single_file_names import (
    text_depth,
    text_name,
    unet_names,
    vae_names,
    without_last_layer,
)
from datencoder_jax.checkpoints.weights import describing, open_tensors, opened, place
from datencoder_jax.errors import UserError

_ASSETS = Path(__file__).parent.parent / "assets"
_UNET, _VAE, _REFINER = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.model."
_KNOWN = re.compile(
    r"^(betas|logvar|lvlb_weights|posterior_\w+|\w*alphas_cumprod\w*|v_pred|ztsnr)$|^(model_ema|denoiser)\.|\.logit_scale$"
    r"|^(cond_stage_model|conditioner\.embedders\.0)\.text_projection(\.weight)?$"
)
"""What is known and no weight of a part: tables of the noise schedule, the averaged weights of training, CLIP's
temperature, the two marks of `_told`, and the projection of CLIP's text tower where pictures are drawn without it. Such
tensors are in published files, so nothing is said of them; of other harmless ones, `keys.is_extra`, it is."""

_PROJECTION = re.compile(r"(^|\.)text_projection(\.weight)?$")

_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
    "steps_offset": 1,
}

_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""By their names in metadata."""


class _Tower(NamedTuple):
    """A text tower in a file.

    Attributes:
        prefix: of the names of its tensors.
        open_clip: whether OpenCLIP named them.
        cut: whether its last layer and its projection are not used, and may be missing.
        whole: whether every layer has to be there.
    """

    prefix: str
    open_clip: bool = False
    cut: bool = False
    whole: bool = False


class Family(NamedTuple):
    """What models of one generation share.

    Attributes:
        towers: the text towers, by component.
        scheduler: the content of `scheduler_config.json`.
        side: pixels along the side of the pictures it was trained on, by prediction type.
        scaling_factor: of the VAE's latents.
    """

    towers: dict[str, _Tower]
    scheduler: dict[str, Any]
    side: dict[str, int]
    scaling_factor: float


_FAMILIES = (
    Family(
        towers={"text_encoder": _Tower("cond_stage_model.transformer.")},
        scheduler=_SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
        side={"epsilon": 512, "v_prediction": 512},
        scaling_factor=0.18215,
    ),
    Family(
        towers={"text_encoder": _Tower("cond_stage_model.model.", open_clip=True, cut=True)},
        scheduler=_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
        side={"epsilon": 512, "v_prediction": 768},
        scaling_factor=0.18215,
    ),
    Family(
        towers={
            "text_encoder": _Tower("conditioner.embedders.0.transformer.", whole=True),
            "text_encoder_2": _Tower("conditioner.embedders.1.model.", open_clip=True, whole=True),
        },
        scheduler=_SCHEDULER
        | {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"},
        side={"epsilon": 1024, "v_prediction": 1024},
        scaling_factor=0.13025,
    ),
)
"""Stable Diffusion 1.x, 2.x and XL."""


def read_single_file(path: str | Path, *, dtype: str = "float32", prediction_type: str | None = None) -> BaseParts:
    """A base model from a checkpoint of one file, Stable Diffusion 1.x, 2.x or XL; parameters are stored as `dtype`.

    The tokenizer is CLIP's own, from this package.

    Args:
        prediction_type: "epsilon" or "v_prediction". Few files tell (`_told`), so without it the others are taken for
            what most of their family are: 2.x for the model of 768 pixels, which predicts v; others predict epsilon.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    path = expand_user(path)
    with opened([path], str(path)) as tensors, open_tensors(path) as file:
        family, parts = split(tensors, str(path))
        scheduler = family.scheduler | _told(tensors, file.metadata() or {})
        if prediction_type == "epsilon":
            scheduler.pop("rescale_betas_zero_snr", None)
        scheduler |= {"prediction_type": prediction_type} if prediction_type else {}
        with describing(path, "a Stable Diffusion model"):
            configs = configurations(parts, family, scheduler["prediction_type"])
        models = read_models(
            configs,
            lambda name, abstract, traits: place(
                public(parts[name], abstract, str(path)), abstract, dtype=dtype, origin=str(path), traits=traits
            ),
            str(path),
        )
    folders = {True: _ASSETS / "open_clip_tokenizer", False: _ASSETS / "clip_tokenizer"}
    tokenizers = [folders[tower.open_clip] for tower in family.towers.values()]
    return BaseParts(
        **models,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if len(tokenizers) == 2 else None,
        scheduler=scheduler,
        feature_extractor=None,
        defaults=None,
        force_zeros_for_empty_prompt=len(tokenizers) == 2,
    )


def _told(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file tells of its prediction and schedule.

    Empty tensors tell user interfaces: `v_pred` of the prediction, `ztsnr` of a schedule that ends in noise. Where they
    are missing, metadata may tell of the prediction, as Stability AI's ModelSpec has it and trainers write it.
    """
    if "v_pred" in tensors:
        return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in tensors}
    kind = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    return {"prediction_type": kind} if kind else {}


def split(tensors: Tensors, origin: str) -> tuple[Family, dict[str, Tensors]]:
    """Which generation a file is of, and the tensors of each component under the names of diffusers and transformers.

    Raises:
        UserError: the file, which it calls `origin`, is of no such model, or holds weights of something else as well.
    """
    family = _family(tensors, origin)
    prefixes = {"unet": _UNET, "vae": _VAE} | {name: tower.prefix for name, tower in family.towers.items()}
    parts = {name: Tensors({}) for name in prefixes}
    odd, extras = [], []
    for key, read in tensors.readers.items():
        if _KNOWN.search(key):
            continue
        name = next((name for name, prefix in prefixes.items() if key.startswith(prefix)), None)
        inside = key.removeprefix(prefixes.get(name or "", ""))
        if _is_extra(inside, family.towers.get(name or "")):
            extras.append(key)
        elif name is None:
            odd.append(key)
        else:
            parts[name].readers[inside] = read
    if odd:
        raise UserError(f"{origin} holds {len(odd)} tensor(s) that are of no known part, such as {odd[0]}.")
    warn_of_extras(extras, origin)
    parts["unet"] = renamed(parts["unet"], unet_names(parts["unet"]), origin)
    parts["vae"] = renamed(parts["vae"], vae_names(parts["vae"]), origin)
    for name, tower in family.towers.items():
        parts[name] = text_tower(parts[name]) if tower.open_clip else renamed(parts[name], text_name, origin)
        if tower.cut:
            parts[name] = without_last_layer(parts[name])
        _check_depth(parts[name], tower, origin)
    return family, parts


def _is_extra(key: str, tower: _Tower | None) -> bool:
    """Whether a tensor, its name without its part's prefix, is harmless and not used; `tower` is its text tower."""
    if tower is not None and tower.open_clip and _PROJECTION.search(key):
        return False  # of XL it is used, and of 2.x it goes with the last layer
    return is_extra(key, ("text_model.",))


def _check_depth(tensors: Tensors, tower: _Tower, origin: str) -> None:
    """Raises `UserError` for a text tower that lacks layers which prompts are read through.

    The tower of Stable Diffusion 1.x may have any number: fine-tuned models skip layers at its end on purpose. The
    others are read before their last layer, which is counted from the whole tower.
    """
    depth = text_depth(tensors)
    layers = count(tensors, "text_model.encoder.layers.")
    if depth is None or not (tower.cut or tower.whole):
        return
    if layers < depth - tower.cut:
        raise UserError(
            f"{origin} lacks layers of a text encoder: {tower.prefix}* has {layers} of {depth}; fetch the whole model."
        )


def configurations(parts: Mapping[str, Tensors], family: Family, prediction_type: str) -> dict[str, Any]:
    """The configuration of every component; a tensor or prediction type that is not there is a `LookupError`."""
    side = family.side[prediction_type]
    vae = vae_config(parts["vae"], side, family.scaling_factor)
    configs = {"unet": unet_config(parts["unet"], side // vae.factor), "vae": vae}
    for name, tower in family.towers.items():
        # OpenAI trained with the approximation, LAION with the function itself
        configs[name] = text_config(parts[name], "gelu" if tower.open_clip else "quick_gelu")
    return configs


def _family(tensors: Tensors, origin: str) -> Family:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    if is_lora(tensors):
        raise UserError(f"{origin} is a LoRA, which changes a base model and is none; name the base model it is for.")
    if has(_REFINER):
        raise refiner(origin)
    if not (has(f"{_UNET}input_blocks.") and has(_VAE)):
        raise UserError(
            f"{origin} is not a whole Stable Diffusion 1.x, 2.x or XL model: it lacks tensors {_UNET}input_blocks.* or "
            f"{_VAE}* (its first is {next(iter(tensors), 'missing')})."
        )
    found = [family for family in _FAMILIES if all(has(tower.prefix) for tower in family.towers.values())]
    if len(found) != 1:
        raise UserError(f"{origin} does not hold the text encoder of one Stable Diffusion 1.x, 2.x or XL model.")
    return found[0]
