"""Weights that cannot be used, and what to use in their place."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from datencoder_jax.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of weights that are refused: reading them can run code."""

XL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
"""The repository of Stable Diffusion XL."""

_FOREIGN = ("transformer", "prior", "text_encoder_3", "movq")
_LORA = re.compile(r"\.(lora_down\.weight|lora_A\.([^.]+\.)?weight|lora\.down\.weight|hada_w1_a|lokr_w1)$")


def conversion_hint(source: str, kind: str = "diffusers.DiffusionPipeline") -> str:
    """How to turn pickled weights into safetensors, in one line.

    Args:
        source: a repository or folder.
        kind: the library and class that read it.
    """
    library, name = kind.split(".")
    return (
        f'convert them once with: python -c "from {library} import {name} as M; '
        f"M.from_pretrained('{source}').save_pretrained('converted')\""
    )


def check_index(index: Mapping[str, Any], origin: str) -> None:
    """Checks that a `model_index.json` is of a model that draws from text with a UNet.

    Raises:
        UserError: it is of another kind of model; `origin` is what it calls the model.
    """
    odd = [name for name in _FOREIGN if is_present(index, name)]
    if odd:
        raise UserError(
            f"{origin} is not a Stable Diffusion 1.x, 2.x or XL model: it has a {odd[0]}; those are the kinds that "
            "can be used."
        )
    if index.get("requires_aesthetics_score") or (
        is_present(index, "text_encoder_2") and not is_present(index, "text_encoder")
    ):
        raise refiner(origin)


def is_present(index: Mapping[str, Any], name: str) -> bool:
    """Whether a `model_index.json` names a part and its class."""
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def refiner(origin: str) -> UserError:
    """What to say of Stable Diffusion XL's refiner."""
    return UserError(
        f"{origin} is the refiner of Stable Diffusion XL, which only retouches pictures; use the base model, such as "
        f"{XL_BASE}."
    )


def is_lora(keys: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA or one of its kin."""
    return any(_LORA.search(key) for key in keys)
