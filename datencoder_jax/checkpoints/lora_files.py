"""LoRA files of other programs: weight offsets in and out.

A file holds the two factors of each projection's offset `dW = s (down up)` in PyTorch's layouts, `down` as [rank, in]
and `up` as [out, rank], under one of these names:

    diffusers       unet.<path>.lora_A.weight             .lora_B.weight          s from the metadata, else 1
    PEFT            base_model.model.<path>.lora_A.weight .lora_B.weight          s from adapter_config.json
    kohya           lora_unet_<name>.lora_down.weight     .lora_up.weight         s = lora_unet_<name>.alpha / rank
    old diffusers   <owner>.processor.to_q_lora.down.weight   ..._lora.up.weight  s = 1

`<path>` is the projection's module path and `<name>` the path with underscores for dots. ComfyUI, Forge and A1111 know
these names for every Stable Diffusion, XL included, so they are what is written; of XL, kohya's trainer itself writes
the names of the original code (`input_blocks_4_1_transformer_blocks_0_attn1_to_q`), which are read as well. `s` is
folded into `up` when a file is read, and is 1 in what is written.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import PICKLES
from datencoder_jax.checkpoints.weights import describing, open_tensors, read_json, read_tensor
from datencoder_jax.errors import UserError
from datencoder_jax.typing import LowRank, Offsets

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_PREFIX = re.compile(rf"^({re.escape(_PEFT_PREFIX)}|unet\.|lora_unet_)")
_PART = re.compile(r"(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(A|B|down|up)\.weight$|\.(alpha)$")
_ROLES = {"A": "down", "B": "up"}
_OTHER_KINDS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_w",),
    "LoKr": ("lokr_w",),
    "LoCon (Tucker)": ("lora_mid",),
}
_ATTENTION = re.compile(r"attn[12]_to_(q|k|v|out_0|out)$")


def diffusers_tensors(offsets: Offsets) -> dict[str, np.ndarray]:
    """Offsets under diffusers' names, in PyTorch's layouts, float32."""
    tensors = {}
    for path, offset in offsets.items():
        tensors[f"unet.{path}.lora_A.weight"] = _transposed(offset.down)
        tensors[f"unet.{path}.lora_B.weight"] = _transposed(offset.up)
    return tensors


def kohya_tensors(offsets: Offsets) -> dict[str, np.ndarray]:
    """Offsets under kohya's names, in PyTorch's layouts, float32; `alpha` equals the rank, so the scale is 1."""
    tensors = {}
    for path, offset in offsets.items():
        name = f"lora_unet_{_flat(path)}"
        tensors[f"{name}.lora_down.weight"] = _transposed(offset.down)
        tensors[f"{name}.lora_up.weight"] = _transposed(offset.up)
        tensors[f"{name}.alpha"] = np.asarray(offset.down.shape[1], np.float32)
    return tensors


def read_lora(
    path: str | Path, shapes: Mapping[str, tuple[int, int]], *, base: str = "the loaded model"
) -> dict[str, LowRank]:
    """The offsets in a LoRA file of diffusers, PEFT or kohya.

    Args:
        path: a safetensors file, or a folder that diffusers or PEFT saved one in.
        shapes: `(in, out)` of the model's attention projections by module path.
        base: what to call that model in an error.

    Returns:
        Offsets in float32, on the host, with the file's scale in them; projections may differ in rank.

    Raises:
        UserError: the file is missing, damaged, pickled, no LoRA, of another kind or another model, or holds offsets of
            layers other than the UNet's attention, which would be lost.
    """
    path = _weights_file(expand_user(path))
    with open_tensors(path) as file:
        keys = list(file.keys())
        _check_kind(path, keys)
        modules = _modules(path, keys, shapes, base)
        config = _peft_config(path, keys, dict(file.metadata() or {}))
        return {
            name: _read_offset(path, file, name, parts, shapes[name], config, base) for name, parts in modules.items()
        }


def _transposed(factor) -> np.ndarray:
    return np.asarray(factor).astype(np.float32).T


def _flat(path: str) -> str:
    return path.replace(".", "_")


def refuse_pickle(path: Path, hint: str) -> None:
    """Raises `UserError` for a file whose ending says that it is pickled; `hint` is the code that converts it."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is pickled, and reading that can run code; convert it once where you trust it: "
            f"python -c \"import torch, safetensors.torch as s; d = torch.load('{path.name}', weights_only=True); "
            f"s.save_file({hint}, '{path.stem}.safetensors')\"."
        )


def _weights_file(path: Path) -> Path:
    refuse_pickle(path, "d")
    if not path.is_dir():
        return path
    for name in (DIFFUSERS_FILE, _PEFT_FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} is a folder without {DIFFUSERS_FILE} or {_PEFT_FILE}; name the LoRA file itself.")


def _check_kind(path: Path, keys: Iterable[str]) -> None:
    for kind, marks in _OTHER_KINDS.items():
        if any(mark in key for key in keys for mark in marks):
            raise UserError(f"{path} is a {kind} file, and only plain LoRA can be applied; use a LoRA without it.")
    if not any(_PART.search(key) and not key.endswith(".alpha") for key in keys):
        raise UserError(f"{path} is not a LoRA: none of its tensors has a name that diffusers, PEFT or kohya give.")


def _modules(
    path: Path, keys: Iterable[str], shapes: Mapping[str, tuple[int, int]], base: str
) -> dict[str, dict[str, str]]:
    """The file's keys by module path and by part: `down`, `up` and maybe `alpha`."""
    spellings, modules, strangers = _spellings(shapes), {}, set()
    for key in keys:
        part = _PART.search(key)
        if part is None:
            raise UserError(f"{path} holds {key}, which is no part of a LoRA of linear layers.")
        stem = key[: part.start()]
        module = spellings.get(_flat(_PREFIX.sub("", stem).replace(".processor.", ".")))
        if module is None:
            strangers.add(stem)
            continue
        found = part[1] or part[2]
        role, parts = _ROLES.get(found, found), modules.setdefault(module, {})
        if role in parts:
            raise UserError(f"{path} holds two tensors for one factor: {parts[role]} and {key}.")
        parts[role] = key
    if strangers:
        raise UserError(_complaint(path, sorted(strangers), base))
    return modules


def _spellings(shapes: Iterable[str]) -> dict[str, str]:
    """Module paths by every flattened name a file may give them."""
    down = [int(match[1]) for path in shapes if (match := re.match(r"down_blocks\.\d+\.attentions\.(\d+)\.", path))]
    layers = 1 + max(down, default=0)
    spellings = {}
    for path in shapes:
        for name in (_flat(path), _original(_flat(path), layers)):
            spellings[name] = path
            spellings[re.sub(r"_to_out_0$", "_to_out", name)] = path
    return spellings


def _original(name: str, layers: int) -> str:
    """A flattened name as Stable Diffusion's original code has it, for blocks of `layers` residual layers."""
    match = re.match(r"(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", name)
    if match is None:
        return name.replace("mid_block_attentions_0", "middle_block_1")
    position = int(match[2]) * (layers + 1) + int(match[3])
    # The first input block is the convolution that latents enter by.
    side = f"input_blocks_{position + 1}" if match[1] == "down" else f"output_blocks_{position}"
    return f"{side}_1_{match[4]}"


def _complaint(path: Path, strangers: list[str], base: str) -> str:
    kinds = Counter(_layer_kind(stem) for stem in strangers)
    if "attention" in kinds:
        odd = next(stem for stem in strangers if _layer_kind(stem) == "attention")
        return f"{path} was made for another model: it changes {odd}, which {base} does not have."
    counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"{path} changes layers that cannot be changed here ({counts}); use a LoRA of the UNet's attention alone "
        "(to_q, to_k, to_v, to_out.0)."
    )


def _layer_kind(stem: str) -> str:
    name = _flat(stem)
    if re.match(r"lora_te|text_encoder", name):
        return "the text encoder"
    if _ATTENTION.search(name):
        return "attention"
    if re.search(r"_ff_|_proj_(in|out)$", name):
        return "feed-forward and in/out projections"
    return "other layers"


def _peft_config(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings of the UNet's adapter, from the file's metadata or from beside it; empty where there are none."""
    if any(key.startswith(_PEFT_PREFIX) for key in keys):
        config, origin = read_json(path.with_name(_PEFT_CONFIG)), path.with_name(_PEFT_CONFIG)
    elif "lora_adapter_metadata" in metadata:
        origin = path
        with describing(origin, "a LoRA"):
            values = json.loads(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("unet."): value for key, value in values.items() if key.startswith("unet.")}
    else:
        return {}
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise UserError(f"{origin} asks for {option}, which cannot be applied; use a plain LoRA.")
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{origin} describes a {config['peft_type']} adapter; only LoRA can be applied.")
    return config


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of a module's offset: `alpha / rank`, or `alpha / sqrt(rank)` if it is rank-stabilized."""
    if not config:
        return 1.0
    try:
        patterns = config.get("alpha_pattern") or {}
        named = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(named, config["lora_alpha"]))
    except (re.error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the settings of its adapter give no alpha for {module} ({error!r}).") from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_offset(path: Path, file, name: str, parts, shape: tuple[int, int], config, base: str) -> LowRank:
    if "down" not in parts or "up" not in parts:
        raise UserError(f"{path} holds only one of the two factors of {name}; fetch or write it again.")
    down, up = (read_tensor(path, file, parts[part]).astype(np.float32) for part in ("down", "up"))
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise UserError(
            f"{path}: the factors of {name} should be [rank, in] and [out, rank] and are "
            f"{list(down.shape)} and {list(up.shape)}."
        )
    rank, found = down.shape[0], (down.shape[1], up.shape[0])
    if found != tuple(shape):
        raise UserError(
            f"{path} was made for another model: its {name} is {list(found)} and that of {base} is {list(shape)}."
        )
    scale = _scale(path, config, name, rank)
    if "alpha" in parts:
        alpha = file.get_tensor(parts["alpha"])  # some programs write it as an integer
        if alpha.size != 1:
            raise UserError(f"{path}: {parts['alpha']} should be one number and is {list(alpha.shape)}.")
        scale = alpha.item() / rank
    up = up * np.float32(scale)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise UserError(f"{path} holds values that are not finite (NaN or infinity) in {name}.")
    return LowRank(down.T, up.T)
