"""Prompts to pictures, with concepts or without: `generate`."""

import io
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from datencoder_jax import sampling
from datencoder_jax.base import Base
from datencoder_jax.bookkeeping import FRESH, GENERATE, Clock, blend_of
from datencoder_jax.composition import Composition, compose, remove_before_loras
from datencoder_jax.data.images import grid
from datencoder_jax.diffusion.guidance import guidance_scale
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.errors import UserError
from datencoder_jax.loading import load_concept_for
from datencoder_jax.methods.method import TOKEN
from datencoder_jax.models.edits import follows_class
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.prompts import check_prompts, placeholder
from datencoder_jax.runtime.target import accept_deterministic, is_deterministic
from datencoder_jax.typing import AnyArray, Concept, Variables


@dataclass(frozen=True)
class Generated:
    """Pictures and how they came about.

    Attributes:
        images: uint8 `[prompts, num, H, W, 3]`.
        report: `seconds` by stage, `seed`, `deterministic`, `guidance`, `blend`.
    """

    images: np.ndarray
    report: dict[str, Any]

    def __repr__(self) -> str:
        prompts, num, height, width, _ = self.images.shape
        return f"Generated({num} of each of {prompts} prompts, {width}x{height} pixels, seed {self.report['seed']})"

    def _repr_png_(self) -> bytes:
        """The pictures in a notebook, one row for each prompt; small ones are enlarged."""
        rows = self.images.reshape(-1, *self.images.shape[2:])
        content = io.BytesIO()
        grid(rows, self.images.shape[1], scale=max(1, 128 // self.images.shape[2])).save(content, "PNG")
        return content.getvalue()


@accept_deterministic
def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    concept: Any = None,
    weights: Sequence[float] | None = None,
    num: int = 4,
    seed: int = 0,
    resolution: int | None = None,
    sampler: str = "ddim",
    sampling_steps: int = 25,
    guidance: float | None = None,
    blend: float | None = None,
    gate: tuple[float, float] | None = None,
    negative: str = "",
    batch_size: int | None = None,
    deterministic: bool = False,
    quiet: bool = False,
) -> Generated:
    """Pictures for prompts.

    Args:
        prompts: texts; with concepts each must contain the placeholder of at least one.
        concept: one or several: concepts, results of `personalize`, or paths of concept files; those that come from
            `import_embedding` too.
        weights: of the concepts' weight offsets, 1 for each by default.
        num: pictures per prompt.
        seed: the same call with the same seed gives the same pictures on the same machine, on a GPU with
            `deterministic` alone. Noise depends on nothing but the seed and a picture's number: with more pictures or
            other prompts beside it a picture is the same up to rounding.
        resolution: side in pixels; by default the model's own.
        sampler: one of `diffusion.samplers.SAMPLERS`.
        sampling_steps: denoising steps.
        guidance: scale of classifier-free guidance; at or below 1 there is none, and each step takes half the work. By
            default the model's own: 2 for the embedded one, 5 for XL, 7.5 for others.
        blend: weight of the soft path; by default the concepts'.
        gate: beta and tau of gated concepts (perfusion); by default the concepts'. A higher beta leaves more to the
            prompt, a lower one more to the concept.
        negative: what the pictures should not show; it may contain placeholders too. It has no effect without guidance.
        batch_size: pictures sampled at a time, by default what the memory allows.
        deterministic: have a GPU compute the same bits in every run. It then does not choose its kernels by timing
            them, which takes more time. Other devices compute as ever.

    Raises:
        UserError: a bad prompt or option, concepts of another base model, two with one placeholder, or a picture that
            is not finite.
    """
    concepts = _to_concepts(pipeline, concept)
    for each in concepts:
        if each.fingerprint != pipeline.fingerprint:
            raise UserError(f"the concept was made for {each.base}, not for {pipeline.name}")
    if weights is not None and not concepts:
        raise UserError("weights were given without concepts")
    composition = compose(concepts, weights) if concepts else Composition(None, {}, {}, 1.0)
    tokens = list(composition.placeholders)
    # An embedding from elsewhere, which does not say how it was made, may be meant for the negative prompt alone.
    check_prompts(prompts, tokens if any(each.offsets or each.metadata for each in concepts) else ())
    for each in concepts:
        own = list(each.placeholders)
        if not any(placeholder(token).search(text) for token in own for text in (*prompts, negative)):
            raise UserError(
                f"the placeholder {' or '.join(map(repr, own))} is in none of the prompts; write it where the concept "
                "belongs"
            )
    if not quiet:
        _warn_of_unknown_words(pipeline, (*prompts, negative), (*tokens, TOKEN))
    if num < 1:
        raise UserError(f"the number of pictures must be 1 or more, not {num}")
    batch_size = pipeline.memory.batch if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"the batch size must be 1 or more, not {batch_size}")
    if guidance is None:
        guidance = pipeline.guidance
    base, tokenizer, seconds = pipeline.base, pipeline.tokenizer, {}
    variables, placeholders, words = composition[:3]
    if variables is not None:
        variables = variables._replace(offsets=remove_before_loras(variables.offsets, pipeline.loras))
    if gate is not None:
        variables = _with_gate(variables, *gate)
    blend = blend_of(None, composition.blend if blend is None else blend)
    soft = tokenizer.encode(prompts, placeholders)
    hard = None
    if variables is not None and blend < 1.0:  # at 1 there is only the soft path
        hard = tokenizer.encode(prompts, words=words)
    of_class = None
    if variables is not None and follows_class(variables.offsets, variables.gate):
        # As many of the word's tokens as there are vectors: keys and values go on being of the same positions.
        ids = [np.resize(tokenizer.word_ids(words[token]), count) for token, count in placeholders.items()]
        of_class = np.concatenate([np.arange(tokenizer.vocab_size), *ids])[soft].astype(np.int32)
    noise, keys = initial_noise(pipeline, len(prompts), num, seed, resolution)
    rows = np.repeat(np.arange(len(prompts)), num)
    plan = make_plan(sampler, base.schedule, sampling_steps)
    scale, negative_ids = guidance_scale(guidance), None
    if scale is not None and (negative or not base.zero_empty):
        negative_ids = jnp.asarray(tokenizer.encode([negative], placeholders))
    draw = sampling.draw_in_parts if pipeline.memory.in_parts else sampling.generate

    drawn_at_once = min(batch_size, next_power_of_two(len(rows)))
    pictures = []
    with (
        Clock(seconds, "sample", sampling.generate, *sampling.IN_PARTS),
        tqdm(total=len(rows), desc="sampling", unit="picture", disable=quiet or len(rows) <= batch_size) as bar,
    ):
        for start in range(0, len(rows), batch_size):
            # A batch is filled up by repeating its rows, so that few programs draw any number of pictures.
            chosen = np.resize(np.arange(start, min(start + batch_size, len(rows))), drawn_at_once)
            request = sampling.Request(
                jnp.asarray(soft[rows[chosen]]),
                None if hard is None else jnp.asarray(hard[rows[chosen]]),
                negative_ids,
                noise[chosen],
                scale,
                jnp.float32(blend),
                keys[chosen],
                None if of_class is None else jnp.asarray(of_class[rows[chosen]]),
            )
            networks = base.only("unet", "vae", "text", "text_2")
            drawn = jax.device_get(draw(networks, plan, request, variables, quiet=quiet))
            if not drawn.finite.all():
                raise _not_finite(base, variables is not None)
            count = min(batch_size, len(rows) - start)
            pictures.append(drawn.pictures[:count])
            bar.update(count)
    images = np.concatenate(pictures)
    return Generated(
        images.reshape(len(prompts), num, *images.shape[1:]),
        {
            "seconds": seconds,
            "seed": seed,
            "deterministic": is_deterministic(),
            "guidance": guidance,
            "blend": blend,
        },
    )


def _warn_of_unknown_words(pipeline: Pipeline, texts: Iterable[str], placeholders: Collection[str]) -> None:
    """Warns of words in texts that mean nothing to the model, as most words mean nothing to the embedded one."""
    if pipeline.known_tokens is None:
        return
    words = pipeline.tokenizer.unknown_words(texts, pipeline.known_tokens, placeholders)
    if words:
        warnings.warn(
            f"{pipeline.name} was trained without some words of the prompts ({', '.join(words)}), so they mean nothing "
            "to it; datencoder info --words lists those that the embedded model knows",
            stacklevel=4,
        )


def next_power_of_two(count: int) -> int:
    """The size that arrays of `count` rows are filled up to: every size is a program that has to be compiled."""
    return 1 << (count - 1).bit_length()


def _to_concepts(pipeline: Pipeline, concepts: Any) -> list[Concept]:
    """Concepts as people have them in Python: one or several, each itself, a result of `personalize`, or a file."""
    if concepts is None:
        return []
    if isinstance(concepts, str | Path | Concept) or isinstance(getattr(concepts, "concept", None), Concept):
        concepts = [concepts]
    if not isinstance(concepts, Iterable):
        raise UserError(
            f"a concept must be a concept, a result of personalize or a path, not {type(concepts).__name__}"
        )
    return [_to_concept(pipeline, concept) for concept in concepts]


def _to_concept(pipeline: Pipeline, concept: Any) -> Concept:
    if isinstance(concept, str | Path):
        return load_concept_for(pipeline, concept)
    concept = getattr(concept, "concept", concept)
    if not isinstance(concept, Concept):
        raise UserError(f"a concept must be a concept, a result of personalize or a path, not {type(concept).__name__}")
    return concept


def _with_gate(variables: Variables | None, beta: float, tau: float) -> Variables:
    """The variables with another gate for each concept."""
    if variables is None or variables.gate is None:
        raise UserError("a gate is of gated concepts, and there is none; leave --gate out, or make one with perfusion")
    if not (isfinite(beta) and isfinite(tau) and tau > 0):
        raise UserError(f"a gate is a finite beta and a tau above 0, not {beta} and {tau}")
    count = np.shape(variables.gate.bias)
    bias, temperature = (jnp.full(count, value, jnp.float32) for value in (beta, tau))
    return variables._replace(gate=variables.gate._replace(bias=bias, temperature=temperature))


def _not_finite(base: Base, tuned: bool) -> UserError:
    """What is said of pictures whose numbers overflowed, drawn with a concept or without."""
    for model in filter(None, (base.unet, base.vae, base.text, base.text_2)):
        if odd := [name for name, value in model.params.items() if not _is_finite(value)]:
            return UserError(
                f"the weights of the base model hold values that are not finite (NaN or infinity), {odd[0]} of its "
                f"{model.kind.__name__} the first of them; fetch or convert it again, or leave --lora out"
            )
    ways = ["lower --guidance and the weights of --lora and --concept"]
    if tuned:
        ways.append("tune the concept with lower --learning-rates")
    if "float16" in {model.dtype for model in (base.unet, base.vae, base.text)}:
        ways.insert(0, "load the model with --dtype bf16 or f32 in place of f16")
    return UserError(f"some pictures are not finite (NaN or infinity); {', or '.join(ways)}")


def _is_finite(weights: AnyArray) -> bool:
    return bool(np.isfinite(np.asarray(weights).astype(np.float32)).all())


def initial_noise(
    pipeline: Pipeline, prompts: int, num: int, seed: int, resolution: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Initial noise `[prompts * num, h, w, c]` and keys of further noise `[prompts * num]`.

    Picture `k` of every prompt has the same.
    """
    shape = (pipeline.side(resolution),) * 2 + (pipeline.base.unet.config.in_channels,)
    rows = next_power_of_two(num)

    def keys(stream: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), stream)
        return jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(rows))

    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys(GENERATE))[:num]
    return jnp.tile(noise, (prompts, 1, 1, 1)), jnp.tile(keys(FRESH)[:num], prompts)
