"""A base model in memory: its networks, its tokenizer and its noise schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.checkpoints.folders import read_base
from datencoder_jax.checkpoints.hub import DEFAULTS, resolve_vision
from datencoder_jax.checkpoints.identity import Traits, part_fingerprint
from datencoder_jax.checkpoints.parts import BaseParts
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.vision import pixel_statistics, read_vision
from datencoder_jax.checkpoints.weights import describing
from datencoder_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from datencoder_jax.errors import UserError
from datencoder_jax.memory import Memory
from datencoder_jax.models.clip_text import TOKEN_TABLE
from datencoder_jax.models.module import Model
from datencoder_jax.models.unet import UNet2DConditionModel
from datencoder_jax.objectives.norm import mean_norm
from datencoder_jax.prompts import PROMPTS, PromptTokenizer, check_prompts
from datencoder_jax.runtime.target import current_target
from datencoder_jax.typing import LowRank

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of pixels in [0, 1] that CLIP's vision towers are given, where a model does not say."""


XL_GUIDANCE = 5.0
"""The scale of guidance for Stable Diffusion XL where none is asked for; other models have 7.5. Both are diffusers'."""


@dataclass(frozen=True)
class Pipeline:
    """A base model and what surrounds it.

    Attributes:
        name: what the user called it.
        fingerprint: identifies its weights; concept files carry it.
        vision_fingerprint: identifies the vision tower, without which it is ""; encoders carry both.
        base: the networks.
        tokenizer: prompts to ids.
        encoder: the tuning-encoder; None if there is none for this model.
        domain: a `DomainEncoder`, E4T's encoder of one domain; None if there is none.
        guidance: the scale of classifier-free guidance where none is asked for.
        prompts: what is drawn where no prompt is given, with the placeholder `S*`.
        memory: what its device's memory allows.
        timings: seconds, `load`.
        loras: the changes that LoRAs of other programs have made to its weights, summed, by the layers' names in
            `checkpoints.lora_names`.
        source: the files whose weights were rounded when they were read; None where they were not.
        known_tokens: bool `[vocabulary]`, which tokens mean something to the model, their embeddings being other than
            zero; None where all do.
    """

    name: str
    fingerprint: str
    base: Base
    tokenizer: PromptTokenizer
    vision_fingerprint: str = ""
    encoder: Model | None = None
    domain: Model | None = None
    guidance: float = 7.5
    prompts: tuple[str, ...] = PROMPTS
    memory: Memory = field(default_factory=Memory)
    timings: dict[str, float] = field(default_factory=dict)
    loras: Mapping[str, LowRank] = field(default_factory=dict)
    source: Path | None = None
    known_tokens: np.ndarray | None = None

    def __repr__(self) -> str:
        encoders = [name for name in ("encoder", "domain") if getattr(self, name) is not None]
        return (
            f"Pipeline({self.name}, {self.resolution} pixels, weights in {self.dtype}, "
            f"{' and '.join(encoders) or 'no encoder'})"
        )

    @property
    def dtype(self) -> str:
        """How its frozen weights are stored."""
        return str(self.base.text.params[TOKEN_TABLE].dtype)

    @property
    def resolution(self) -> int:
        """Side of its pictures in pixels."""
        return self.base.unet.config.sample_size * self.base.vae.config.factor

    def side(self, resolution: int | None) -> int:
        """Side of the latents of pictures of `resolution` pixels, or of the model's own.

        Raises:
            UserError: the model cannot draw pictures of that size.
        """
        if resolution is None:
            return self.base.unet.config.sample_size
        unit = self.base.vae.config.factor * 2 ** (len(self.base.unet.config.block_out_channels) - 1)
        if resolution < unit or resolution % unit:
            raise UserError(f"the resolution must be a multiple of {unit} pixels for this model, and is {resolution}")
        return resolution // self.base.vae.config.factor


def read_pipeline(
    path: Path,
    name: str,
    *,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """A base model from a diffusers folder or a single-file checkpoint.

    Args:
        dtype: the type frozen weights are stored in.
        compute_dtype: the type of computations, except for norms, softmax, losses and XL's VAE, which are in float32;
            by default `Target.compute_dtype`.
        prediction_type: "epsilon" or "v_prediction", in place of what the model says of itself.

    Raises:
        UserError: there is no such model, or a part is missing, damaged or unsupported.
    """
    parts = read_base(path, dtype=dtype, prediction_type=prediction_type)
    compute = compute_dtype or current_target().compute_dtype(dtype)
    unet, text = (model.cast(dtype, compute) for model in (parts.unet, parts.text_encoder))
    text_2, vision = (model and model.cast(dtype, compute) for model in (parts.text_encoder_2, parts.image_encoder))
    # Half precision overflows in XL's decoder.
    vae = parts.vae.cast(dtype, compute if text_2 is None else "float32")
    tokenizer = PromptTokenizer(parts.tokenizer, text.config.vocab_size, text.config.max_position_embeddings)
    origin = path / "feature_extractor" / "preprocessor_config.json"
    mean, std = pixel_statistics(parts.feature_extractor, origin, CLIP_MEAN, CLIP_STD)
    with describing(path / "scheduler" / "scheduler_config.json", "a noise schedule"):
        schedule = _schedule(parts.scheduler)
    with describing(path / DEFAULTS, "a model's defaults"):
        defaults = _defaults(({} if text_2 is None else {"guidance": XL_GUIDANCE}) | (parts.defaults or {}))
    base = Base(
        unet=unet,
        vae=vae,
        text=text,
        vision=vision,
        words=jnp.zeros(0, bool),
        word_norm=jnp.zeros(()),
        pixel_mean=jnp.asarray(mean, jnp.float32),
        pixel_std=jnp.asarray(std, jnp.float32),
        schedule=schedule,
        text_2=text_2,
        end_token=tokenizer.end,
        second_pad=_second_pad(parts, tokenizer),
        zero_empty=parts.force_zeros_for_empty_prompt,
    )
    known = np.zeros(tokenizer.vocab_size, bool)
    for tower in (text, text_2):
        known |= False if tower is None else np.asarray(tower.params[TOKEN_TABLE] != 0).any(axis=1)
    words = jnp.asarray(tokenizer.whole_words & known)
    base = replace(base, words=words, word_norm=mean_norm(base.table, words))
    source = None if dtype == "float32" else expand_user(path)
    return Pipeline(
        name,
        parts.fingerprint,
        base,
        tokenizer,
        parts.vision_fingerprint,
        source=source,
        known_tokens=None if known.all() else known,
        **defaults,
    )


def with_vision(
    pipeline: Pipeline, path: str | Path, *, dtype: str = "float32", compute_dtype: str | None = None
) -> Pipeline:
    """The pipeline with a vision tower from elsewhere, for a base model that has none.

    Args:
        path: a Hugging Face or OpenCLIP folder or file, or a Hugging Face repository.
        dtype, compute_dtype: as for `read_pipeline`.

    Raises:
        UserError: there is no such tower.
    """
    traits: Traits = {}
    vision, extractor = read_vision(resolve_vision(path), dtype=dtype, traits=traits)
    mean, std = pixel_statistics(extractor, path, CLIP_MEAN, CLIP_STD)
    compute = compute_dtype or current_target().compute_dtype(dtype)
    base = replace(
        pipeline.base,
        vision=vision.cast(dtype, compute),
        pixel_mean=jnp.asarray(mean, jnp.float32),
        pixel_std=jnp.asarray(std, jnp.float32),
    )
    return replace(pipeline, base=base, vision_fingerprint=part_fingerprint(traits))


def _second_pad(parts: BaseParts, tokenizer: PromptTokenizer) -> int:
    """The padding of the second text tower, whose tokenizer must otherwise be the first's."""
    if parts.text_encoder_2 is None or parts.tokenizer_2 is None:
        return 0
    config = parts.text_encoder_2.config
    second = PromptTokenizer(parts.tokenizer_2, config.vocab_size, config.max_position_embeddings)
    if (second.vocab_size, second.length) != (tokenizer.vocab_size, tokenizer.length) or not second.same(tokenizer):
        raise UserError(f"{parts.tokenizer_2} and {parts.tokenizer} are tokenizers of different vocabularies.")
    return second.pad


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
        if odd := [prompt for prompt in found["prompts"] if not isinstance(prompt, str)]:
            raise TypeError(f"a prompt cannot be {odd[0]!r}")
        check_prompts(found["prompts"], ["S*"])
        found["prompts"] = tuple(found["prompts"])
    return found


def attention_shapes(unet: Model) -> dict[str, tuple[int, int]]:
    """`(in, out)` of every attention projection of the UNet by module path, in the order of its parameters.

    Raises:
        UserError: the UNet has an attention projection that is not q, k, v or out.
    """
    return projection_shapes({name: tuple(np.shape(value)) for name, value in unet.params.items()})


def map_layers(unet: Model, side: int, wanted: int = 16) -> list[str]:
    """The cross-attention layers whose maps are nearest to `wanted` pixels a side, but for that of the middle.

    Args:
        side: of the latents.
    """
    levels = len(unet.config.block_out_channels)
    sides = {}
    for path in attention_shapes(unet):
        stage, _, rest = path.partition(".")
        if path.endswith("attn2.to_k") and stage != "mid_block":
            block = int(rest.split(".")[0])
            level = block if stage == "down_blocks" else levels - 1 - block
            sides[path.removesuffix(".to_k")] = -(-side // 2**level)
    best = min(sides.values(), key=lambda found: abs(found - wanted))
    return [path for path, found in sides.items() if found == best]


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
