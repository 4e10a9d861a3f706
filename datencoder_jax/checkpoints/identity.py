"""Which model concepts, encoders and records belong to, told by its weights rather than by a name or a path."""

import hashlib
from collections.abc import Mapping

import numpy as np

Traits = dict[str, bytes]
"""What is hashed of each parameter of a part, by public name."""

_SAMPLES = 64
_TABLE = "token_embedding.weight"


def trait(value: np.ndarray) -> bytes:
    """What is hashed of one parameter in its Flax layout: shape, and some evenly spaced values in half precision."""
    where = np.unique(np.linspace(0, value.size - 1, min(_SAMPLES, value.size)).astype(np.int64))
    with np.errstate(over="ignore"):
        sample = np.take(value, where).astype(np.float32).astype("<f2")
    return f"{list(value.shape)}\n".encode() + (sample + np.float16(0)).tobytes()  # -0 and 0 are one value


def fingerprint(traits: Mapping[str, Traits]) -> str:
    """32 hexadecimal digits for a UNet and the token tables of its text towers.

    Names, shapes and samples of values count: so a folder and its fp16 variant have one fingerprint, and a fine-tuned
    model has another. Parameters that went through bfloat16 differ.

    Args:
        traits: of the parts `unet`, `text_encoder` and, for XL, `text_encoder_2`.
    """
    digest = hashlib.sha256()
    for part, label in (("unet", "unet"), ("text_encoder", "text"), ("text_encoder_2", "text_2")):
        for name, value in sorted(traits.get(part, {}).items()):
            if part == "unet" or name.endswith(_TABLE):
                digest.update(f"{label}.{name} ".encode() + value)
    return digest.hexdigest()[:32]


def part_fingerprint(traits: Traits) -> str:
    """16 hexadecimal digits for a single network, such as a vision tower, from the traits of all its parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(traits.items()):
        digest.update(f"{name} ".encode() + value)
    return digest.hexdigest()[:16]


def base_fingerprint(unet: Mapping[str, np.ndarray], *texts: Mapping[str, np.ndarray]) -> str:
    """`fingerprint` of the parameters of a UNet and of its text towers, by public name, in Flax layouts."""
    parts = zip(("unet", "text_encoder", "text_encoder_2"), (unet, *texts), strict=False)
    return fingerprint({part: {name: trait(np.asarray(v)) for name, v in params.items()} for part, params in parts})
