"""Which base model a concept belongs to, told by the weights themselves rather than by a name or a path."""

import hashlib
from collections.abc import Mapping

import numpy as np

_SAMPLES = 64
_TABLE = "token_embedding.weight"


def base_fingerprint(unet: Mapping[str, np.ndarray], text: Mapping[str, np.ndarray]) -> str:
    """32 hexadecimal digits for a UNet and its text tower's token table.

    Hashes every name and shape, and a few evenly spaced values of every tensor in half precision: so a folder and its
    fp16 variant have one fingerprint, and a fine-tuned model has another. Parameters that went through bfloat16 differ.

    Args:
        unet: the UNet's parameters, by public name, in Flax layouts.
        text: the text tower's; only its token table counts.
    """
    digest = hashlib.sha256()
    tables = {name: value for name, value in text.items() if name.endswith(_TABLE)}
    for part, params in (("unet", unet), ("text", tables)):
        for name in sorted(params):
            value = np.asarray(params[name])
            digest.update(f"{part}.{name} {list(value.shape)}\n".encode())
            where = np.unique(np.linspace(0, value.size - 1, min(_SAMPLES, value.size)).astype(np.int64))
            with np.errstate(over="ignore"):
                sample = np.take(value, where).astype(np.float32).astype("<f2")
            digest.update((sample + np.float16(0)).tobytes())  # -0 and 0 are one value
    return digest.hexdigest()[:32]
