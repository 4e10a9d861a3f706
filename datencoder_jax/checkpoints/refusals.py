"""Weights that cannot be used, and what to use in their place."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datencoder_jax.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of weights that are refused: reading them can run code."""

_SPECIAL = frozenset("'\"\\$`!%")
"""What ends a string in Python, and what shells read between double quotes."""

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
        f"M.from_pretrained({_literal(source)}).save_pretrained('converted')\""
    )


def is_pickle(path: Path) -> bool:
    """Whether a file's ending, in letters of either case, says that it is pickled."""
    return path.suffix.lower() in PICKLES


def refuse_pickle(path: Path, key: str = "") -> None:
    """Raises `UserError`, with the command that converts it, for a file whose ending says that it is pickled.

    Args:
        path: the file; a folder is none.
        key: what the tensors are under where not at the top, in some files.
    """
    if is_pickle(path) and not path.is_dir():
        raise UserError(
            f"{path} is pickled, and reading that can run code; convert it once where you trust it (a file that "
            f"PyTorch refuses then holds more than tensors, and cannot be used): {conversion_command(path, key)}."
        )


def conversion_command(path: Path, key: str = "") -> str:
    """The command, in one line for every shell, that writes a pickled file's tensors beside it as safetensors.

    Args:
        key: as for `refuse_pickle`.
    """
    inner = f" d = d.get('{key}', d);" if key else ""
    # Files of the code that textual inversion was published with hold a ParameterDict.
    return (
        'python -c "import torch, safetensors.torch as s; '
        "torch.serialization.add_safe_globals([torch.nn.ParameterDict]); "
        f"d = torch.load({_literal(path.as_posix())}, map_location='cpu', weights_only=True);{inner} "
        "s.save_file({k: v.detach().contiguous().clone() for k, v in getattr(d, '_parameters', d).items() "
        f'if torch.is_tensor(v)}}, {_literal(path.with_suffix(".safetensors").as_posix())})"'
    )


def _literal(text: str) -> str:
    """The text as a string of Python that may stand between double quotes in every shell."""

    def escaped(character: str) -> str:
        if character.isprintable() and character not in _SPECIAL:
            return character
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"

    return f"'{''.join(map(escaped, text))}'"


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
