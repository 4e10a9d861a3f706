"""LoRA files of other programs: changes of weights in and out.

A file holds the two factors of each layer's change in PyTorch's layouts: of a linear layer `down` as [rank, in] and
`up` as [out, rank], of a convolution [rank, in, h, w] and [out, rank, 1, 1]. With scale `s` and a weight `w` of choice,

    W' = W + w s (down up)                                                                          (1)

where a convolution's kernel counts as the matrix `[h w in, out]`. The factors go by one of these names:

    diffusers       <layer>.lora_A.weight                     .lora_B.weight      s from the metadata, else 1
    PEFT            base_model.model.<layer>.lora_A.weight    .lora_B.weight      s from adapter_config.json
    ComfyUI         diffusion_model.<layer>.lora_A.weight     .lora_B.weight      s = <layer>.alpha / rank, else 1
    kohya           lora_unet_<layer>.lora_down.weight        .lora_up.weight     s = lora_unet_<layer>.alpha / rank
    old diffusers   <owner>.processor.to_q_lora.down.weight   ..._lora.up.weight  s = 1

PEFT's name of the adapter may stand before `weight` (`lora_A.default.weight`), as it does in memory; `s` is 1 then,
unless the metadata or an adapter_config.json have it. `lora_names` tells which layer is meant. ComfyUI, Forge and A1111
know kohya's names of diffusers' modules for every Stable Diffusion, XL included, so they are what is written. `s` is
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
import regex

from datencoder_jax.checkpoints.lora_names import NETWORKS, PEFT_PREFIX, layer_finder, split
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import refuse_pickle
from datencoder_jax.checkpoints.weights import describing, open_tensors, read_float32, read_json, read_tensor
from datencoder_jax.errors import UserError
from datencoder_jax.typing import AnyArray, LowRank, Params

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA = "lora_adapter_metadata"
_PART = re.compile(r"(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(A|B|down|up)(?:\.[^.]+)?\.weight$|\.(alpha)$")
_NAMED_ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways that PEFT starts an adapter which take something from the base model's weights at once."""
_ROLES = {"A": "down", "B": "up"}
_OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"hada_w"),
    "LoKr": re.compile(r"lokr_w"),
    "LoCon (Tucker)": re.compile(r"lora_mid"),
    "(IA)^3": re.compile(r"\.on_input$|ia3_l"),
    "full-difference": re.compile(r"\.diff(_b)?$"),
}


def diffusers_tensors(offsets: Mapping[str, LowRank]) -> dict[str, np.ndarray]:
    """Offsets under diffusers' names, in PyTorch's layouts, float32."""
    tensors = {}
    for path, offset in offsets.items():
        tensors[f"unet.{path}.lora_A.weight"] = _transposed(offset.down)
        tensors[f"unet.{path}.lora_B.weight"] = _transposed(offset.up)
    return tensors


def diffusers_metadata(offsets: Mapping[str, LowRank]) -> dict[str, str]:
    """Where offsets differ in rank, PEFT's settings with a scale of 1 for each; where not, all programs take it for 1.

    Diffusers reads them from 0.34 on. Without them many of its versions take the rank of one layer for all scales.
    """
    ranks = {path: offset.down.shape[1] for path, offset in offsets.items()}
    if len(set(ranks.values())) < 2:
        return {}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: other for path, other in ranks.items() if other != rank}
    settings = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    settings["target_modules"] = list(ranks)
    return {_METADATA: json.dumps({f"unet.{key}": value for key, value in settings.items()})}


def kohya_tensors(offsets: Mapping[str, LowRank]) -> dict[str, np.ndarray]:
    """Offsets under kohya's names, in PyTorch's layouts, float32; `alpha` equals the rank, so the scale is 1."""
    tensors = {}
    for path, offset in offsets.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = _transposed(offset.down)
        tensors[f"{name}.lora_up.weight"] = _transposed(offset.up)
        tensors[f"{name}.alpha"] = np.asarray(offset.down.shape[1], np.float32)
    return tensors


def layer_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels that a LoRA can change, by module path: linear `[in, out]`, convolutions `HWIO`."""
    return {
        name.removesuffix(".weight"): tuple(np.shape(value))
        for name, value in params.items()
        if name.endswith(".weight") and np.ndim(value) > 1 and not name.endswith("embedding.weight")
    }


def read_lora(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], *, base: str = "the loaded model"
) -> dict[str, LowRank]:
    """The changes in a LoRA file of diffusers, PEFT or kohya.

    Args:
        path: a safetensors file, or a folder that diffusers or PEFT saved one in.
        shapes: of the model's kernels, `layer_shapes` of every network: the UNet's by module path, those of text
            encoders after `lora_names.TEXT_ENCODER` and `TEXT_ENCODER_2`.
        base: what to call that model in an error.

    Returns:
        By the names of `shapes`, in float32, on the host, with the file's scale in `up`: `down [in, r]` of linear
        layers, `[h w in, r]` of convolutions, and `up [r, out]`; layers may differ in rank.

    Raises:
        UserError: the file is missing, damaged, pickled, no LoRA, of another kind, or changes a layer that is not in
            `shapes`, or of another shape there.
    """
    path = _weights_file(expand_user(path))
    with open_tensors(path) as file:
        keys = list(file.keys())
        _check_kind(path, keys)
        layers = _layers(path, keys, shapes, base)
        settings = _peft_settings(path, keys, dict(file.metadata() or {}))
        return {
            name: _read_factors(path, file, name, parts, shapes[name], settings, base) for name, parts in layers.items()
        }


def scaled(change: LowRank, weight: float) -> LowRank:
    """The change at a weight of choice, `w s (down up)` of equation (1)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return LowRank(change.down, np.float32(weight) * np.asarray(change.up))


def summed(first: LowRank | None, second: LowRank) -> LowRank:
    """Two changes of one layer as one, of the sum of their ranks; the second alone where there is no first."""
    if first is None:
        return second
    down = np.concatenate([np.asarray(first.down), np.asarray(second.down)], axis=1)
    return LowRank(down, np.concatenate([np.asarray(first.up), np.asarray(second.up)]))


def merged(kernel: AnyArray, change: LowRank, dtype: Any) -> np.ndarray:
    """Equation (1), summed in float32 on the host and rounded to `dtype` once; infinite where that is too narrow."""
    with np.errstate(over="ignore", invalid="ignore"):
        delta = np.asarray(change.down) @ np.asarray(change.up)
        return (np.asarray(kernel).astype(np.float32) + delta.reshape(kernel.shape)).astype(dtype)


def _transposed(factor) -> np.ndarray:
    return np.asarray(factor).astype(np.float32).T


def _weights_file(path: Path) -> Path:
    refuse_pickle(path, "state_dict")
    if not path.is_dir():
        return path
    for name in (DIFFUSERS_FILE, _PEFT_FILE):
        if (path / name).is_file():
            return path / name
    for name in (DIFFUSERS_FILE, _PEFT_FILE):
        if (pickle := (path / name).with_suffix(".bin")).is_file():
            refuse_pickle(pickle, "state_dict")
    raise UserError(f"{path} is a folder without {DIFFUSERS_FILE} or {_PEFT_FILE}; name the LoRA file itself.")


def _check_kind(path: Path, keys: Iterable[str]) -> None:
    for kind, mark in _OTHER_KINDS.items():
        if any(mark.search(key) for key in keys):
            raise UserError(f"{path} is a {kind} file, and only plain LoRA can be applied; use a LoRA without it.")
    if not any(_PART.search(key) and not key.endswith(".alpha") for key in keys):
        raise UserError(f"{path} is not a LoRA: none of its tensors has a name that diffusers, PEFT or kohya give.")


def _layers(path: Path, keys: Iterable[str], known: Iterable[str], base: str) -> dict[str, dict[str, str]]:
    """The file's keys by layer and by part: `down`, `up` and maybe `alpha`."""
    find, layers, strangers = layer_finder(known), {}, set()
    for key in keys:
        part = _PART.search(key)
        if part is None:
            raise UserError(f"{path} holds {key}, which is no part of a LoRA of linear and convolution layers.")
        stem = key[: part.start()]
        layer = find(stem)
        if layer is None:
            strangers.add(stem)
            continue
        found = part[1] or part[2]
        role, parts = _ROLES.get(found, found), layers.setdefault(layer, {})
        if role in parts:
            raise UserError(f"{path} holds two tensors for one factor: {parts[role]} and {key}.")
        parts[role] = key
    if strangers:
        raise UserError(
            f"{path} changes {len(strangers)} layer(s) that {base} does not have, {min(strangers)} the first of them; "
            "it was probably made for another family of models, so use a LoRA of this one's."
        )
    return layers


def _peft_settings(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings by network, from the file's metadata or from beside it; those that there are."""
    origin = path.with_name(_PEFT_CONFIG)
    # PEFT writes its settings beside the weights that it saves, and leaves the adapter's name out of theirs.
    dumped = any(_NAMED_ADAPTER.search(key) for key in keys)
    if any(key.startswith(PEFT_PREFIX) for key in keys) and (not dumped or origin.is_file()):
        settings = dict.fromkeys(NETWORKS, read_json(origin))
    elif _METADATA in metadata:
        origin, settings = path, {network: {} for network in NETWORKS}
        with describing(origin, "a LoRA"):
            for key, value in json.loads(metadata[_METADATA]).items():
                network, _, option = key.partition(".")
                settings.setdefault(network, {})[option] = value
    else:
        return {}
    for config in settings.values():
        for option in ("use_dora", "lora_bias"):
            if config.get(option):
                raise UserError(f"{origin} asks for {option}, which cannot be applied; use a plain LoRA.")
        start = str(config.get("init_lora_weights", True))
        if start.lower().startswith(_CHANGES_BASE):
            raise UserError(
                f"{origin} is of an adapter that took something from the base model's weights when it was made "
                f"(init_lora_weights={start}); have PEFT convert it to a plain LoRA first."
            )
        if config.get("peft_type", "LORA") != "LORA":
            raise UserError(f"{origin} describes a {config['peft_type']} adapter; only LoRA can be applied.")
    return settings


def _scale(path: Path, settings: Mapping[str, Mapping[str, Any]], layer: str, rank: int) -> float:
    """PEFT's factor of a layer's change: `alpha / rank`, or `alpha / sqrt(rank)` if it is rank-stabilized."""
    network, module = split(layer)
    config = settings.get(network)
    if not config:
        return 1.0
    try:
        patterns = config.get("alpha_pattern") or {}
        matches = (alpha for key, alpha in patterns.items() if _matches(key, module))
        alpha = float(next(matches, config["lora_alpha"]))
    except TimeoutError as error:
        raise UserError(f"{path}: a key of its alpha_pattern takes too long to match with {layer}.") from error
    except (regex.error, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: the settings of its adapter give no alpha for {layer} ({error!r}).") from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT takes a key of its patterns for a module; `TimeoutError` where that is not found out in a second."""
    return regex.match(rf"(.*\.)?({pattern})$", module, timeout=1.0) is not None


def _read_factors(
    path: Path,
    file: Any,
    name: str,
    parts: Mapping[str, str],
    shape: tuple[int, ...],
    settings: Mapping[str, Mapping[str, Any]],
    base: str,
) -> LowRank:
    if "down" not in parts or "up" not in parts:
        raise UserError(f"{path} holds only one of the two factors of {name}; fetch or write it again.")
    down, up = (read_float32(path, file, parts[part]) for part in ("down", "up"))
    rank = len(down) if down.ndim in (2, 4) else 0
    if not rank or up.shape[1:] not in ((rank,), (rank, 1, 1)):
        raise UserError(
            f"{path}: the factors of {name} should be [rank, in] and [out, rank] (of a convolution [rank, in, h, w] "
            f"and [out, rank, 1, 1]) and are {list(down.shape)} and {list(up.shape)}."
        )
    found = _without_ones((*down.shape[2:], down.shape[1], len(up)))
    if found != _without_ones(shape):
        raise UserError(
            f"{path} was made for another model: its {name} is {list(found)} and that of {base} is "
            f"{list(_without_ones(shape))}."
        )
    scale = _scale(path, settings, name, rank)
    if "alpha" in parts:
        alpha = read_tensor(path, file, parts["alpha"], integers=True)  # as some programs write it
        if alpha.size != 1:
            raise UserError(f"{path}: {parts['alpha']} should be one number and is {list(alpha.shape)}.")
        scale = alpha.item() / rank
    with np.errstate(over="ignore", invalid="ignore"):
        up = up.reshape(len(up), rank) * np.float32(scale)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise UserError(f"{path} holds values that are not finite (NaN or infinity) in {name}.")
    # Of a convolution: [rank, in, h, w] -> [h, w, in, rank], the order of the kernel's axes.
    rows = down.T if down.ndim == 2 else down.transpose(2, 3, 1, 0).reshape(-1, rank)
    return LowRank(rows, up.T)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape, where a convolution of single pixels counts as a linear layer."""
    return shape[2:] if shape[:2] == (1, 1) and len(shape) == 4 else shape
