"""The names that tensors go by in the wild, and the one name each has here.

Names here are those of current diffusers and transformers. Files differ in a few known ways: the attention of the VAE's
middle block was renamed, towers come with and without their prefix, and old exports carry index buffers. Programs also
leave harmless tensors beside the weights (`is_extra`), which are ignored and named in one warning. Whole other ways of
naming are `single_file` (checkpoints of one file) and `openclip`.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from datencoder_jax.checkpoints.layouts import list_some
from datencoder_jax.errors import UserError
from datencoder_jax.printable import escape_hidden

_IGNORED = re.compile(r"(^|\.)position_ids$")
"""Index buffers, not parameters."""

_EXTRA = re.compile(
    r"(?:^|\.)(?:(?:loss|model_ema)\.|(?P<tower>text_model|vision_model|visual)\."
    r"|(?:attn_mask|logit_scale|logit_bias|global_step|epoch|(?:text|visual)_projection(?:\.weight)?)$)"
)
"""The loss that a VAE was trained with, averaged weights, the other tower of CLIP, its attention mask, temperature and
projections, and counters of training."""

_PREFIXES = ("text_model.", "vision_model.")

_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "q": "to_q", "k": "to_k", "v": "to_v"}
_VAE_ATTENTION |= {"proj_attn": "to_out.0", "proj_out": "to_out.0", "norm": "group_norm"}
_VAE_LEGACY = re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.\d+\.)(\w+)(\.(?:weight|bias))$")
_VAE_PROJECTION = re.compile(r"\.mid_block\.attentions\.\d+\.to_(?:q|k|v|out\.0)\.weight$")


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read when asked for.

    Attributes:
        readers: what gives each tensor.
    """

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]):
        self.readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def renamed(tensors: Tensors, rename: Callable[[str], str | None], origin: str) -> Tensors:
    """The same tensors under the names that `rename` gives; those it gives None are left out.

    Raises:
        UserError: two tensors go by one name; `origin` is what it calls them all.
    """
    sources: dict[str, str] = {}
    for key in tensors:
        name = rename(key)
        if name in sources:
            raise UserError(f"{origin}: {sources[name]} and {key} are two names of one parameter.")
        if name is not None:
            sources[name] = key
    return Tensors({name: tensors.readers[key] for name, key in sources.items()})


def public(tensors: Tensors, wanted: Collection[str], origin: str) -> Tensors:
    """Tensors under public names, as far as `wanted` has them; it warns of harmless others, which it leaves out.

    Raises:
        UserError: two tensors go by one name.
    """
    found = renamed(tensors, lambda key: public_name(key, wanted), origin)
    extras = [name for name in found if name not in wanted and is_extra(name, wanted)]
    for name in extras:
        del found.readers[name]
    warn_of_extras(extras, origin)
    for name, read in found.readers.items():
        if _VAE_PROJECTION.search(name):
            found.readers[name] = lambda read=read: _linear(read())
    return found


def is_extra(key: str, wanted: Collection[str] = ()) -> bool:
    """Whether a tensor that is none of the `wanted` does no harm: training and conversion leave it beside the weights.

    A tensor of a tower is none of these where `wanted` has that tower: then the tower is not the one described.
    """
    match = _EXTRA.search(key)
    return bool(match) and not (match["tower"] and any(name.startswith(f"{match['tower']}.") for name in wanted))


def warn_of_extras(extras: Sequence[str], origin: str) -> None:
    """Warns of harmless tensors that are ignored, where there are any; `origin` is what it calls the file."""
    if extras:
        names = escape_hidden(list_some(sorted(extras), ", ", 3))
        warnings.warn(f"{origin} holds {len(extras)} tensor(s) that are not used: {names}", stacklevel=2)


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


def _linear(weight: np.ndarray) -> np.ndarray:
    """The weight of a linear layer, which old exports hold as that of a 1x1 convolution."""
    return weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight
