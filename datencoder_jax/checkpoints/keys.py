"""The names that tensors go by in the wild, and the one name each has here.

Names here are those of current diffusers and transformers. Files differ in a few known ways: the attention of the VAE's
middle block was renamed, towers come with and without their prefix, and old exports carry index buffers.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from datencoder_jax.errors import UserError

_IGNORED = re.compile(r"(^|\.)position_ids$")
"""Index buffers, not parameters."""

_PREFIXES = ("text_model.", "vision_model.")

_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "q": "to_q", "k": "to_k", "v": "to_v"}
_VAE_ATTENTION |= {"proj_attn": "to_out.0", "proj_out": "to_out.0", "norm": "group_norm"}
_VAE_LEGACY = re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.\d+\.)(\w+)(\.(?:weight|bias))$")
_VAE_PROJECTION = re.compile(r"\.mid_block\.attentions\.\d+\.to_(?:q|k|v|out\.0)\.weight$")


def public_name(key: str, wanted: Collection[str]) -> str | None:
    """The name in `wanted` that the file's `key` stands for; None to ignore it; `key` itself when it is unknown."""
    if key in wanted:
        return key
    if _IGNORED.search(key):
        return None
    candidates = [prefix + key for prefix in _PREFIXES]
    candidates += [key.removeprefix(prefix) for prefix in _PREFIXES]
    if match := _VAE_LEGACY.match(key):
        before, layer, after = match.groups()
        candidates.append(before + _VAE_ATTENTION.get(layer, layer) + after)
    return next((name for name in candidates if name in wanted), key)


class Renamed(Mapping[str, np.ndarray]):
    """A file's tensors under public names, read when asked for.

    Args:
        keys: the file's own names.
        read: gives the tensor of one of them.
        wanted: the public names.
        origin: the file, for errors.

    Raises:
        UserError: two tensors of the file go by one name.
    """

    def __init__(self, keys: Collection[str], read: Callable[[str], np.ndarray], wanted: Collection[str], origin: str):
        self._read = read
        self._keys: dict[str, str] = {}
        for key in keys:
            name = public_name(key, wanted)
            if name in self._keys:
                raise UserError(f"{origin}: {self._keys[name]} and {key} are two names of one parameter.")
            if name is not None:
                self._keys[name] = key

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._read(self._keys[name])
        if _VAE_PROJECTION.search(name) and array.ndim == 4 and array.shape[2:] == (1, 1):
            return array[:, :, 0, 0]  # old exports hold these linear layers as 1x1 convolutions
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
