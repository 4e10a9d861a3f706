"""A base model in its parts, whatever they were read from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.checkpoints.identity import Traits, fingerprint, part_fingerprint
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.typing import Params


class BaseParts(NamedTuple):
    """The parts of a base model.

    Attributes:
        unet, vae, text_encoder: models with their parameters on the default device.
        scheduler: the content of `scheduler_config.json`.
        tokenizer: the folder of the tokenizer's files.
        text_encoder_2, tokenizer_2: the second text tower, with its projection, and its tokenizer: those of XL.
        force_zeros_for_empty_prompt: XL's UNet was trained with zeros for the states of no text.
        image_encoder: a vision tower that shares the text tower's space, where the folder has one.
        feature_extractor: the content of `preprocessor_config.json`, how pictures enter `image_encoder`.
        defaults: the content of `datencoder.json`: `guidance` (a scale) and `prompts` with the placeholder `S*`.
        fingerprint: what `identity.fingerprint` says of it; "" when the parts were not read from files.
        vision_fingerprint: what `identity.part_fingerprint` says of `image_encoder`; "" without one.
    """

    unet: Model
    vae: Model
    text_encoder: Model
    scheduler: dict[str, Any]
    tokenizer: Path
    text_encoder_2: Model | None = None
    tokenizer_2: Path | None = None
    force_zeros_for_empty_prompt: bool = False
    image_encoder: Model | None = None
    feature_extractor: dict[str, Any] | None = None
    defaults: dict[str, Any] | None = None
    fingerprint: str = ""
    vision_fingerprint: str = ""


Reader = Callable[[str, Mapping[str, jax.ShapeDtypeStruct], Traits], Params]
"""Reads the parameters of a component from its name and their shapes, and fills in their traits."""


def read_models(configs: Mapping[str, Any], read: Reader, origin: str) -> dict[str, Any]:
    """The models of a base model, read one after the other, and their fingerprints: fields of `BaseParts`.

    Args:
        configs: of every component, by its name in `COMPONENTS`.
        origin: what the error messages call the model.

    Raises:
        UserError: the configurations do not fit together, or a component cannot be read.
    """
    _check(configs, origin)
    models: dict[str, Any] = {}
    traits: dict[str, Traits] = {}
    for name, config in configs.items():
        kind = COMPONENTS[name].kind
        traits[name] = {}
        models[name] = Model(kind, config, read(name, abstract_params(kind, config), traits[name]))
    eyes = traits.get("image_encoder")
    return {**models, "fingerprint": fingerprint(traits), "vision_fingerprint": part_fingerprint(eyes) if eyes else ""}


def _check(configs: Mapping[str, Any], origin: str) -> None:
    """Raises `UserError` unless these are configurations of one model that draws from text alone."""
    unet, latents = configs["unet"], configs["vae"].latent_channels
    towers = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    width = sum(tower.hidden_size for tower in towers)
    if unet.cross_attention_dim != width:
        raise UserError(
            f"{origin}: the UNet attends to vectors of {unet.cross_attention_dim} and the text encoder makes vectors "
            f"of {width}; these parts are not of one model."
        )
    pooled = towers[1].projection_dim if len(towers) == 2 and towers[1].with_projection else 0
    if unet.pooled_width != pooled:
        raise UserError(
            f"{origin}: the UNet takes pooled text of width {unet.pooled_width} and the second text encoder makes "
            f"{pooled}; these parts are not of one model."
        )
    if not unet.in_channels == unet.out_channels == latents:
        raise UserError(
            f"{origin}: the UNet takes {unet.in_channels} channels, makes {unet.out_channels}, and the VAE's latents "
            f"have {latents}: a model for inpainting or editing will not do; use one that draws from text alone."
        )
