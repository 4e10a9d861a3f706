"""A base model in memory: its networks as one pytree, its tokenizer and its noise schedule."""

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.checkpoints.folders import read_base
from datencoder_jax.checkpoints.hub import DEFAULTS
from datencoder_jax.checkpoints.weights import describing
from datencoder_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from datencoder_jax.errors import UserError
from datencoder_jax.models.clip_text import TOKEN_TABLE
from datencoder_jax.models.module import Model
from datencoder_jax.models.unet import UNet2DConditionModel
from datencoder_jax.prompts import PROMPTS, PromptTokenizer, check_prompts

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of pixels in [0, 1] that CLIP's vision towers are given, where a model does not say."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Base:
    """The frozen networks and constants that compiled programs take as one argument.

    Attributes:
        unet, vae, text: Stable Diffusion's parts.
        vision: the CLIP vision tower; None where the model has none (then there is no tuning-encoder either).
        words: bool `[vocabulary]`, what may be a concept's nearest word: whole words with an embedding other than zero.
        pixel_mean, pixel_std: `[3]`, of the vision tower's input in [0, 1].
        schedule: the noise schedule (static).
    """

    unet: Model
    vae: Model
    text: Model
    vision: Model | None
    words: jax.Array
    pixel_mean: jax.Array
    pixel_std: jax.Array
    schedule: ScheduleConfig = field(metadata={"static": True})

    @property
    def table(self) -> jax.Array:
        """The text tower's token embeddings `[vocabulary, d]`."""
        return self.text.params[TOKEN_TABLE]

    @property
    def eyes(self) -> Model:
        """The vision tower; a `UserError` where the model has none."""
        if self.vision is None:
            raise UserError(
                "this base model has no vision tower (image_encoder), which the tuning-encoder looks through"
            )
        return self.vision

    def vision_input(self, images: jax.Array) -> jax.Array:
        """Pictures `[batch, H, W, 3]` in [-1, 1] -> the vision tower's normalized input at its own resolution."""
        side = self.eyes.config.image_size
        if images.shape[1:3] != (side, side):
            images = jax.image.resize(images, (len(images), side, side, 3), "cubic", antialias=True)
        scale, shift = (x.reshape(1, 1, 1, 3) for x in (self.pixel_std, self.pixel_mean))
        return (0.5 * images + 0.5 - shift) / scale


@dataclass(frozen=True)
class Pipeline:
    """A base model and what surrounds it.

    Attributes:
        name: what the user called it.
        fingerprint: identifies its weights; concept files carry it.
        base: the networks.
        tokenizer: prompts to ids.
        encoder: the tuning-encoder; None if there is none for this model.
        guidance: the scale of classifier-free guidance where none is asked for.
        prompts: what is drawn where no prompt is given, with the placeholder `S*`.
        timings: seconds, `load`.
    """

    name: str
    fingerprint: str
    base: Base
    tokenizer: PromptTokenizer
    encoder: Model | None = None
    guidance: float = 7.5
    prompts: tuple[str, ...] = PROMPTS
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def resolution(self) -> int:
        """Side of its pictures in pixels."""
        return self.base.unet.config.sample_size * self.base.vae.config.factor


def read_pipeline(folder: Path, name: str, *, dtype: str = "float32") -> Pipeline:
    """A base model from a diffusers folder.

    Args:
        dtype: the type frozen weights are stored in and computed with; norms, softmax and losses stay in float32.

    Raises:
        UserError: the folder is no such folder, or a part is missing, damaged or unsupported.
    """
    parts = read_base(folder, dtype=dtype)
    unet, vae, text = (model.cast(dtype, dtype) for model in (parts.unet, parts.vae, parts.text_encoder))
    vision = None if parts.image_encoder is None else parts.image_encoder.cast(dtype, dtype)
    tokenizer = PromptTokenizer(parts.tokenizer, text.config.vocab_size, text.config.max_position_embeddings)
    pixels = parts.feature_extractor or {}
    with describing(folder / "scheduler" / "scheduler_config.json", "a noise schedule"):
        schedule = _schedule(parts.scheduler)
    with describing(folder / DEFAULTS, "a model's defaults"):
        defaults = _defaults(parts.defaults or {})
    base = Base(
        unet=unet,
        vae=vae,
        text=text,
        vision=vision,
        words=jnp.asarray(tokenizer.whole_words & np.asarray(text.params[TOKEN_TABLE] != 0).any(axis=1)),
        pixel_mean=jnp.asarray(pixels.get("image_mean", CLIP_MEAN), jnp.float32),
        pixel_std=jnp.asarray(pixels.get("image_std", CLIP_STD), jnp.float32),
        schedule=schedule,
    )
    return Pipeline(name, parts.fingerprint, base, tokenizer, **defaults)


def _schedule(values: dict[str, Any]) -> ScheduleConfig:
    schedule = ScheduleConfig.from_dict(values)
    table = alphas_cumprod(schedule)
    if not (table.size and (table >= 0).all() and (table <= 1).all()):
        raise ValueError("its betas are not between 0 and 1")
    return schedule


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """`guidance` and `prompts` of a `Pipeline`, as far as the content of `datencoder.json` says them."""
    found = {name: values[name] for name in ("guidance", "prompts") if name in values}
    if "guidance" in found and not (type(found["guidance"]) in (int, float) and isfinite(found["guidance"])):
        raise TypeError(f"guidance cannot be {found['guidance']!r}")
    if "prompts" in found:
        check_prompts(found["prompts"], "S*")
        found["prompts"] = tuple(found["prompts"])
    return found


def attention_shapes(unet: Model) -> dict[str, tuple[int, int]]:
    """`(in, out)` of every attention projection of the UNet by module path, in the order of its parameters.

    Raises:
        UserError: the UNet has an attention projection that is not q, k, v or out.
    """
    return projection_shapes({name: tuple(np.shape(value)) for name, value in unet.params.items()})


def projection_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """As `attention_shapes`, from parameter shapes by name."""
    found = {}
    for name, shape in sorted(shapes.items()):
        module, _, leaf = name.rpartition(".")
        owner, _, projection = module.partition(".attn")
        if not projection or leaf != "weight":
            continue
        if projection[2:] not in ("to_q", "to_k", "to_v", "to_out.0"):
            raise UserError(f"{UNet2DConditionModel.__name__}: no offset is defined for the projection {name}")
        found[f"{owner}.attn{projection}"] = shape
    return found
