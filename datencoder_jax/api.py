"""The three calls that do everything: `load`, `personalize`, `generate`; and those that load what others made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax import sampling, tuning
from datencoder_jax.bookkeeping import FOCUS, PERSONALIZE, Clock, blend_of
from datencoder_jax.composition import remove_before_loras, without_loras
from datencoder_jax.data.images import to_float
from datencoder_jax.data.reading import fit_square, to_images
from datencoder_jax.drawing import Generated, generate
from datencoder_jax.errors import UserError
from datencoder_jax.loading import import_embedding, load, nearest_words, with_lora
from datencoder_jax.methods import METHODS, datencoder, perfusion
from datencoder_jax.methods.method import RARE, TOKEN, Method, Setup, embeddings_of, trained_numbers
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.printable import is_printable
from datencoder_jax.prior import PriorOptions, draw_prior
from datencoder_jax.prompts import TEMPLATE
from datencoder_jax.runtime.target import accept_deterministic, is_deterministic
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import AND, AnyArray, Concept, Condition, LearningRates, LowRank, Removed, Variables

__all__ = [
    "Generated",
    "Personalized",
    "PriorOptions",
    "generate",
    "import_embedding",
    "load",
    "personalize",
    "with_lora",
]

_RANK = 4


@dataclass(frozen=True)
class Personalized:
    """A tuned concept and how it came about.

    Attributes:
        concept: what `generate` and `save_concept` take.
        report: `nearest_words` [(word, cosine)], `hard_word`, `losses` per step, `seconds` by stage, `steps`, `seed`,
            `deterministic`, `trained`, how many numbers are, and `picture_groups`: lists of the numbers, from 0 on, of
            pictures that the encoder takes for the same thing, None where it cannot tell.
    """

    concept: Concept
    report: dict[str, Any]

    def __repr__(self) -> str:
        steps, seconds = self.report["steps"], sum(self.report["seconds"].values())
        return f"Personalized({self.concept!r}, {self.report['method']}, {steps} steps, {seconds:.1f} s)"


@accept_deterministic
def personalize(
    pipeline: Pipeline,
    images: Any,
    *,
    method: str = "datencoder",
    steps: int | None = None,
    token: str = TOKEN,
    word: str | None = None,
    rank: int | None = None,
    prior: PriorOptions | None = None,
    blend: float | None = None,
    seed: int = 0,
    resolution: int | None = None,
    learning_rates: LearningRates | tuple[float, float] | None = None,
    config: TuningConfig | None = None,
    initial: Variables | None = None,
    hard_word: str | None = None,
    options: Mapping[str, Any] | None = None,
    deterministic: bool = False,
    quiet: bool = False,
) -> Personalized:
    """A concept from one or several pictures of it.

    Args:
        images: one or several: paths, PIL images or uint8 arrays `[H, W, 3]` of any size; the centre square is used.
        method: one of `methods.METHODS`; those that start at a word need no encoder.
        steps: tuning steps, by default the method's; 0 returns the start or, of the tuning-encoder, its prediction with
            the encoder's gains.
        token: the placeholder prompts will contain; of methods that take several, those with blanks between.
        word: what the methods without encoder start at, such as "dog" or "sks dog": one vector for each token of it.
        rank: of low-rank weight offsets, 4 by default; an encoder has its own.
        prior: also preserve how the class is drawn, for methods that can.
        blend: weight of the soft path in [0, 1]; by default the one the encoder was trained with, or 1 without encoder.
        seed: of every random draw; the same seed gives the same concept on the same machine, on a GPU with
            `deterministic` alone.
        resolution: side in pixels that the pictures are brought to; by default the model's own.
        learning_rates: of `v*` and of the offsets, by default the method's; 0 leaves a part as it starts.
        config: batch of draws, views, crops, momentum; by default that of `tuning_config`.
        initial: start from these variables instead of those of the method.
        hard_word: the word of the hard path, by default the class word or, of an encoder's prediction, the one nearest
            to the last embedding of the start.
        options: of the method's own, such as `{"lock": "off"}` of perfusion; `Method.choices` has them.
        deterministic: have a GPU compute the same bits in every run. It then adds in a fixed order, and does not choose
            its kernels by timing them, which takes more time. Other devices compute as ever.
        quiet: print nothing.

    Raises:
        UserError: no picture, a bad option, a model without tuning-encoder or in float16, or values that are not
            finite, at the start or as tuning diverged.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is not known; choose one of: {', '.join(METHODS)}")
    chosen = METHODS[method].with_options(method, options)
    steps = chosen.steps if steps is None else steps
    rates = chosen.rates if learning_rates is None else _learning_rates(learning_rates)
    images = to_images(images)
    if not images:
        raise UserError("no picture was given")
    if steps < 0:
        raise UserError(f"steps must be 0 or more, not {steps}")
    for option, value in (("rank", rank), ("prior", prior)):
        if value is not None and option not in chosen.options:
            able = ", ".join(name for name, other in METHODS.items() if option in other.options)
            raise UserError(f"{method} takes no {option}; those that do are: {able}")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be 1 or more, not {rank}")
    tokens = token.split()
    around = TEMPLATE if len(tokens) == 1 else TEMPLATE + AND
    if not tokens or not is_printable(token) or any(each in around for each in tokens):
        raise UserError(f"{token!r} cannot be the placeholder; choose something no prompt holds otherwise, such as S*")
    if len(tokens) > 1 and not chosen.several:
        able = ", ".join(name for name, other in METHODS.items() if other.several)
        raise UserError(f"{method} takes one placeholder, without spaces, not {token!r}; several take: {able}")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"the placeholders must be different words, and are {token!r}")
    if word is not None and chosen.word is None:
        raise UserError(f"{method} takes no word to start at: its encoder finds one; leave {word!r} out")
    if prior is not None and word is None and chosen.word == RARE:
        raise UserError(f"a prior is of a class; name it with --word, such as '{RARE} dog' or dog")
    if hard_word is not None and len(tokens) > 1 and len(hard_word.split()) != len(tokens):
        raise UserError(f"the hard path needs a word for each of {token}, not {hard_word!r}")
    if steps and pipeline.base.unet.dtype == "float16":
        raise UserError("tuning in float16 loses its gradients; load the model in bfloat16 or float32")
    blend = blend_of(getattr(pipeline, chosen.encoder) if chosen.encoder else None, blend)
    pictures = prepare(pipeline, images, resolution)
    if config is None:
        config = tuning_config(pipeline, chosen, len(images), steps)
    if config.views < len(images):
        raise UserError(f"{len(images)} pictures need at least as many views, not {config.views}")
    predict_key, view_key, tune_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), PERSONALIZE), 3)
    base, seconds = pipeline.base, {}

    class_tokens, picture_groups = 1, None
    with Clock(seconds, "predict", datencoder.predict_and_compare, *datencoder.IN_PARTS, *perfusion.PROGRAMS):
        variables = initial
        if variables is None:
            setup = _setup(pipeline, method, pictures, word, rank or _RANK, predict_key, quiet)
            setup = setup._replace(tuned=steps > 0, prior=prior is not None, token=" ".join(tokens))
            class_tokens, words = setup.class_tokens, (word or chosen.word or "").split()
            if chosen.several and not len(setup.word_ids) == len(words) == len(tokens):
                raise UserError(
                    f"{method} takes one word of one token for each placeholder ({token}), and {word or chosen.word!r} "
                    f"is {len(setup.word_ids)} tokens; name them with --word, such as --token 'A* B*' --word 'cat dog'"
                )
            variables = chosen.start(setup)
            jax.block_until_ready(variables)
            picture_groups = _picture_groups(pipeline, setup)
    if not tuning.finite(variables):
        raise UserError(
            "what tuning starts from is not finite (NaN or infinity); load the model with --dtype bf16 or f32"
        )
    each = len(variables.embeddings) // len(tokens)
    if hard_word is None and initial is None and chosen.word is not None:  # of "sks dog" it is the dog
        hard_word = " ".join((chosen.word if word is None else word).split()[-len(tokens) :])
    if hard_word is None:
        base.require_words("the hard path's prompt (name a word with hard_word)")
        last = variables.embeddings[each - 1 :: each]
        hard_word = " ".join(nearest_words(pipeline, vector[None])[0][0] for vector in last)
    concept = Concept(variables.embeddings, {}, " ".join(tokens), blend, pipeline.name, pipeline.fingerprint, hard_word)

    losses = np.zeros(0, np.float32)
    each_rate = chosen.rates_of(variables, rates, class_tokens)
    if steps:
        kept = None
        if prior is not None:
            with Clock(seconds, "prior", *sampling.LATENTS):
                kept = draw_prior(pipeline, hard_word, prior, pipeline.side(resolution), seed, quiet)
                jax.block_until_ready(kept.latents)
        with Clock(seconds, "tune", *tuning.PROGRAMS):
            template = [TEMPLATE.format(concept.subject)]
            tokenizer, texts = pipeline.tokenizer, base.only("text", "text_2")

            def read(ids: AnyArray, embeddings: jax.Array | None) -> Condition:
                return tuning.read_prompt(texts, jnp.asarray(ids), embeddings, quiet=quiet)

            def focus(latents: jax.Array, word: Condition) -> jax.Array:
                return tuning.focus_views_program(
                    base.only("unet"),
                    latents,
                    word,
                    read(tokenizer.encode([""]), None),
                    jax.random.fold_in(jax.random.key(seed), FOCUS),
                    view_key,
                    jnp.float32(chosen.focus),
                    pictures=len(pictures),
                    config=config,
                    quiet=quiet,
                )

            latents = tuning.encode_views_program(base.only("vae"), pictures, view_key, config=config, quiet=quiet)
            soft_ids = jnp.asarray(tokenizer.encode(template, concept.placeholders))
            frozen = rates.embeddings == 0.0 and variables.reader is None
            hard = None
            if blend < 1.0 or chosen.focus is not None:
                hard = read(tokenizer.encode(template, words=concept.words), None)
            problem = tuning.Problem(
                base.only("unet") if frozen else base.only("unet", "text", "text_2"),
                latents,
                soft_ids,
                None if blend == 1.0 else hard,
                jnp.float32(blend),
                jax.tree.map(jnp.float32, each_rate),
                tune_key,
                read(soft_ids, variables.embeddings) if frozen else None,
                kept,
                None if variables.gate is None else _metric(pipeline, chosen, quiet),
                None if chosen.calibration is None else jnp.float32(chosen.calibration),
                None if chosen.focus is None or hard is None else focus(latents, hard),
                None if chosen.levels == (0.0, 1.0) else jnp.array(chosen.levels, jnp.float32),
            )
            # As it will be drawn with: what it removes is taken from the weights without LoRAs of other programs.
            state = tuning.start(
                variables._replace(offsets=remove_before_loras(variables.offsets, pipeline.loras)), quiet=True
            )
            state, losses = tuning.run(state, problem, steps=steps, config=config, quiet=quiet)
            variables, losses = jax.block_until_ready((state.variables, losses))
            variables = variables._replace(offsets=without_loras(variables.offsets))
    nearest = nearest_words(pipeline, variables.embeddings[-1:])
    trained = trained_numbers(variables, each_rate) if steps else 0
    variables = jax.device_get(chosen.finish(variables))

    details = {
        "method": method,
        "steps": str(steps),
        "seed": str(seed),
        "deterministic": str(is_deterministic()),
        "pictures": str(len(images)),
        "resolution": str(pictures.shape[1]),
        "prediction_type": base.schedule.prediction_type,
        "rank": ", ".join(
            sorted({str(o[0].shape[-1]) for o in variables.offsets.values() if isinstance(o, LowRank | Removed)})
        ),
        "learning_rate_embeddings": f"{rates.embeddings:g}",
        "learning_rate_offsets": f"{rates.offsets:g}",
        **{f"option_{name}": str(value) for name, value in (options or {}).items()},
        "jax": jax.__version__,
        "datencoder_jax": metadata.version("datencoder_jax"),
    }
    concept = replace(
        concept,
        embeddings=variables.embeddings,
        offsets=variables.offsets,
        metadata=details,
        gate=variables.gate,
        reader=variables.reader,
    )
    report = {"nearest_words": nearest, "hard_word": hard_word, "losses": losses.tolist(), "steps": steps, "seed": seed}
    report |= {"method": method, "resolution": pictures.shape[1], "trained": trained}
    report |= {"deterministic": is_deterministic(), "picture_groups": picture_groups}
    return Personalized(concept, report | {"seconds": seconds})


def tuning_config(pipeline: Pipeline, method: Method, pictures: int, steps: int) -> TuningConfig:
    """How a method tunes where nothing else is asked for: on so many pictures, with so many steps.

    Every picture is seen as it is and in at least one crop, all in as many, and there are 16 views or more.
    """
    memory, momentum = pipeline.memory, tuning.momentum_for(steps)
    views = pictures * max(2, -(-16 // pictures))
    config = TuningConfig(
        draws=memory.draws, views=views, momentum=momentum, remat=memory.remat, scan_layers=memory.scan_layers
    )
    return config if method.norm_weight is None else replace(config, norm_weight=method.norm_weight)


def _picture_groups(pipeline: Pipeline, setup: Setup) -> list[list[int]] | None:
    """Which pictures the encoder takes for the same thing; None where none was asked, or nobody knows from when on."""
    cosines = (setup.notes or {}).get("picture_cosines")
    least = None if pipeline.encoder is None else pipeline.encoder.config.same_cosine
    return None if cosines is None or least is None else datencoder.group_alike(np.asarray(cosines), least)


def _setup(
    pipeline: Pipeline, method: str, pictures: jax.Array, word: str | None, rank: int, key: jax.Array, quiet: bool
) -> Setup:
    """What a method's start is made from."""
    chosen, ids, class_tokens = METHODS[method], [], 1
    if chosen.word is not None:
        text = chosen.word if word is None else word
        ids = pipeline.tokenizer.word_ids(text)
        class_tokens = len(pipeline.tokenizer.word_ids(text.split()[-1]))
        if len(ids) > pipeline.tokenizer.length // 4:
            raise UserError(f"{word!r} is {len(ids)} tokens long; name what the picture shows in a few words")
        if not np.asarray(embeddings_of(pipeline.base, ids)).any(axis=1).all():
            raise UserError(f"{text!r} means nothing to this model; name what the picture shows with --word")
    elif chosen.encoder is not None and getattr(pipeline, chosen.encoder) is None:
        raise UserError(_no_encoder(pipeline, method, chosen.encoder))
    return Setup(pipeline, pictures, ids, key, rank, quiet, class_tokens=class_tokens, notes={})


def _learning_rates(rates: Any) -> LearningRates:
    """The learning rates of embeddings and offsets from any pair of numbers.

    Raises:
        UserError: it is no such pair.
    """
    if isinstance(rates, LearningRates):
        return rates
    try:
        embeddings, offsets = (float(rate) for rate in rates)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the learning rates must be two numbers, of the embedding and of the offsets, not {rates!r}"
        ) from error
    return LearningRates(embeddings, offsets)


def _no_encoder(pipeline: Pipeline, method: str, kind: str) -> str:
    """What is said where a method has no encoder of its kind to start from."""
    if kind == "domain":
        other = "" if pipeline.encoder is None else ", and a tuning-encoder is none"
        return (
            f"{method} starts from an E4T encoder of the picture's domain{other}; name the folder of one with "
            "--encoder (configs/toyworld_e4t.py pretrains one)"
        )
    if pipeline.domain is not None:
        return f"{method} starts from a tuning-encoder, and an E4T encoder of one domain is none; choose --method e4t"
    others = " or ".join(name for name, other in METHODS.items() if other.word is not None)
    return (
        f"there is no tuning-encoder for {pipeline.name}: name one with --encoder (pretrain it first), or choose a "
        f"method that needs none with --method ({others})"
    )


def _metric(pipeline: Pipeline, method: Method, quiet: bool) -> jax.Array:
    """What gates follow their concept with."""
    if method.metric is None:
        raise UserError("a gated concept can only be tuned on with the method that made it")
    return jnp.asarray(method.metric(pipeline, quiet=quiet))


def prepare(pipeline: Pipeline, images: Sequence[np.ndarray], resolution: int | None = None) -> jax.Array:
    """uint8 pictures of any size -> centre squares of the given or the model's resolution, `[k, H, W, 3]` in [-1, 1].

    Raises:
        UserError: something is no such picture, as when a single one is given instead of a list, or the model cannot
            draw at that resolution.
    """
    for image in images:
        shape = np.shape(image)
        if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise UserError("pictures must be paths, PIL images or uint8 arrays [H, W, 3]")
    side = pipeline.side(resolution) * pipeline.base.vae.config.factor
    return to_float(np.stack([fit_square(image, side) for image in images]))
