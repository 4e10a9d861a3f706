"""The three calls that do everything: `load`, `personalize`, `generate`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from datencoder_jax import sampling, tuning
from datencoder_jax.checkpoints.encoder_folder import read_encoder
from datencoder_jax.checkpoints.hub import TOYWORLD, resolve_base
from datencoder_jax.data.images import to_float
from datencoder_jax.data.reading import fit_square
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.errors import UserError
from datencoder_jax.methods import datencoder
from datencoder_jax.pipeline import Pipeline, attention_shapes, read_pipeline
from datencoder_jax.prompts import TEMPLATE, check_prompts
from datencoder_jax.tuning import LearningRates, TuningConfig
from datencoder_jax.typing import Concept, Variables

LEARNING_RATES = LearningRates(embeddings=1e-3, offsets=1e-2)
_BATCH = 16
_PERSONALIZE, _GENERATE = 0, 1
"""Streams of a seed's draws: pictures must not start from the noise their concept was seen under."""


@dataclass(frozen=True)
class Personalized:
    """A tuned concept and how it came about.

    Attributes:
        concept: what `generate` and `save_concept` take.
        report: `nearest_words` [(word, cosine)], `hard_word`, `losses` per step, `seconds` by stage, `steps`, `seed`.
    """

    concept: Concept
    report: dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """Pictures and how they came about.

    Attributes:
        images: uint8 `[prompts, num, H, W, 3]`.
        report: `seconds` by stage, `seed`, `guidance`.
    """

    images: np.ndarray
    report: dict[str, Any]


def load(model: str | Path = TOYWORLD, *, encoder: str | Path | None = None, dtype: str = "auto") -> Pipeline:
    """A base model with its tuning-encoder.

    Args:
        model: "toyworld" (the embedded model), a diffusers folder, or a Hugging Face repository.
        encoder: folder of a pretrained tuning-encoder; by default the embedded one for "toyworld", none for others.
        dtype: type of the frozen weights; "auto" is bfloat16 on GPUs and TPUs, float32 on CPUs.

    Raises:
        UserError: the model or encoder is missing, damaged, or they do not belong together.
    """
    start = time.perf_counter()
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    folder = resolve_base(model)
    pipeline = read_pipeline(folder, str(model), dtype=dtype)
    if encoder is None and str(model) == TOYWORLD:
        encoder = folder.with_name(f"{TOYWORLD}_encoder")
    if encoder is not None:
        if pipeline.base.vision is None:
            raise UserError(
                f"{model} has no vision tower (image_encoder), which a tuning-encoder looks through; "
                "leave the encoder out or choose another model"
            )
        found = read_encoder(Path(encoder), pipeline.fingerprint)
        inventory = {path: (inputs, outputs) for path, inputs, outputs in found.config.inventory}
        if inventory != attention_shapes(pipeline.base.unet):
            raise UserError(f"the tuning-encoder in {encoder} does not fill this model's attention projections")
        pipeline = replace(pipeline, encoder=found)
    return replace(pipeline, timings={"load": time.perf_counter() - start})


def personalize(
    pipeline: Pipeline,
    images: Sequence[np.ndarray],
    *,
    steps: int = 12,
    token: str = "S*",
    blend: float | None = None,
    seed: int = 0,
    learning_rates: LearningRates = LEARNING_RATES,
    config: TuningConfig | None = None,
    initial: Variables | None = None,
    hard_word: str | None = None,
    quiet: bool = False,
) -> Personalized:
    """A concept from one or several pictures of it.

    Args:
        images: uint8 `[H, W, 3]` each, of any size; the centre square is used.
        steps: tuning steps; 0 returns the encoder's prediction.
        token: the placeholder prompts will contain.
        blend: weight of the soft path in [0, 1]; by default the one the encoder was trained with.
        seed: of every random draw; the same seed gives the same concept on the same machine.
        learning_rates: of `v*` and of the offsets.
        config: batch of draws, views, crops.
        initial: start from these variables instead of the encoder's prediction.
        hard_word: the word of the hard path, by default the one nearest to the start's embedding.
        quiet: print nothing.

    Raises:
        UserError: no picture, a bad option, a model without tuning-encoder or in float16, or tuning diverged.
    """
    if not len(images):
        raise UserError("no picture was given")
    if steps < 0:
        raise UserError(f"steps must be 0 or more, not {steps}")
    if not token.strip() or token in TEMPLATE:
        raise UserError(f"{token!r} cannot be the placeholder; choose something no prompt holds otherwise, such as S*")
    if steps and pipeline.base.unet.dtype == "float16":
        raise UserError("tuning in float16 loses its gradients; load the model in bfloat16 or float32")
    blend = _blend(pipeline, blend)
    pictures = prepare(pipeline, images)
    config = config or TuningConfig(views=max(16, len(images)))
    if config.views < len(images):
        raise UserError(f"{len(images)} pictures need at least as many views, not {config.views}")
    predict_key, view_key, tune_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), _PERSONALIZE), 3)
    base, seconds = pipeline.base, {}

    with _Clock(seconds, "predict", datencoder.predict):
        variables = initial
        if variables is None:
            if pipeline.encoder is None:
                raise UserError(f"there is no tuning-encoder for {pipeline.name}; name one with --encoder")
            variables = datencoder.predict(base, pipeline.encoder, pictures, _empty(pipeline), predict_key, quiet=quiet)
            jax.block_until_ready(variables)
    if hard_word is None:
        hard_word = nearest_words(pipeline, variables.embeddings)[0][0]

    losses = np.zeros(0, np.float32)
    if steps:
        with _Clock(seconds, "tune", tuning.tune, tuning.encode_views_program):
            template = [TEMPLATE.format(token)]
            problem = tuning.Problem(
                base,
                tuning.encode_views_program(base, pictures, view_key, config=config, quiet=quiet),
                jnp.asarray(pipeline.tokenizer.encode(template, token, vectors=len(variables.embeddings))),
                jnp.asarray(pipeline.tokenizer.encode(template, token, word=hard_word)),
                jnp.float32(blend),
                LearningRates(*(jnp.float32(rate) for rate in learning_rates)),
                tune_key,
            )
            state = tuning.start(jax.tree.map(jnp.copy, variables))  # the program takes its carry over
            state, losses = tuning.tune(state, problem, steps=steps, config=config, quiet=quiet)
            variables, losses = jax.block_until_ready((state.variables, losses))
    nearest = nearest_words(pipeline, variables.embeddings)
    variables = jax.device_get(variables)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise UserError("tuning diverged (values are no longer finite); lower the learning rates")

    details = {
        "steps": str(steps),
        "seed": str(seed),
        "pictures": str(len(images)),
        "rank": ", ".join(sorted({str(offset.down.shape[-1]) for offset in variables.offsets.values()})),
        "learning_rate_embeddings": f"{learning_rates.embeddings:g}",
        "learning_rate_offsets": f"{learning_rates.offsets:g}",
        "jax": jax.__version__,
        "datencoder_jax": metadata.version("datencoder_jax"),
    }
    concept = Concept(
        variables.embeddings,
        variables.offsets,
        token,
        blend,
        pipeline.name,
        pipeline.fingerprint,
        hard_word,
        details,
    )
    report = {"nearest_words": nearest, "hard_word": hard_word, "losses": losses.tolist(), "steps": steps, "seed": seed}
    return Personalized(concept, report | {"seconds": seconds})


def prepare(pipeline: Pipeline, images: Sequence[np.ndarray]) -> jax.Array:
    """uint8 pictures of any size -> the centre squares at the model's resolution, `[k, H, W, 3]` in [-1, 1].

    Raises:
        UserError: something is no such picture, as when a single one is given instead of a list.
    """
    for image in images:
        shape = np.shape(image)
        if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise UserError("pictures must be a list of uint8 arrays [H, W, 3], such as `read_image` returns")
    return to_float(np.stack([fit_square(image, pipeline.resolution) for image in images]))


def nearest_words(pipeline: Pipeline, embeddings: jax.Array, k: int = 5) -> list[tuple[str, float]]:
    """The `k` whole words nearest to the first of `[n, d]` embeddings, with their cosines."""
    ids, cosines = (np.asarray(x)[0] for x in tuning.nearest_word_ids(pipeline.base, embeddings, k))
    return [(pipeline.tokenizer.word(int(i)), float(c)) for i, c in zip(ids, cosines, strict=True)]


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    concept: Concept | None = None,
    num: int = 4,
    seed: int = 0,
    sampler: str = "ddim",
    sampling_steps: int = 25,
    guidance: float | None = None,
    blend: float | None = None,
    negative: str = "",
    batch_size: int = _BATCH,
    quiet: bool = False,
) -> Generated:
    """Pictures for prompts.

    Args:
        prompts: texts; with a concept each must contain its token.
        num: pictures per prompt.
        seed: the same seed gives the same pictures on the same machine, whatever else is asked for beside them.
        sampler: "ddim" or "dpm++2m".
        sampling_steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none. By default the model's own: 2 for the embedded one, 7.5
            for those that name none.
        blend: weight of the soft path; by default the concept's.
        negative: what the pictures should not show.
        batch_size: pictures sampled at a time.

    Raises:
        UserError: a bad prompt or option, or a concept of another base model.
    """
    check_prompts(prompts, concept.token if concept else None)
    if num < 1:
        raise UserError(f"the number of pictures must be 1 or more, not {num}")
    if batch_size < 1:
        raise UserError(f"the batch size must be 1 or more, not {batch_size}")
    if concept is not None and concept.fingerprint != pipeline.fingerprint:
        raise UserError(f"the concept was made for {concept.base}, not for {pipeline.name}")
    if guidance is None:
        guidance = pipeline.guidance
    base, tokenizer, seconds = pipeline.base, pipeline.tokenizer, {}
    variables, hard = None, None
    if concept is None:
        soft = tokenizer.encode(prompts)
    else:
        variables = Variables(jnp.asarray(concept.embeddings), jax.tree.map(jnp.asarray, concept.offsets))
        soft = tokenizer.encode(prompts, concept.token, vectors=len(concept.embeddings))
        hard = tokenizer.encode(prompts, concept.token, word=concept.nearest_word)
        blend = _blend(pipeline, concept.blend if blend is None else blend)
    noise = _noise(pipeline, len(prompts), num, seed)
    rows = np.repeat(np.arange(len(prompts)), num)
    plan = make_plan(sampler, base.schedule, sampling_steps)
    negative_ids = jnp.asarray(tokenizer.encode([negative]))

    pictures = []
    with (
        _Clock(seconds, "sample", sampling.generate),
        tqdm(total=len(rows), desc="sampling", unit="picture", disable=quiet or len(rows) <= batch_size) as bar,
    ):
        for start in range(0, len(rows), batch_size):
            # The last batch is filled up by repeating its rows, so that every batch runs the same program.
            chosen = np.resize(np.arange(start, min(start + batch_size, len(rows))), min(batch_size, len(rows)))
            request = sampling.Request(
                jnp.asarray(soft[rows[chosen]]),
                None if hard is None else jnp.asarray(hard[rows[chosen]]),
                negative_ids,
                noise[chosen],
                jnp.float32(guidance),
                jnp.float32(0.0 if blend is None else blend),
            )
            batch = np.asarray(sampling.generate(base, plan, request, variables, quiet=quiet))
            count = min(batch_size, len(rows) - start)
            pictures.append(batch[:count])
            bar.update(count)
    images = np.concatenate(pictures)
    return Generated(
        images.reshape(len(prompts), num, *images.shape[1:]), {"seconds": seconds, "seed": seed, "guidance": guidance}
    )


def _noise(pipeline: Pipeline, prompts: int, num: int, seed: int) -> jax.Array:
    """Initial noise `[prompts * num, h, w, c]`; picture `k` of every prompt starts from the same noise."""
    side, channels = pipeline.base.unet.config.sample_size, pipeline.base.unet.config.in_channels
    key = jax.random.fold_in(jax.random.key(seed), _GENERATE)
    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(num))
    noise = jax.vmap(lambda key: jax.random.normal(key, (side, side, channels)))(keys)
    return jnp.tile(noise, (prompts, 1, 1, 1))


def _blend(pipeline: Pipeline, blend: float | None) -> float:
    if blend is None:
        return pipeline.encoder.config.blend if pipeline.encoder else 1.0
    if not 0.0 <= blend <= 1.0:
        raise UserError(f"blend must lie between 0 and 1, not {blend}")
    return float(blend)


def _empty(pipeline: Pipeline) -> np.ndarray:
    return pipeline.tokenizer.encode([""])


class _Clock:
    """Adds a block's seconds to `seconds[name]`, but those its programs spent compiling to `seconds["compile"]`."""

    def __init__(self, seconds: dict[str, float], name: str, *programs):
        self.seconds, self.name, self.programs = seconds, name, programs

    def __enter__(self):
        self._before, self._start = self._compiling(), time.perf_counter()

    def __exit__(self, *_):
        compiling = self._compiling() - self._before
        self.seconds[self.name] = time.perf_counter() - self._start - compiling
        self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiling

    def _compiling(self) -> float:
        return sum(program.seconds for program in self.programs)
