"""One unit's work: a concept from a subject's pictures, and its prompts drawn, by one method at one number of steps.

Every draw is a function of the subject and the seed alone, so that all methods see the same noise.
"""

import functools
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax import api
from datencoder_jax.benchmark.entries import BASE, TUNING, Entry, Row
from datencoder_jax.benchmark.suites import TOKEN, TOYWORLD, Setup, Subject, Suite
from datencoder_jax.bookkeeping import START_AT_WORD
from datencoder_jax.checkpoints.concept_file import concept_size
from datencoder_jax.loading import with_encoder
from datencoder_jax.methods import METHODS
from datencoder_jax.methods.method import RARE, Method
from datencoder_jax.methods.method import Setup as Start
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LowRank, Variables


@dataclass(frozen=True)
class Made:
    """What a unit gave.

    Attributes:
        pictures: uint8 `[prompts, num, H, W, 3]`.
        seconds: by stage (predict, tune, draw ...), compiling left out.
        bytes: of the concept's file; 0 without a concept.
        trained: how many numbers were.
        device: what it was made on, with how many cores if that is a CPU; "" where nobody told.
    """

    pictures: np.ndarray
    seconds: Mapping[str, float]
    bytes: int = 0
    trained: int = 0
    device: str = ""


@functools.lru_cache(maxsize=2)  # rows of one encoder follow one another, and a benchmark may compare dozens
def open_pipeline(setup: Setup, encoder: str | None = None) -> Pipeline:
    """The base model of a run, with its encoder or another; all share the base model's networks."""
    pipeline = open_base(setup)
    if encoder is None or encoder == setup.encoder:
        return pipeline
    return with_encoder(replace(pipeline, encoder=None, domain=None), encoder)


@functools.cache
def open_base(setup: Setup) -> Pipeline:
    """The base model of a run with its encoder, loaded once."""
    return api.load(
        setup.model,
        encoder=setup.encoder,
        vision=setup.vision,
        dtype=setup.dtype,
        compute_dtype=setup.compute_dtype,
        memory=setup.memory,
        prediction_type=setup.prediction_type,
    )


def _with_gains(pipeline: Pipeline, gains: tuple[float, float]) -> Pipeline:
    """With others than its encoder's own."""
    if pipeline.encoder is None:
        return pipeline
    encoder = replace(pipeline.encoder, config=replace(pipeline.encoder.config, gains=gains))
    return replace(pipeline, encoder=encoder)


@functools.cache
def open_suite(setup: Setup) -> Suite:
    """The subjects, prompts and scores of a run."""
    pipeline = open_pipeline(setup.unscored)
    if setup.suite == TOYWORLD:
        from datencoder_jax.benchmark.toyworld import Toyworld

        return Toyworld(setup, pipeline)
    from datencoder_jax.benchmark.photographs import Photographs

    return Photographs(setup, pipeline)


def unit_seed(subject: Subject, seed: int) -> int:
    """The seed of a subject's draws below 2^31, the same for every method."""
    return int(np.random.SeedSequence([seed, zlib.crc32(subject.name.encode())]).generate_state(1)[0] >> 1)


def make(setup: Setup, row: Row, subject: int, seed: int) -> Made:
    """Does a unit.

    Raises:
        UserError: the method cannot be run as asked.
    """
    suite, entry = open_suite(setup), row.entry
    pipeline = open_pipeline(setup.unscored, entry.encoder)
    if "gains" in entry.options:
        pipeline = _with_gains(pipeline, entry.options["gains"])
    who = suite.subjects[subject]
    drawing = {name: getattr(setup, name) for name in ("num", "sampler", "sampling_steps", "guidance", "resolution")}
    drawing |= {"seed": unit_seed(who, seed), "quiet": True}
    if entry.method == BASE:
        drawn = api.generate(pipeline, suite.prompts(subject, who.word), **drawing)
        return Made(drawn.images, {"draw": drawn.report["seconds"]["sample"]}, device=_device())
    made = _personalize(setup, pipeline, row, suite.given(subject), who, drawing["seed"])
    drawing |= {"blend": entry.options.get("sampling_blend"), "gate": entry.options.get("gate")}
    drawn = api.generate(pipeline, suite.prompts(subject), concept=made.concept, **drawing)
    seconds = {name: value for name, value in made.report["seconds"].items() if name != "compile"}
    seconds["draw"] = drawn.report["seconds"]["sample"]
    trained = made.report["trained"] if row.steps else 0
    return Made(drawn.images, seconds, concept_size(made.concept), trained, _device())


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} core{'' if cores == 1 else 's'} of a CPU"


def _personalize(
    setup: Setup, pipeline: Pipeline, row: Row, pictures: list[np.ndarray], who: Subject, seed: int
) -> api.Personalized:
    entry, chosen = row.entry, METHODS[row.entry.method]
    options, predict = {name: entry.options[name] for name in ("rank", "prior", "blend") if name in entry.options}, 0.0
    if chosen.word is not None:
        options["word"] = entry.options.get("word", _words(setup, chosen, who))
    elif _starts_elsewhere(entry):
        options.pop("rank", None)
        whole = pipeline if not row.steps else _with_gains(pipeline, (1.0, 1.0))
        options["initial"], options["hard_word"], predict = _start(setup, whole, entry, pictures, who, seed)
    made = api.personalize(
        pipeline,
        pictures,
        method=entry.method,
        steps=row.steps,
        token=TOKEN,
        seed=seed,
        resolution=setup.resolution,
        learning_rates=row.rates,
        config=_config(setup, pipeline, row, len(pictures)),
        options={name: entry.options[name] for name in chosen.choices if name in entry.options},
        quiet=True,
        **options,
    )
    made.report["seconds"]["predict"] += predict
    return made


def _words(setup: Setup, chosen: Method, who: Subject) -> str:
    """What a method starts at: the class, after DreamBooth's rare word where that means something to the model."""
    if chosen.several:  # one word for each placeholder
        return who.word.split()[-1]
    rare = "prior" in chosen.options and setup.suite != TOYWORLD
    return f"{RARE} {who.word}" if rare else who.word


def _config(setup: Setup, pipeline: Pipeline, row: Row, pictures: int) -> TuningConfig:
    options = row.entry.options
    config = api.tuning_config(pipeline, METHODS[row.entry.method], pictures, row.steps)
    draws = {"draws": setup.draws} if setup.draws else {}
    return replace(config, **draws | {name: options[name] for name in TUNING if name in options})


def _starts_elsewhere(entry: Entry) -> bool:
    options = entry.options
    return options.get("start") == "word" or not (options.get("offsets", True) and options.get("embeddings", True))


def _start(
    setup: Setup, pipeline: Pipeline, entry: Entry, pictures: list[np.ndarray], who: Subject, seed: int
) -> tuple[Variables, str, float]:
    """Where the encoder's method starts without its encoder or a part of its prediction.

    Returns:
        The variables, the hard path's word, and the seconds that predicting took.
    """
    base, tokenizer, options, seconds = pipeline.base, pipeline.tokenizer, entry.options, 0.0
    if options.get("start") == "word":
        own = pipeline.encoder.config.rank if pipeline.encoder is not None else 4
        key = jax.random.fold_in(jax.random.key(seed), START_AT_WORD)
        prepared = api.prepare(pipeline, pictures, setup.resolution)
        words = tokenizer.word_ids(who.word)
        variables = METHODS["lora"].start(Start(pipeline, prepared, words, key, options.get("rank", own)))
        word = who.word
    else:
        predicted = api.personalize(
            pipeline, pictures, steps=0, token=TOKEN, seed=seed, resolution=setup.resolution, quiet=True
        )
        concept, seconds = predicted.concept, predicted.report["seconds"]["predict"]
        variables = Variables(jnp.asarray(concept.embeddings), jax.device_put(concept.offsets))
        word = concept.nearest_word
    if not options.get("offsets", True):
        off = {
            path: LowRank(edit.down, jnp.zeros_like(edit.up)) if isinstance(edit, LowRank) else edit
            for path, edit in variables.offsets.items()
        }
        variables = variables._replace(offsets=off)
    if not options.get("embeddings", True):
        hard = jnp.asarray(base.table)[jnp.array([tokenizer.word_id(word)])]
        variables = variables._replace(embeddings=hard.astype(jnp.float32))
    return variables, word, seconds
