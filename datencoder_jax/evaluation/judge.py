"""The judge: a small convolutional network that reads pictures of the embedded world.

It was trained on true renders (`training.judge`) and serves evaluation only; nothing that is judged was trained on it.
From pooled features `h = [mean_xy f, max_xy f]` of the last feature map `f` it gives

    u = e / |e|,  e = W2 silu(W1 h + b1) + b2      who it is: near for pictures of one individual, whatever the context
    l_a = P_a h + c_a                              what is seen: logits of attribute `a` (class, colours, scene ...)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from datencoder_jax.checkpoints.atomic import atomic_write, save_tensors
from datencoder_jax.checkpoints.folders import read_component
from datencoder_jax.checkpoints.layouts import to_torch_layout
from datencoder_jax.data.images import to_float
from datencoder_jax.models.config import ConfigMixin
from datencoder_jax.models.layers import GroupNorm, conv, conv3x3, linear
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.toyworld.dataset import LABELS
from datencoder_jax.toyworld.world import ACCESSORIES, CLASSES, COLOURS, PATTERNS, SCENES, STYLES, TRIMS
from datencoder_jax.typing import Images

JUDGE_FOLDER = Path(__file__).parents[1] / "assets" / "judge"
"""The judge that comes with the package."""

WORDS: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "main": COLOURS,
    "second": COLOURS,
    "accent": COLOURS,
    "pattern": PATTERNS,
    "trim": TRIMS,
    "scene": SCENES,
    "style": STYLES,
    "accessory": ACCESSORIES,
}
"""What the answers of each probe mean, in the order of `toyworld.dataset.LABELS`."""


@dataclass(frozen=True)
class JudgeConfig(ConfigMixin):
    """Size of the judge.

    Attributes:
        widths: channels at a half, a quarter, an eighth ... of the picture's side.
        embedding: dimension of the identity embedding.
        norm_num_groups: of the group normalizations.
        labels, sizes: names of the probes and how many answers each has.
    """

    widths: tuple[int, ...] = (48, 96, 160)
    embedding: int = 64
    norm_num_groups: int = 8
    labels: tuple[str, ...] = LABELS
    sizes: tuple[int, ...] = tuple(len(WORDS[name]) for name in LABELS)


class Verdict(NamedTuple):
    """What the judge says of a batch.

    Attributes:
        embedding: unit vectors `[batch, embedding]`.
        logits: `[batch, answers]` by probe.
    """

    embedding: Float[Array, "batch width"]
    logits: dict[str, jax.Array]


class Judge(nnx.Module):
    """The network; see the module's equations. `images` are float32 in [-1, 1], `[batch, height, width, 3]`."""

    def __init__(self, config: JudgeConfig, *, dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        first, top = config.widths[0], config.widths[-1]
        convs = [conv(3, first, (4, 4), strides=2, padding=1, **make), conv3x3(first, first, **make)]
        for before, after in zip(config.widths, config.widths[1:], strict=False):
            convs += [conv3x3(before, after, stride=2, **make), conv3x3(after, after, **make)]
        self.convs = nnx.List(convs)
        self.norms = nnx.List(
            [GroupNorm(c.out_features, groups=config.norm_num_groups, epsilon=1e-5, **make) for c in convs]
        )
        self.hidden = linear(2 * top, top, **make)
        self.embedding = linear(top, config.embedding, **make)
        self.probes = nnx.Dict(
            {name: linear(2 * top, n, **make) for name, n in zip(config.labels, config.sizes, strict=True)}
        )

    def __call__(self, images: Images) -> Verdict:
        """The verdict on `images`."""
        x = images
        for convolution, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(convolution(x)))
        h = jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
        e = self.embedding(jax.nn.silu(self.hidden(h))).astype(jnp.float32)
        unit = e / (jnp.linalg.norm(e, axis=-1, keepdims=True) + 1e-6)
        return Verdict(unit, {name: probe(h).astype(jnp.float32) for name, probe in self.probes.items()})


class Reading(NamedTuple):
    """Verdicts on the host.

    Attributes:
        embedding: unit vectors, float32 `[n, embedding]`.
        labels: the likeliest answer of each probe, int `[n]`, an index into `WORDS[name]`.
    """

    embedding: np.ndarray
    labels: dict[str, np.ndarray]


@jax.jit
def _verdict(judge: Model, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    with exact_products():
        embedding, logits = judge(to_float(images))
    return embedding, {name: value.argmax(axis=-1) for name, value in logits.items()}


def read(judge: Model, images: np.ndarray, batch_size: int = 128) -> Reading:
    """The judge's reading of pictures.

    Args:
        judge: what `load_judge` returns.
        images: uint8 `[..., height, width, 3]`; the leading axes are flattened into one of `n` pictures.
        batch_size: pictures per call; every call has this many (the last is filled up), so one program serves all.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim < 4 or images.shape[-1] != 3:
        raise ValueError(f"pictures are uint8 [..., height, width, 3], got {images.dtype} {list(images.shape)}")
    images = images.reshape(-1, *images.shape[-3:])
    count = len(images)
    if not count:
        raise ValueError("no pictures to read")
    padded = np.concatenate([images, np.zeros((-count % batch_size, *images.shape[1:]), np.uint8)])
    parts = [_verdict(judge, padded[k : k + batch_size]) for k in range(0, len(padded), batch_size)]
    embedding = np.concatenate([np.asarray(part[0]) for part in parts])[:count]
    labels = {name: np.concatenate([np.asarray(part[1][name]) for part in parts])[:count] for name in parts[0][1]}
    return Reading(embedding, labels)


def load_judge(folder: str | Path = JUDGE_FOLDER) -> Model:
    """The judge in `folder` (`config.json`, `model.safetensors`).

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = Path(folder)
    return read_component(folder.parent, folder.name, Judge, JudgeConfig)


def save_judge(
    folder: str | Path, judge: Model, *, dtype: str = "float16", extra: Mapping[str, Any] | None = None
) -> None:
    """Writes a judge, whole or not at all; `extra` are more entries for `config.json`, such as how well it reads."""
    arrays = to_torch_layout(judge.params, abstract_params(Judge, judge.config), dtype=dtype, origin="Judge")
    with atomic_write(folder, replaces="config.json") as temporary:
        temporary.mkdir()
        save_tensors(temporary / "model.safetensors", arrays, {"format": "pt"})
        values = judge.config.to_dict() | dict(extra or {})
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
